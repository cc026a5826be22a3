"""Random walks: an implementation and the reference take the same random steps of a training program."""
