"""Run a network so that its backward pass yields squared gradient norms."""
