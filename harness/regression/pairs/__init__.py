"""`gate --pairs OLD NEW`: compare two revisions or implementations by pairs of runs. Each run is a process."""
