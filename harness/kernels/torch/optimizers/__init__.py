"""Optimizers: AdamW with 8-bit moments, and a wrapper that pages another optimizer's states to the host."""
