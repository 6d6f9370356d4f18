"""Forms that run without our classes: each draws the same image of a seed, and what is not exact is never written."""

import base64
import contextlib
import copy
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_run
from launching import BIN
from PIL import Image
from serving import save_kl_vae

from repa_scale import arithmetic, cli
from repa_scale.config import SampleConfig
from repa_scale.errors import DataError, UserError
from repa_scale.export import Options, standalone, step, torch_export
from repa_scale.export import mlflow as mlflow_form
from repa_scale.export import onnx as onnx_form
from repa_scale.latents import build_latents
from repa_scale.sampling import sample_numbered
from repa_scale.sealed import read_sealed
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

    monkeypatch.setattr(room, "trace_step", traces_another)
    for module in (torch_export, onnx_form, mlflow_form):
        monkeypatch.setattr(module, "build_step", lambda source, options: Short(source.build()).eval())
    errors = refused(capsys, "export", trained, "--to", form, "--out", tmp_path / "out")
    assert "differs from PyTorch by 0.0" in errors and "5e-05 is the bound" in errors
    assert list(tmp_path.iterdir()) == []


class Short(step.GuidedStep):
    """The guided step without its branches, which take the time of a trace."""

    def forward(self, x, t, labels, guidance):
        return self._guided(x, t, labels, guidance)


def nodes(program):
    for graph in program.graph_module.modules():
        yield from graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_program_moves_to_another_device_by_to(trained, dtype):
    """Nothing in it names the exporter's device: no constant, no assertion. `meta` stands for the other device."""
    source = open_source(trained)
    guided = step.build_step(source, Options(dtype=dtype))
    assert set(guided.state_dict()) == {f"model.{name}" for name in source.build().state_dict()}
    program = step.trace_step(Short(guided.model).eval(), source.config)
    baked = [node.format_node() for node in nodes(program) if "device(type" in str((node.args, node.kwargs))]
    assert baked == []
    inputs = [value.to("meta") for value in step.step_inputs(source.config, 5, 1)]
    assert program.module().to("meta")(*inputs).shape == (5, 1, 8, 8)


def test_a_decoder_moves_to_another_device_by_to(of_latents):
    decoder = step.build_decoder(trainers(of_latents)[2], Options())
    program = step.trace_decoder(decoder, trainers(of_latents)[2].config)
    assert [node.format_node() for node in nodes(program) if "device(type" in str((node.args, node.kwargs))] == []


@pytest.fixture(scope="module")
def portable(trained, tmp_path_factory):
    """denoiser.pt2 and decoder.pt2, their facts, and the step."""
    folder, source = tmp_path_factory.mktemp("portable"), open_source(trained)
    short = Short(step.build_step(source, Options()).model)
    return folder, torch_export.write_programs(source, folder, Options(), short), short


@pytest.fixture
def pretend_gpu(portable, monkeypatch):
    """write() of torch-export on a machine with a GPU, as far as a CPU can tell; called with what runs there."""
    folder, facts, short = portable

    def copies(source, out, options, guided):
        shutil.copytree(folder, out, dirs_exist_ok=True)
        return copy.deepcopy(facts)

    def start(of_cuda):
        def compiles(program, file, device):
            file.write_bytes(b"compiled")
            run = program.module()
            return run if device == "cpu" else of_cuda(run)

        monkeypatch.setattr(torch_export, "_compile", compiles)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch_export, "build_step", lambda source, options: short)
    monkeypatch.setattr(torch_export, "write_programs", copies)
    with arithmetic.within("tf32"):
        yield start


def test_the_package_for_a_gpu_is_compared_in_float32(trained, tmp_path, pretend_gpu):
    """A GPU's convolutions are TF32 unless torch is told otherwise, and TF32 is far beyond the bound."""

    def tf32(run):
        def wrapped(x, *others):
            if torch.backends.cudnn.allow_tf32:  # 10 bits of mantissa, as a convolution would take its input
                x = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
            return run(x, *others)

        return wrapped

    pretend_gpu(tf32)
    assert torch.backends.cudnn.allow_tf32
    facts = torch_export.write(open_source(trained), tmp_path, Options())
    assert facts["checks"]["denoiser.cuda.aoti.pt2"]["max_error"] <= 5e-5 and facts["gpu"] == "sm_90"
    assert "left_out" not in facts and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("fault", ["compiler", "memory", "error"])
