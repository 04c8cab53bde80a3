"""What runs stages and language models; `table.py` lists it."""
