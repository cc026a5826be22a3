"""`gate --pairs OLD NEW`: compare two sides by interleaved pairs of runs. Each run is a process of its own."""
