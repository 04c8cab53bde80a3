"""The bundle: a folder with `bundle.json`, its manifest, and the files of its parts. All that passes from export to
runtime."""
