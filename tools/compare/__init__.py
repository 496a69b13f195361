"""`longhaul compare`: runs and checkpoints held against the first of them."""
