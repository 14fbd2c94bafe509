"""asynctrain.train."""
