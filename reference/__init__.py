"""Reference implementations of the methods: one file per paper, torch and the standard library only."""
