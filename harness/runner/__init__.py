"""Running Cells: one fresh process each; whatever dies, what was finished stays."""
