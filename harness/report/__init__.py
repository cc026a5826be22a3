"""Show what the Records say: one HTML file, and a table for the terminal. No torch, no network."""
