"""What a recipe may train, a file a task."""
