"""Turn measurements into pages, figures, and the blocks of README and documentation."""
