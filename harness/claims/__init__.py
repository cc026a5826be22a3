"""Claim ledger: numbers and properties that papers state, recomputed from models and code. Files: `suites/claims/`."""
