"""Facts of this computer."""
