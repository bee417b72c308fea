"""The semantic version of lit_align."""

__version__ = "0.2.0"
