"""Statistics: intervals, paired tests, change points. Knows samples, not Records."""
