"""The verbs `gate` and `baseline`: runs that are kept to compare with, and what a comparison says. No torch."""
