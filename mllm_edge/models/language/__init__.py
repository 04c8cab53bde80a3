"""Language models of the systems: dims with weight counts, the module and its reference."""
