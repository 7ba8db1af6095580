"""What a detector reads of an input, one file a block."""
