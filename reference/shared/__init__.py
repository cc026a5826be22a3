"""Code that several reference Methods share: layer replacement, the Adapted protocol, starts."""
