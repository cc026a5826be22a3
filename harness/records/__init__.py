"""Records: what a run leaves on disk, as typed models with JSON Schemas. Imports no torch."""
