"""What is measured: one function a case, registered by `bench.registry.case`, one file a table, the peers beside it."""
