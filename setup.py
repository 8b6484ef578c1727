"""The one thing that pyproject.toml cannot say.

Metaflow ships this package with remote tasks. Where `top_level.txt` names it, Metaflow takes the list of files that pip
wrote when it was installed, with all the bytecode that pip compiled, which makes the code package twice as large.
Unnamed, it is found on the path, and bytecode is left out. Metaflow recognises extensions by the other name.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    """Names nothing but the extension in `top_level.txt`."""

    def run(self) -> None:
        super().run()
        (Path(self.egg_info) / "top_level.txt").write_text("metaflow_extensions\n")


setup(cmdclass={"egg_info": EggInfo})
