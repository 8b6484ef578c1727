"""Names the module whose globals become importable from ``metaflow``."""

toplevel = "module"
