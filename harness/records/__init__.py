"""Records: the files of a run, as typed models with JSON Schemas. Imports no torch."""
