"""Named pictures from ordinary packages, for the recipe `llava-smol`."""
