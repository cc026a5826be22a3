"""The command `kit`: a folder with all that a machine without network needs to run `peft-harness night`."""
