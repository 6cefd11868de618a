"""Models: loading, adapters, checkpoints, fingerprints, and the masked forward pass."""
