"""LION: two levels of visual knowledge for an encoder-decoder (Chen et al. 2024, arXiv 2311.11860)."""
