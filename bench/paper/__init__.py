"""The evaluation tables: one command per table, see README.md."""
