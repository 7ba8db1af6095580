"""Exported files, the server under load, and the drift monitor, measured."""
