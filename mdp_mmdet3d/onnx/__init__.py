"""Making and changing ONNX graphs: export, lint, precision, padding, counts. Needs the onnx package."""
