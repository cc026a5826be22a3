"""Renderers of a comparison: for the terminal, Markdown, JUnit, GitHub annotations and JSON."""
