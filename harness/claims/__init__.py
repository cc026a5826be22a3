"""The claim ledger: figures and properties that papers print, recomputed from models and code. Files: `suites/claims/`."""
