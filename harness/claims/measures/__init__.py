"""What a claim can be about: every function here that is marked `@measure`, by its name. Nothing else lists them."""
