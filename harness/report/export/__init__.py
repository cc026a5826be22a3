"""The numbers of runs as tables: frames for a notebook, Parquet and CSV for everything else. Never imports torch."""
