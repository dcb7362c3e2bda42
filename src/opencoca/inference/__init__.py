"""Loading a model by name, and using it on images and texts of any kind."""
