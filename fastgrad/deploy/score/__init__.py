"""Scoring many images: the job and its parts, on this machine, on a Ray cluster."""
