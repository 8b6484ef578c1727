"""The version, read by the build and by remote tasks, where no distribution metadata exists."""

__version__ = "0.1.0"
