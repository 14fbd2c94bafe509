"""asynctrain."""
