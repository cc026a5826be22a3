"""What the Records say: intervals, rankings, verdicts. Reads Records, imports no torch, changes nothing on disk."""
