"""What runs on the vehicle, without torch and onnx. Importing this package imports nothing."""
