"""``fastgrad demo``: from real digits to a detector, a table and a figure, in under two minutes on two CPU cores."""
