"""TensorRT engines out of graphs."""
