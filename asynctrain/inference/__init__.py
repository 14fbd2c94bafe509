"""asynctrain.inference."""
