"""Adapter files: read one, judge it, and compute the logits that it defines."""
