"""The claim ledger: what papers print, computed again from models and code, and whether it comes out. `suites/claims/`."""