def test_a_package_for_a_gpu_that_fails_leaves_the_others(fault, trained, tmp_path, pretend_gpu, capsys):
    def broken(run):
        if fault == "compiler":
            raise UserError("--to torch-export: AOTInductor failed for cuda: no nvcc")

        def wrapped(*inputs):
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
            return 1.01 * run(*inputs)

        return wrapped

    pretend_gpu(broken)
    facts = torch_export.write(open_source(trained), tmp_path, Options())
    said = capsys.readouterr().err.splitlines()
    part = {"compiler": "no nvcc", "memory": "out of memory", "error": "differs from PyTorch by 0.0"}[fault]
    assert len(said) == 1 and part in said[0] and "denoiser.cuda.aoti.pt2 is left out" in said[0]
    assert part in facts["left_out"]["denoiser.cuda.aoti.pt2"] and "gpu" not in facts
    assert {path.name for path in tmp_path.iterdir()} == {
        "denoiser.pt2", "decoder.pt2", "denoiser.aoti.pt2", "sample.py", "rng.py"
    }  # fmt: skip


class Session:
    """onnxruntime's, which falls back to the CPU by itself where CUDA does not start."""

    def __init__(self, file, providers):
        Session.asked = providers
        self.found = Session.starts

    def get_providers(self):
        return self.found

    def get_inputs(self):
        return []


