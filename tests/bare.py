"""What a GPU machine has that nobody set up for this project, and how to be on one: by links, or by hiding the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PRESENT = (
    "torch", "torchvision", "triton", "timm", "numpy", "pillow", "safetensors", "xxhash", "rich",
    "pytest", "pytest-timeout", "pytest-xdist", "pip",
)  # fmt: skip
CARRIED = (
    "deepspeed", "einops", "hjson", "msgpack", "psutil", "pydantic",
    "diffusers", "fastapi", "uvicorn", "prometheus-client",
)  # fmt: skip
# benchmarks/gpu_wheels.sh brings these


def closure(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The distributions of `names` and of all that they require, by normalized name."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform, or not installed here
            continue
        if name != "deepspeed":  # which imports less than it requires
            for text in found[name].requires or ():
                if "extra ==" not in text:
                    todo.append(re.match(r"[\w.-]+", text)[0])
    return found


def absent() -> set[str]:
    """Top-level modules that are installed here and would not be there."""
    kept = set(closure(PRESENT + CARRIED)) | {"repa-scale"}
    owners = metadata.packages_distributions()
    normal = {module: {re.sub(r"[-_.]+", "-", name).lower() for name in names} for module, names in owners.items()}
    return {module for module, names in normal.items() if not names & kept}


def hide(modules: set[str]) -> None:
    """Make `modules` impossible to import in this process."""

    class Gone:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}", name=name.split(".")[0])

    sys.meta_path.insert(0, Gone)


def linked_environment(folder: Path) -> Path:
    """A virtual environment that holds `PRESENT` and what they require, linked from this one. Returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    for distribution in closure(PRESENT).values():
        base = Path(str(distribution.locate_file("")))
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).is_symlink() and not (site / top).exists():
                os.symlink(base / top, site / top)
    return folder / "bin" / "python"
