"""A model in the form that other runtimes read."""
