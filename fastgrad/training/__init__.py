"""Per-sample norms where training happens: private training, the noise of a gradient, an audit of the data."""
