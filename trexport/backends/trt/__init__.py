"""What TensorRT and TensorRT-RTX share: every function takes the module, for the two have the same classes."""
