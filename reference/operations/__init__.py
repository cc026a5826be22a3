"""Reference implementations of Operations: quantisation, 8-bit optimizer states, paging, and batches of several adapters."""
