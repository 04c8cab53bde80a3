"""Operations with a dedicated GPU kernel, each with its PyTorch reference in the same file."""
