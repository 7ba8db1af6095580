"""Models of public packages, unmodified, under every tool for per-sample gradients: exact, wrong or refused."""
