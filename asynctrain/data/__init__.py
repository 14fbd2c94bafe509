"""asynctrain.data."""
