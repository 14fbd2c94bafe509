"""asynctrain.optim."""
