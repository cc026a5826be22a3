"""The parity gate of a Cell (one measured training run): checks before and after the Cell's measurements."""
