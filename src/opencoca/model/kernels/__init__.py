"""Faster ways to compute attention and products."""
