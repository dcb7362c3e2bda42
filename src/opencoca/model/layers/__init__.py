"""Layers that networks are composed of."""
