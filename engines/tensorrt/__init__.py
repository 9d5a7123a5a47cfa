"""TensorRT (10.3 to 11.x) and TensorRT-RTX over one code path: the same calls, features found by looking."""
