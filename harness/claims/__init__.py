"""Claim ledger: numbers and properties printed in papers, recomputed from models and code. Files: `suites/claims/`."""
