"""The package as a whole: quick to import, who imports whom, and what is said when an extra is missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repa_scale

PACKAGE = Path(repa_scale.__file__).parent
ROOT = PACKAGE.parent
HEAVY = {
    "deepspeed",
    "mlflow",
    "streaming",
    "diffusers",
    "timm",
    "hydra",
    "omegaconf",
    "sklearn",
    "plotly",
    "nvidia",
    "triton",
}
# room -> what it may not import, directly or through its own rooms
FORBIDDEN = {
    "config": {"torch", "omegaconf", "hydra"},
    "sizes": {"torch"},
    "validation": {"torch"},
    "identity": {"torch"},
    "cuda": {"repa_scale.ranks", "repa_scale.data", "repa_scale.engine", "deepspeed", "nvidia"},
    "rng": {"repa_scale.trainer", "deepspeed"},
    "kernels": {"repa_scale.models", "repa_scale.objective", "deepspeed"},
    "interpolant": {"repa_scale.models", "repa_scale.alignment"},
    "metrics": {"repa_scale.models", "repa_scale.data", "repa_scale.extractors", "repa_scale.evaluate", "scipy"},
    "statistics_file": {"repa_scale.engine", "repa_scale.data", "repa_scale.extractors", "repa_scale.evaluate"},
    "extractors": {"repa_scale.engine", "repa_scale.data", "repa_scale.evaluate", "deepspeed", "hydra", "mlflow"},
    "models": {"repa_scale.engine", "repa_scale.data", "deepspeed", "hydra", "mlflow"},
    "encoders": {"repa_scale.engine", "repa_scale.data", "deepspeed", "hydra", "mlflow"},
    "latents": {"repa_scale.engine", "repa_scale.data", "deepspeed", "hydra", "mlflow"},
    "objective": {"repa_scale.engine", "repa_scale.data", "deepspeed"},
    "engine": {"streaming", "mlflow", "hydra", "repa_scale.data", "repa_scale.tracking"},
    "checkpoint": {"streaming", "mlflow", "hydra", "deepspeed", "repa_scale.engine"},
    "ema": {"streaming", "mlflow", "hydra", "deepspeed"},
    **{
        verb: {"repa_scale.trainer", "repa_scale.engine", "deepspeed"}
        for verb in (
            "prepare",
            "sample",
            "evaluate",
            "export",
            "serving",
            "compare",
            "trained",
            "checkpoints",
            "supervise",
            "plan",
            "doctor",
        )
    },
}
# These hold Triton functions, which need it when they are defined; kernels/__init__.py imports them when one is chosen.
TRITON_FILES = {ROOT / "kernels" / f"{name}.py" for name in ("cosine", "projector", "tokens")}
# These define classes of diffusers; serving/__init__.py imports them when one is used.
SERVING_FILES = {PACKAGE / "serving" / f"{name}.py" for name in ("transformer", "scheduler", "pipeline")}


def imports(path):
    """Names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files_of(room):
    folder = ROOT / "kernels" if room == "kernels" else PACKAGE / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def reach(room):
    """Everything that a room imports, its own rooms followed."""
    seen, todo = set(), [file for file in files_of(room)]
    done = set()
    while todo:
        file = todo.pop()
        if file in done or not file.exists():
            continue
        done.add(file)
        for name in imports(file):
            seen.add(name)
            if name.startswith("repa_scale."):
                parts = name.split(".")[1:]
                base = ROOT / "kernels" if parts[0] == "kernels" else PACKAGE / parts[0]
                rest = parts[1:]
                todo += [base.with_suffix(".py"), base / "__init__.py", *([base / f"{rest[0]}.py"] if rest else [])]
    return seen


@pytest.mark.parametrize("room", FORBIDDEN)
def test_nothing_points_upwards(room):
    found = reach(room)
    bad = {name for name in found for wrong in FORBIDDEN[room] if name == wrong or name.startswith(f"{wrong}.")}
    assert not bad


@pytest.mark.parametrize(
    "file", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]), ids=lambda f: f.stem
)
def test_heavy_packages_are_imported_where_they_are_used(file):
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            heavy = HEAVY - ({"triton"} if file in TRITON_FILES else {"diffusers"} if file in SERVING_FILES else set())
            heavy -= {"mlflow"} if file.name == "mlflow_model.py" else set()  # run by MLflow where the model is loaded
            assert not heavy & {name.split(".")[0] for name in names}, file


@pytest.mark.parametrize("module", ["guard", "rank"])
def test_what_watches_over_ranks_is_light(module):
    """They run on every node beside the training: nothing but the standard library, and at once."""
    script = (
        f"import sys, repa_scale.launch.{module}\n"
        "foreign = {name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'omegaconf', 'deepspeed'}\n"
        "assert not foreign, foreign"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_kernels_know_torch_and_triton_alone():
    foreign = {name.split(".")[0] for file in files_of("kernels") for name in imports(file)} - sys.stdlib_module_names
    assert foreign == {"torch", "triton", "repa_scale"}
    ours = {name for file in files_of("kernels") for name in imports(file) if name.startswith("repa_scale")}
    assert all(name.startswith("repa_scale.kernels") for name in ours), ours


def test_importing_is_quick_and_needs_torch_alone():
    script = (
        "import sys, time; began = time.perf_counter(); import repa_scale\n"
        "seconds = time.perf_counter() - began; import repa_scale.kernels\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "assert seconds < 2.0, seconds\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_deepspeed_brings_neither_mlflow_nor_the_compiler():
    """Neither is needed by a rank, and each costs seconds at every start."""
    script = (
        "import sys; from repa_scale import engine; engine.import_deepspeed('cpu')\n"
        "import deepspeed.runtime.zero.muon.muon_optimizer\n"
        "loaded = {'mlflow', 'torch._inductor'} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("mlflow", ["compare", "--uri", "sqlite:///x.db"], "pip install 'repa-scale[track]'"),
        ("streaming", ["prepare", "digits", "--out", "out", "--size", "8"], "pip install 'repa-scale[data]'"),
        ("fastapi", ["serve", "exports/none"], "pip install 'repa-scale[serve]'"),
        ("hydra", ["train", "experiment=demo_repa"], "pip install 'repa-scale[train]'"),
    ],
)
def test_a_missing_extra_is_one_line(tmp_path, module, words, line):
    """The package is really not to be found: a finder in front says so."""
    blocker = (
        "import sys\nfrom importlib.machinery import PathFinder\n"
        "class Gone:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {module!r}:\n"
        f"            raise ModuleNotFoundError('No module named {module}', name={module!r})\n"
        "sys.meta_path.insert(0, Gone)\n"
        f"from repa_scale.cli import main\nsys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 64 and line in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_wheel_would_hold_every_package():
    """Every folder with Python files is listed in pyproject.toml."""
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {PACKAGE, ROOT / "kernels", ROOT / "configs", ROOT / "launchers"}
    for top in list(folders):
        folders |= {path.parent for path in top.rglob("__init__.py")}
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        name = ".".join(parts if parts[0] == "repa_scale" else ("repa_scale", *parts))
        assert f'"{name}"' in listed, name
