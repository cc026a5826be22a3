"""Example of a third-party package: a LoRA layer and a decoder of NF4. Only `door.py` refers to peft-harness."""
