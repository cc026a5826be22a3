"""Check a training loop: does it train as the harness's own loop does, and which of its settings change training?"""
