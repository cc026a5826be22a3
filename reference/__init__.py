"""Reference implementations of the Methods, one file per paper. They use only torch and the standard library."""
