"""asynctrain.cli."""
