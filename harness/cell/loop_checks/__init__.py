"""Check whether a training loop trains as the harness's own loop does, and find which of its options change training."""
