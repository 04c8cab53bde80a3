"""TensorRT and TensorRT-RTX on one CUDA stream."""
