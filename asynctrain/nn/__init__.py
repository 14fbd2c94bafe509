"""asynctrain.nn."""
