"""The package's version, read by the build and by `fourbit.__version__`."""

__version__ = "0.1.0"
