"""Block-Attention fine-tuning (Ma, Wang, Lan, ICLR 2025): prepare, train, export, generate, eval, bench."""

__version__ = "0.1.0"
