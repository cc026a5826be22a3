"""Random walks through the life of an adapter."""
