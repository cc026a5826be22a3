"""SVG charts: scales, the marks to draw, and places for names so that they do not overlap."""
