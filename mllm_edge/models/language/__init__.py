"""The language models that systems are built on: dims with their counts, the module, its reference."""
