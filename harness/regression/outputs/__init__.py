"""Output formats of a comparison: terminal, Markdown, JUnit, GitHub annotations and JSON."""
