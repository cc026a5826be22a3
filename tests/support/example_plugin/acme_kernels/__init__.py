"""Somebody's kernels: a LoRA layer and a decoder of NF4. `door.py` is all that is there for peft-harness."""
