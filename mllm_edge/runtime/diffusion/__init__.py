"""Diffusion as data: a schedule is a table, guidance a chain."""
