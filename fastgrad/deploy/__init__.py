"""From a fitted module to one file, a server and a cluster."""
