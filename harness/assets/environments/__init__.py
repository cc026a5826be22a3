"""Python environments for libraries that cannot share one: declared, made, cached, repaired, removed. Imports no torch."""
