"""Suites: YAML files read, validated and expanded into Cells; and the tasks they name."""
