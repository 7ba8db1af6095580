"""The version, in a file of its own: what names it in a file or an answer imports no more than this."""

__version__ = "0.9.0"
