"""The package's version, which setuptools reads too."""

__version__ = "0.1.0"
