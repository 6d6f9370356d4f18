"""Puts ds_config.json, which stands at the repository's root, into the wheel as repa_scale/configs/ds_config.json.

Everything else about the package is in pyproject.toml. An editable install copies nothing: there
repa_scale/deepspeed_config.py reads the file at the root.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = "ds_config.json"


class BuildWithDeepSpeedConfig(build_py):
    """`build_py` and one file more. A symlink in `configs/` would not survive every checkout and archive."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(SOURCE, str(self._target()))

    def get_outputs(self, include_bytecode: bool = True) -> list:
        return [*super().get_outputs(include_bytecode), str(self._target())]

    def get_source_files(self) -> list:
        return [*super().get_source_files(), SOURCE]  # so that a source archive has it

    def _target(self) -> Path:
        return Path(self.build_lib, "repa_scale", "configs", SOURCE)


setup(cmdclass={"build_py": BuildWithDeepSpeedConfig})
