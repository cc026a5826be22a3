"""Is it the same thing? Cases, checks and tolerance policies, judged against a float64 reference."""
