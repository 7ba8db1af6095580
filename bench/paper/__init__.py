"""The evaluation tables, see README.md."""
