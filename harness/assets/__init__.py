"""Models and data. One table declares them; each is fetched once, verified and cached."""
