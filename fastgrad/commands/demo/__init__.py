"""``fastgrad demo``: from real digits to a detector, a table and a figure, in half a minute on one CPU core."""
