"""asynctrain.nn.kernels."""
