"""The speed cases: one function each, registered by `bench.registry.case`, with their peers."""
