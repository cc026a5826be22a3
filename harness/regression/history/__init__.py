"""History of nightly runs as small files in a repository, and detection of changes between nights. It imports no torch."""
