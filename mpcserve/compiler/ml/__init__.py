"""ai.onnx.ml in standard operators; every module here is searched by `ml.rewrite`."""
