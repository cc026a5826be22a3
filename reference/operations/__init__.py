"""Reference implementations of Operations: quantisers, 8-bit states, paging, several adapters."""
