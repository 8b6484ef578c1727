"""Tells Metaflow that this extension adds the command group ``metaflow hf``.

Its commands are a package of their own, since people call them, not tasks: what Metaflow ships with each remote task stays
small.
"""

from importlib.util import find_spec

CMDS_DESC = [("hf", "metaflow_hf_cli.group.cli" if find_spec("metaflow_hf_cli") else ".absent.cli")]
