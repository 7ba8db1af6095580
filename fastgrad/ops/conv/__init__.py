"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions."""
