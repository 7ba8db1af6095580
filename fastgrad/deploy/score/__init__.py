"""Scoring many images: the job and its parts, on this machine or on a Ray cluster."""
