"""Weights and tokenizers as they lie on disk or inside packages: read lazily, and never run as code."""
