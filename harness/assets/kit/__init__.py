"""The command `kit`, which makes a folder from which a machine without network can run `peft-harness night`."""
