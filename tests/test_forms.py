"""Forms that run without our classes: each draws the same image of a seed, and what is not exact is never written."""

import base64
import contextlib
import copy
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import make_run
from launching import BIN
from PIL import Image

from repa_scale import cli
from repa_scale.config import SampleConfig
from repa_scale.errors import UserError
from repa_scale.export import Options, standalone, step, torch_export
from repa_scale.export import mlflow as mlflow_form
from repa_scale.export import onnx as onnx_form
from repa_scale.latents import build_latents
from repa_scale.sampling import sample_numbered
from repa_scale.sizes import latent_grid
from repa_scale.trained import open_source

STEPS, GUIDANCE, INTERVAL, SEEDS, LABELS = 10, 1.8, (0.0, 0.7), (0, 1, 5), (3, 7, 1)
LATENT_BOUND = 2e-5  # of latents about 1 in size, over 10 steps
TRAINING = ("deepspeed", "diffusers", "timm", "hydra", "omegaconf", "streaming", "nvidia", "safetensors", "triton")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    make_run(folder, ("data.image_size=8", f"sample.steps={STEPS}"))
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Folders by form, each made when a test first asks for it."""
    folder, made = tmp_path_factory.mktemp("forms"), {}

    def get(form, *words):
        if form not in made:
            made[form] = folder / form
            assert cli.main(["export", str(trained), "--to", form, "--out", str(made[form]), *words]) == 0
        return made[form]

    return get


@pytest.fixture(scope="module")
def drawn(trained):
    """The trainer's own latents and pixels of SEEDS and LABELS: (N, C, H, W) float64, (N, S, S, 3) uint8."""
    source = open_source(trained)
    model, config = source.build(), source.config
    settings = SampleConfig(sampler="euler", steps=STEPS, guidance=GUIDANCE, interval=list(INTERVAL))
    latents = torch.cat(
        [
            sample_numbered(
                lambda x, t, y: model(x, t, y)[0],
                torch.zeros(1, dtype=torch.int64),
                torch.tensor([label]),
                config.model.num_classes,
                latent_grid(config.data.image_size, config.latents.name),
                seed,
                settings,
                config.interpolant.path,
            )
            for seed, label in zip(SEEDS, LABELS, strict=True)
        ]
    )
    return latents, build_latents(config, "cpu", torch.float32).decode(latents).permute(0, 2, 3, 1).numpy()


def draw(run):
    """Latents of SEEDS and LABELS by a guided step, as the script beside the programs draws them."""
    from repa_scale import rng

    first = torch.zeros(1, dtype=torch.int64)
    noise = torch.cat([rng.normal(seed, "sample noise", 0, first, (1, 8, 8)) for seed in SEEDS])
    return standalone.sample(run, noise, torch.tensor(LABELS), STEPS, torch.full((3,), GUIDANCE), INTERVAL)


