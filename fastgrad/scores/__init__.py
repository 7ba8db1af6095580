"""One-class scores as traceable modules, and what they mean as conformal p-values."""
