"""Training data of recipes: file readers, dialogues as ids, scenes, pictures from packages."""
