"""What an answer holds beside text."""
