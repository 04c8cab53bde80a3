"""The commands, a file for each group. Each is a short function that imports what it needs when it runs."""
