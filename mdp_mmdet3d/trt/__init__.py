"""TensorRT: one engine builder, one CUDA wrapper. Importing this package imports nothing."""
