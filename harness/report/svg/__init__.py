"""SVG charts as geometry: scales, marks, labels that do not overlap."""
