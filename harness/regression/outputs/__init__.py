"""Renderers of a comparison: terminal, Markdown, JUnit, GitHub annotations, JSON."""