def test_the_script_takes_the_program_of_its_device(tmp_path, monkeypatch):
    import onnxruntime

    opened = []

    class Program:
        def module(self):
            return self

        def to(self, device):
            opened.append(str(device))
            return self

    monkeypatch.setattr(torch.export, "load", lambda file: Program())
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file, **more: (Path(file).name, more))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("denoiser.aoti.pt2", "denoiser.cuda.aoti.pt2"):
        (tmp_path / name).touch()

    def refused(words, *args):
        with pytest.raises(standalone.Unusable, match=words) as found:
            standalone.open_programs(tmp_path, *args)
        assert "\n" not in str(found.value)

    refused("finds no such GPU; use --device cpu", "torch", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert standalone.open_programs(tmp_path, "aoti", "cpu")[0] == ("denoiser.aoti.pt2", {})
    with arithmetic.within("tf32"):
        step_, _ = standalone.open_programs(tmp_path, "aoti", "cuda:1", {"gpu": "sm_90"})
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert step_ == ("denoiser.cuda.aoti.pt2", {"device_index": 1})
    standalone.open_programs(tmp_path, "torch", "cuda:1")
    assert opened == ["cpu", "cuda:1", "cuda:1", "cuda:1"]
    refused("compiled for sm_80, and cuda is sm_90", "aoti", "cuda", {"gpu": "sm_80"})
    (tmp_path / "denoiser.cuda.aoti.pt2").unlink()
    refused("had no GPU", "aoti", "cuda", {})
    refused("no nvcc", "aoti", "cuda", {"left_out": {"denoiser.cuda.aoti.pt2": "no nvcc"}})
    refused("is no device", "torch", "gpu")
    refused("run on cpu and cuda", "torch", "meta")

    refused("is a build for the CPU", "onnx", "cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    Session.starts = ["CPUExecutionProvider"]
    refused("cannot start CUDA", "onnx", "cuda:1")
    Session.starts = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    standalone.open_programs(tmp_path, "onnx", "cuda:1")
    assert Session.asked[0] == ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0"})


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
bad = [{{"class_label": [3], "steps": [steps]}} for steps in (0, 10**9)]
bad += [{{"class_label": [3], "guidance": [guidance]}} for guidance in (-1.0, float("nan"))]
for bad in ({{"class_label": [99]}}, *bad, {{"class_label": [3] * 257}}):
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
    assert "guidance=nan" in done.stdout and "257 rows; 1 to 256 are allowed" in done.stdout


def isolated(folder, *words):
    """The script of a form, in a Python that cannot import this package."""
    code = "import sys, runpy; sys.modules['repa_scale'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "sample.py", *map(str, words)], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    """A folder: a run in the latents of a KL-VAE, that VAE, and the export to ONNX with its weights beside it."""
    folder = tmp_path_factory.mktemp("latents")
    make_run(folder / "run", ("latents.name=sd-vae-ft-mse", "data.image_size=64", f"sample.steps={STEPS}"))
    save_kl_vae(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_form, "ONE_FILE_BYTES", 50_000)
        words = ["export", folder / "run", "--to", "onnx", "--vae", folder / "vae", "--out", folder / "first"]
        assert cli.main([str(word) for word in words]) == 0
    (folder / "first").rename(folder / "onnx")  # it may be moved: the graphs name their data by its name alone
    return folder


def trainers(folder):
    """The step, the latent space and the source of the run, as the trainer has them."""
    source = open_source(folder / "run")
    source.config.latents.weights = str(folder / "vae")
    return step.build_step(source, Options()), build_latents(source.config, "cpu", torch.float32), source


@pytest.mark.timeout(900)  # the export to ONNX is a matter of seconds, but not on a machine with much else to do
def test_a_kl_vae_decodes_in_a_program_as_in_the_trainer(of_latents):
    """Of any batch: diffusers' own upsampling asks whether it has 64 images."""
    _, latents, source = trainers(of_latents)
    decoder = step.build_decoder(source, Options())
    program = step.trace_decoder(decoder, source.config).module()
    graph = onnx_form.load(of_latents / "onnx" / "decoder.onnx")
    for count in (1, 3, 70):
        (z,) = step.decoder_inputs(source.config, count)
        wanted = latents.decode(z).permute(0, 2, 3, 1).numpy()
        assert wanted.std() > 5
        for name, decode in (("torch.export", program), ("onnx", graph)):
            difference = np.abs(pixels(decode, z) - wanted).max()
            print(f"{name}, {count} images: largest difference {difference} of 255")
            assert difference <= 1


@pytest.mark.timeout(900)
def test_large_weights_of_onnx_lie_beside_the_graph_and_are_found_from_anywhere(of_latents, tmp_path, monkeypatch):
    import onnx

    folder = of_latents / "onnx"
    manifest = read_sealed(folder)
    for name in ("denoiser.onnx", "decoder.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        onnx.checker.check_model(str(folder / name))
        tensors = list(initializers(model.graph))
        apart = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
        told = [{entry.key: entry.value for entry in tensor.external_data} for tensor in apart]
        assert {entry["location"] for entry in told} == {f"{name}.data"}
        size = (folder / f"{name}.data").stat().st_size
        assert manifest["files"][f"{name}.data"]["bytes"] == size
        assert size >= sum(int(entry["length"]) for entry in told) > 100_000
        assert all(len(tensor.raw_data) < 1024 for tensor in tensors if tensor not in apart), (
            "all that is large is apart"
        )
        # What decides whether data lies apart counts the main graph: nothing large may hide in a branch.
        assert len(tensors) == len(model.graph.initializer)
    guided, _, source = trainers(of_latents)
    for place in (tmp_path, Path("/"), folder):
        monkeypatch.chdir(place)
        run = onnx_form.load(Path(os.path.relpath(folder, place)) / "denoiser.onnx")
        inputs = step.step_inputs(source.config, 70, 2)
        with torch.no_grad():
            wanted = guided(*inputs)
        assert float((run(*inputs) - wanted).abs().max() / wanted.abs().max()) < 5e-5
    copy_ = tmp_path / "copy"
    shutil.copytree(folder, copy_)
    data = bytearray((copy_ / "denoiser.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy_ / "denoiser.onnx.data").write_bytes(data)
    with pytest.raises(DataError, match=r"denoiser\.onnx\.data does not have the sha256"):
        read_sealed(copy_)


def initializers(graph):
    """Those of a graph and of the branches in it."""
    import onnx

    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from initializers(attribute.g)


# Of 8-bit images against fp32's, after ten steps: the largest difference of one pixel.
NEAR = {"bf16": 12, "fp16": 3}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("onnx", "fp16"),
        pytest.param("mlflow", "bf16", marks=pytest.mark.long),
        pytest.param("mlflow", "fp16", marks=pytest.mark.long),
        pytest.param("torch-export", "bf16", marks=pytest.mark.long),
        pytest.param("torch-export", "fp16", marks=pytest.mark.long),
    ],
)
def test_a_program_of_a_narrower_type_gives_nearly_the_same_image(form, dtype, trained, drawn, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", str(trained), "--to", form, "--dtype", dtype, "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dtype"] == dtype and manifest["facts"]["max_error"] <= manifest["facts"]["bound"]
    folder = out / "artifacts" / "programs" if form == "mlflow" else out
    if form == "onnx":
        import onnx

        kinds = {t.data_type for t in onnx.load(out / "denoiser.onnx").graph.initializer if len(t.raw_data) > 1024}
        assert kinds == {onnx.TensorProto.FLOAT16}
        room, end = onnx_form, "onnx"
    else:
        program = torch.export.load(folder / "denoiser.pt2")
        kinds = {value.dtype for value in program.state_dict.values()}
        assert kinds == {Options(dtype).torch_dtype}
        room, end = torch_export, "pt2"
    latents = draw(room.load(folder / f"denoiser.{end}"))
    assert latents.dtype == torch.float64
    difference = np.abs(pixels(room.load(folder / f"decoder.{end}"), latents) - drawn[1])
    print(f"{form} {dtype}: largest difference {difference.max()} of 255, mean {difference.mean():.3f}")
    assert difference.max() <= NEAR[dtype]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["mlflow", "torch-export"])
def test_a_run_in_latents_exports_to_programs(form, of_latents, tmp_path):
    words = ["export", of_latents / "run", "--to", form, "--vae", of_latents / "vae", "--out", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 0
    _, latents, source = trainers(of_latents)
    (decoder,) = (tmp_path / "out").rglob("decoder.pt2")
    (z,) = step.decoder_inputs(source.config, 2)
    wanted = latents.decode(z).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels(torch_export.load(decoder), z) - wanted).max() <= 1


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
