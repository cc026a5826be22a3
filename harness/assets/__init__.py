"""Models and data. One table declares them. Each of them is fetched once, verified and cached."""
