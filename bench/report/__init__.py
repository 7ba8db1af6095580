"""From measurements to what is read: pages, figures, and the blocks of README and documentation."""
