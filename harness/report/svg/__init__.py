"""SVG charts as geometry: scales, marks, and labels that do not overlap."""
