"""A private training step up to the noise: the sum of clipped gradients, ours and others'."""
