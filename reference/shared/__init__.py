"""Code that several reference Methods share: replacement of layers, results of `attach`, and initial values."""
