"""The version of the package, in a module of its own so that every part may import it without a cycle."""

__version__ = "0.1.0"
