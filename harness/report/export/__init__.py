"""Tables with the numbers of runs: frames for a notebook, Parquet and CSV for other programs. They need no torch."""
