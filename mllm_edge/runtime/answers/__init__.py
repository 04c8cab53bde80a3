"""What an answer holds beside text: a function for each kind, listed in `kinds.py`."""
