"""Statistics: intervals, paired tests, change points. They take samples, not Records."""
