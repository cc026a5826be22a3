"""SVG charts: axes, elements to draw, and places where names do not overlap."""
