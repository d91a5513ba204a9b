"""From a model to engines that a host runs.

Importing this package imports nothing: what runs on a vehicle (`stream`, `decode`, `manifest`, `preprocess`,
`validate`, `tensorrt_build`) needs numpy and one engine, making engines (`streampetr`, `precision`, `quantise`)
needs PyTorch and ONNX.
"""
