"""Running a network so that its squared gradient norms leave the backward pass."""
