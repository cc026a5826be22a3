"""Reports: HTML pages, terminal tables, JUnit files, exports. They import no torch and need no network."""
