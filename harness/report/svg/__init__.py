"""SVG charts: scales, marks to draw, and places where names do not overlap."""
