"""Methods: their specs, which are read from `reference/`, and the registry of implementations."""
