"""Faults that only a GPU would show, looked for in Triton's interpreter: addresses, races, order, offsets."""
