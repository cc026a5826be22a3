"""Analysis of Records: metrics, intervals, rankings, verdicts. Imports no torch, changes nothing on disk."""
