"""Weights and tokenizers on disk or inside packages: read lazily, never executed as code."""
