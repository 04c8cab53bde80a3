"""Operations that have a kernel of their own on a GPU, each with its PyTorch reference in the same file."""
