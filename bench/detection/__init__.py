"""The detection tables: one runner over a registry of networks, methods and cases."""
