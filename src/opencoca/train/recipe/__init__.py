"""What a training run is: recipe files and their keys."""
