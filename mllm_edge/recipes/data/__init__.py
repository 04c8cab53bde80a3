"""What recipes train on: readers of files, dialogues as ids, scenes, pictures out of packages."""
