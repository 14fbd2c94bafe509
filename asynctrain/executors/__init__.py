"""asynctrain.executors."""
