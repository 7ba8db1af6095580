"""Network and detector in one file: compiled by AOTInductor, or ONNX."""
