"""Optimizers: AdamW with 8-bit moments, and a wrapper that pages the states of another optimizer."""
