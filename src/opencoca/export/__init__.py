"""Writes a model in a form that other runtimes read."""
