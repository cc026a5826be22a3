"""`gate --pairs OLD NEW`: compare two revisions or implementations by interleaved pairs of runs, each a process."""
