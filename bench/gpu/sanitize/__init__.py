"""What a GPU could still surprise with, checked in Triton's interpreter: addresses, races, order, offsets."""
