"""Scoring many images on this machine or a Ray cluster, in parts."""
