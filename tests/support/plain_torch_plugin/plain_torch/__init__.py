"""Independent adapters and operations in plain PyTorch. Only `door.py` refers to peft-harness."""
