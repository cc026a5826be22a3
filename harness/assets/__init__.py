"""Models and data sets. One table declares them. Each is fetched once, verified and cached."""
