"""Inference over cached blocks: the engine, its two attention paths, and the three tiers of the cache."""
