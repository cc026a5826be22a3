"""Read and validate suites (YAML files) and the tasks that they name, and expand suites into Cells."""
