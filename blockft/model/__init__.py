"""Models: opening them, adapters, checkpoints, fingerprints, and the masked forward pass."""
