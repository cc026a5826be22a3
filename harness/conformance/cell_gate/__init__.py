"""The parity gate of a Cell: the checks that run inside a Cell, around its measurements."""
