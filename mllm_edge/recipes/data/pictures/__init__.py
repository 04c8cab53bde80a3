"""Pictures with names out of ordinary packages, for the recipe `llava-smol`."""
