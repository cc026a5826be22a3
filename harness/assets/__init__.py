"""Models and data: declared in one table, fetched once, verified, kept in a cache."""
