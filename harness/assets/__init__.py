"""Models and data: declared in one table, fetched once, verified and cached."""
