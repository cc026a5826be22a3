"""Reports: HTML pages, terminal tables, JUnit, exports. No torch, no network."""
