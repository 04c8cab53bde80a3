"""Stages as ONNX graphs: lowered, in half or eight bits, with merged tokens."""