def pixels(decode, latents):
    images = ((decode(latents.float()) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy().astype(int)


def png(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def refused(capsys, *words):
    code = cli.main([str(word) for word in words])
    errors = capsys.readouterr().err
    assert code == 64 and len(errors.splitlines()) == 1, errors
    return errors


def test_the_guided_step_is_the_samplers(trained, drawn):
    """And guidance is each image's own: a batch of several gives what each of them alone gives."""
    source = open_source(trained)
    guided = step.build_step(source, Options())
    assert float((draw(guided) - drawn[0]).abs().max()) < LATENT_BOUND
    assert float((drawn[0] - drawn[0][:1]).abs().max()) > 0.1
    x, t, labels, scale = step.step_inputs(source.config, 6, 2)
    together = guided(x, t, labels, scale)
    model = source.build()
    for i, s in enumerate(scale.tolist()):
        row = slice(i, i + 1)
        want = model(x[row], t[row], labels[row])[0]
        if s > 1:
            null = model(x[row], t[row], torch.tensor([model.num_classes]))[0]
            want = null + s * (want - null)
        assert torch.allclose(together[row], want, atol=2e-6), (i, s)
    assert {bool(s > 1) for s in scale} == {True, False}


def test_the_same_seed_gives_the_same_image_in_every_form(exported, drawn):
    import mlflow

    programs = exported("mlflow") / "artifacts" / "programs"
    onnx = exported("onnx")
    forms = {
        "torch.export": (torch_export.load(programs / "denoiser.pt2"), torch_export.load(programs / "decoder.pt2")),
        "onnx": (onnx_form.load(onnx / "denoiser.onnx"), onnx_form.load(onnx / "decoder.onnx")),
    }
    table = {}
    for name, (run, decode) in forms.items():
        latents = draw(run)
        table[name] = float((latents - drawn[0]).abs().max()), int(np.abs(pixels(decode, latents) - drawn[1]).max())
    rows = {"class_label": list(LABELS), "seed": list(SEEDS), "steps": [STEPS] * 3, "guidance": [GUIDANCE] * 3}
    import pandas as pd

    answer = mlflow.pyfunc.load_model(str(exported("mlflow"))).predict(
        pd.DataFrame(rows), params={"interval": list(INTERVAL)}
    )
    images = np.stack([png(text) for text in answer["png_base64"]])
    table["mlflow"] = float("nan"), int(np.abs(images - drawn[1]).max())
    print("\nform: largest error of latents, of 8-bit images")
    for name, (latent, pixel) in table.items():
        print(f"{name}: {latent:.2g}, {pixel}")
    assert all(not latent > LATENT_BOUND and pixel <= 1 for latent, pixel in table.values()), table


@pytest.mark.parametrize("form", ["mlflow", "onnx"])
def test_the_manifest_tells_the_error_and_nothing_tells_of_the_exporters_machine(form, exported, trained):
    folder = exported(form)
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    assert 0 <= facts["max_error"] <= facts["bound"] == 5e-5
    assert len(facts["checks"]) == 2 and facts["latent_shape"] == [1, 8, 8]
    if form == "onnx":
        assert facts["opset"] >= 18 and facts["checks"]["denoiser.onnx"]["max_error"] > 0
    private = re.compile(str(trained.parent).encode() + b"|" + os.path.dirname(step.__file__).encode())
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert not private.search(file.read_bytes()), file
        assert file.suffix not in (".pkl", ".pickle", ".pyc"), file
        if file.suffix == ".pt2":
            with zipfile.ZipFile(file) as archive:
                assert not any(archive.read(name) for name in archive.namelist() if name.endswith((".pt", ".pkl")))


@pytest.mark.parametrize("form", ["torch-export", "onnx", "mlflow"])
def test_a_program_that_differs_is_not_written(form, trained, tmp_path, monkeypatch, capsys):
    """The weights are changed between the reference and the program, by a hundredth of one layer."""
    room = {"torch-export": torch_export, "onnx": onnx_form, "mlflow": torch_export}[form]

    def traces_another(guided, config):
        other = copy.deepcopy(guided)
        with torch.no_grad():
            other.model.final_layer.linear.weight.mul_(1.01)
        return step.trace_step(other, config)

    class Short(step.GuidedStep):  # without the branches, which take the time
        def forward(self, x, t, labels, guidance):
            return self._guided(x, t, labels, guidance)

    monkeypatch.setattr(room, "trace_step", traces_another)
    for module in (torch_export, onnx_form, mlflow_form):
        monkeypatch.setattr(module, "build_step", lambda source, options: Short(source.build()).eval())
    errors = refused(capsys, "export", trained, "--to", form, "--out", tmp_path / "out")
    assert "differs from PyTorch by 0.0" in errors and "5e-05 is the bound" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_gives_nan_is_refused(trained):
    source = open_source(trained)
    guided = step.build_step(source, Options())
    with pytest.raises(UserError, match="differs from PyTorch by nan"):
        step.check_step("broken", lambda *inputs: guided(*inputs) * float("nan"), guided, Options(), source.config)


def test_what_cannot_be_exported_is_said_first(trained, tmp_path, monkeypatch, capsys):
    words = ("export", trained, "--out", tmp_path / "out", "--to")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler no-such-compiler" in refused(capsys, *words, "torch-export")
    assert "bf16" in refused(capsys, *words, "onnx", "--dtype", "bf16")
    assert "--to mlflow" in refused(capsys, *words, "onnx", "--register", "name")
    assert "--register" in refused(capsys, *words, "mlflow", "--alias", "champion")
    assert list(tmp_path.iterdir()) == []


def test_the_mlflow_model_brings_its_code_and_asks_for_no_training_package(exported):
    folder = exported("mlflow")
    asked = {re.split("[=<>]", line)[0] for line in (folder / "requirements.txt").read_text().split()}
    assert asked == {"mlflow", "numpy", "pillow", "torch"}
    assert all("==" in line for line in (folder / "requirements.txt").read_text().split())
    code = f"""
import sys
for name in {TRAINING}:
    sys.modules[name] = None  # an import of it fails
import mlflow
model = mlflow.pyfunc.load_model({str(folder)!r})
answer = model.predict({{"class_label": [3]}})
import repa_scale
assert repa_scale.__file__.startswith({str(folder)!r}), repa_scale.__file__
assert len(answer["png_base64"][0]) > 50
for bad in ({{"class_label": [99]}}, {{"class_label": [3], "steps": [0]}}, {{"class_label": [3], "guidance": [-1.0]}}):
    try:
        model.predict(bad)
    except mlflow.exceptions.MlflowException as error:
        print(error.message)
    else:
        raise SystemExit(f"taken: {{bad}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "class_label=99 must be 0 to 9, or 10 for none" in done.stdout and "steps=0" in done.stdout


def isolated(folder, *words):
    """The script of a form, in a Python that cannot import this package."""
    code = "import sys, runpy; sys.modules['repa_scale'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "sample.py", *map(str, words)], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_programs_run_without_this_package(exported, drawn, tmp_path):
    """sample.py beside them, for torch.export, AOTInductor and ONNX: the trainer's latents and picture."""
    for form, program in (("torch-export", "torch"), ("torch-export", "aoti"), ("onnx", "onnx")):
        words = ["--label", LABELS[2], "--seed", SEEDS[2], "--steps", STEPS, "--guidance", GUIDANCE]
        words += ["--interval", *INTERVAL, "--program", program]
        for end in ("pt", "png"):
            code, said = isolated(exported(form), *words, "--out", tmp_path / f"{program}.{end}")
            assert code == 0, said
        error = float((torch.load(tmp_path / f"{program}.pt") - drawn[0][2:]).abs().max())
        image = np.asarray(Image.open(tmp_path / f"{program}.png")).astype(int)
        print(f"{program}: {error:.2g}, {np.abs(image - drawn[1][2]).max()}")
        assert error < LATENT_BOUND and np.abs(image - drawn[1][2]).max() <= 1
    facts = json.loads((exported("torch-export") / "manifest.json").read_text())["facts"]
    assert facts["checks"]["denoiser.aoti.pt2"]["max_error"] <= 5e-5 and facts["cpu"]
    assert isolated(exported("onnx"), "--label", 99)[0] == 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_registered_model_answers_over_http(trained, drawn, tmp_path):
    """Registered with metrics, tags and alias; then `mlflow models serve -m models:/NAME@ALIAS`, asked well and ill."""
    import mlflow

    from repa_scale import evaluations

    evaluations.append(trained, evaluations.Evaluation(12, 1, 0.0, "fid", 7.5, 100))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["--register", "repa-digits", "--alias", "champion", "--uri", uri]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "repa_scale", "export", trained, "--to", "mlflow", "--out", tmp_path / "model"]
    done = subprocess.run([*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "models:/repa-digits@champion" in done.stdout, done.stderr[-2000:]
    client = mlflow.MlflowClient(tracking_uri=uri)
    version = client.get_model_version_by_alias("repa-digits", "champion")
    assert version.tags["step"] == "12" and version.tags["eval/fid_n100"] == "7.5"
    assert client.get_run(version.run_id).data.metrics["eval/fid_n100"] == 7.5
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = ["mlflow", "models", "serve", "-m", "models:/repa-digits@champion", "--env-manager", "local"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*serve, "--port", str(port)], env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/ping", server, tmp_path / "server.log")
        row = {"class_label": LABELS[1], "seed": SEEDS[1], "steps": STEPS, "guidance": GUIDANCE}
        asked = {"dataframe_records": [row, row], "params": {"interval": list(INTERVAL)}}
        code, answer = _ask(port, asked)
        assert code == 200, answer
        for record in json.loads(answer)["predictions"]:
            assert np.abs(png(record["png_base64"]) - drawn[1][1]).max() <= 1
        for bad in ({"class_label": 99}, {"class_label": 1, "steps": 0}, {"class_label": "cat"}, {"seed": 1}):
            code, answer = _ask(port, {"dataframe_records": [bad]})
            assert code == 400, (bad, code, answer)
        code, answer = _ask(port, asked)
        assert code == 200
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


def _wait(url, server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"{url} did not answer: {log.read_text()[-3000:]}")


def _ask(port, content):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
