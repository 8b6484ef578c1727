"""Tells Metaflow that this extension adds the command group ``metaflow hf``."""

CMDS_DESC = [("hf", ".group.cli")]
