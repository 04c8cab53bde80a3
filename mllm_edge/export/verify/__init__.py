"""A bundle against its PyTorch reference."""
