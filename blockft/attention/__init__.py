"""Attention under the block mask: layouts, masks, positions, backends, and kernels over cached blocks."""
