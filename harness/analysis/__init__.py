"""Analysis of Records: metrics, intervals, rankings, verdicts. It imports no torch and changes nothing on disk."""
