"""Nights of runs, kept as small files in a repository, and what changed from one night to another. No torch."""
