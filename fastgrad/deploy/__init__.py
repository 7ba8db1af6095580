"""From a fitted module to a file, a server and a cluster."""
