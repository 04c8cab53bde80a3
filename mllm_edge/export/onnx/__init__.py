"""Stages as ONNX graphs: lowering, fp16, int8 and token merging."""
