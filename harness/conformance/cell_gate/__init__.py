"""The parity gate of a Cell: checks that run inside the Cell, before and after its measurements."""
