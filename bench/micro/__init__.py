"""What is measured: one function a case, registered by `bench.registry.case`, peers in the same file."""
