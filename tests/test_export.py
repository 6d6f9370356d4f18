"""Exports: the same weights from any number of ranks, in little memory, sealed; and nothing left where one fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_run
from safetensors.torch import load_file, save_file

from repa_scale import cli, evaluations
from repa_scale.errors import DataError
from repa_scale.evaluations import Evaluation
from repa_scale.export import FORMS, Form, Options, seal
from repa_scale.export import safetensors as safetensors_form
from repa_scale.sealed import MANIFEST, read_sealed, seal_folder
from repa_scale.trained import load_trained, open_source


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


def refused(capsys, *words):
    """The one line of a refusal."""
    code, _, errors = run(capsys, *words)
    assert code == 64 and len(errors.splitlines()) == 1 and errors.startswith("repa-scale: error: "), errors
    return errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two ranks, its configuration and its weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, *make_run(folder)


@pytest.fixture
def export(trained, tmp_path, capsys):
    assert run(capsys, "export", trained[0], "--out", tmp_path / "export")[0] == 0
    return tmp_path / "export"


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_export_is_the_same_whatever_number_of_ranks_trained(ranks, tmp_path, capsys):
    _, values = make_run(tmp_path / "run", ranks=ranks)
    for kind, ours in (("ema", "ema"), ("raw", "master")):
        assert run(capsys, "export", tmp_path / "run", "--out", tmp_path / kind, "--weights", kind)[0] == 0
        tensors = load_file(tmp_path / kind / "model.safetensors")
        wanted = {n.removeprefix("model."): v for n, v in values[ours].items() if n.startswith("model.")}
        assert set(tensors) == {*wanted, "pos_embed"}
        assert all(torch.equal(tensors[name], value) for name, value in wanted.items())


def test_projectors_come_when_they_are_asked_for(trained, tmp_path, capsys):
    assert run(capsys, "export", trained[0], "--out", tmp_path / "e", "--projectors", "--dtype", "bf16")[0] == 0
    tensors = load_file(tmp_path / "e" / "model.safetensors")
    name = "projectors.repa.2.weight"
    assert torch.equal(tensors[name], trained[2]["ema"][name].bfloat16())
    assert name not in open_source(tmp_path / "e").names() and name in open_source(tmp_path / "e").names(
        projectors=True
    )
    assert name not in load_trained(tmp_path / "e").weights


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_a_narrower_type(dtype, trained, tmp_path, capsys):
    """In every form of weights: the type, the manifest, and each value rounded once."""
    names = {"safetensors": "model.safetensors", "public": "checkpoint.pt", "diffusers-dit": "*/*.safetensors"}
    for form, name in names.items():
        out = tmp_path / form
        assert run(capsys, "export", trained[0], "--to", form, "--dtype", dtype, "--out", out)[0] == 0
        manifest = read_sealed(out)
        assert (
            manifest["dtype"] == dtype
            and f"| precision of this file | {dtype} |" in (out / "model_card.md").read_text()
        )
        (file,) = out.glob(name)
        held = torch.load(file)["ema"] if form == "public" else load_file(file)
        assert {tensor.dtype for tensor in held.values()} == {TYPES[dtype]}, form
        if form != "diffusers-dit":
            for key, value in trained[2]["ema"].items():
                if key.startswith("model."):
                    assert torch.equal(held[key.removeprefix("model.")], value.to(TYPES[dtype])), key
        else:
            assert manifest["facts"]["max_error"] <= manifest["facts"]["bound"] == 5e-3
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 0.1, 0.9, 1.0]), torch.tensor([3, 10, 0, 5])
    with torch.no_grad():
        ours = open_source(tmp_path / "safetensors").build()(x, t, labels)[0]
        exact = open_source(trained[0]).build()(x, t, labels)[0]
    error = float((ours - exact).abs().max() / exact.abs().max())
    print(f"{dtype}: the velocity differs by {error:.1e} of its largest value")
    assert 0 < error < {"bf16": 2e-2, "fp16": 2e-3}[dtype]


@pytest.mark.parametrize("form", ["safetensors", "public", "diffusers"])
def test_a_value_too_large_for_fp16_is_told(form, trained, export, tmp_path, capsys):
    """It would be written as infinity, and found by who draws from it."""
    tensors = load_file(export / "model.safetensors")
    tensors["final_layer.linear.bias"][1] = -70000.0
    save_file(tensors, export / "model.safetensors")
    seal_folder(export, {"form": "safetensors"})
    words = ("export", export, "--to", form, "--out", tmp_path / "e", "--dtype")
    line = refused(capsys, *words, "fp16")
    assert "final_layer.linear.bias holds -7e+04" in line and "use bf16 or fp32" in line
    assert not list(tmp_path.glob("e*.tmp*")) and not (tmp_path / "e").exists()
    assert run(capsys, *words, "bf16")[0] == 0


def test_large_weights_go_into_several_files(trained, tmp_path):
    source = open_source(trained[0])
    folder = tmp_path / "several"
    folder.mkdir()
    options = Options()
    hashes = safetensors_form.write_weights(source, folder, options, file_bytes=40_000)
    safetensors_form.write_config(source, folder, options)
    seal(folder, "safetensors", source, options, {"sha256": hashes})
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(files) == len(hashes) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(source.names())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for f in files for t in load_file(f).values())
    for file in files:
        assert file.stat().st_size < 42_000 or len(load_file(file)) == 1
    again = load_trained(folder)
    assert all(torch.equal(value, source.tensor(name)) for name, value in again.weights.items())
    files[1].unlink()
    with pytest.raises(DataError, match=files[1].name):
        load_trained(folder)


def test_a_source_builds_the_model(trained, export):
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([3, 10])
    with torch.no_grad():
        built = open_source(export).build()(x, t, labels)[0]
        assert torch.equal(built, load_trained(trained[0]).build()(x, t, labels)[0])
    assert built.abs().mean() > 0


def test_the_manifest_says_where_the_weights_come_from(export, tmp_path):
    manifest = read_sealed(export)
    assert manifest["form"] == "safetensors" and manifest["dtype"] == "fp32"
    told = manifest["trained"]
    assert (told["step"], told["weights"], told["git_commit"]) == (12, "ema", "c" * 40)
    assert (told["identity_hash"], told["data_fingerprint"]) == ("0123456789abcdef", "f" * 32)
    assert manifest["sampler"] == {"sampler": "euler", "steps": 2, "guidance": 2.0, "interval": [0.0, 1.0]}
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "model_card.md"}
    for file in export.iterdir():
        assert str(tmp_path.parent.parent).encode() not in file.read_bytes(), "no path of the machine travels"


def test_the_card_tells_what_was_measured_and_how(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "mlflow.json").write_text('{"uri": "sqlite:///x.db", "run_id": "abc123"}')
    protocol = {"extractor": "effnet-lite0", "sampler": "heun", "steps": 25}
    for step, value in ((6, 99.5), (12, 31.25)):
        found = Evaluation(step, 1, 0.0, "fd_effnet", value, 5000, 30.5, 32.0, protocol)
        evaluations.append(tmp_path / "run", found)
    assert run(capsys, "export", tmp_path / "run", "--out", tmp_path / "export")[0] == 0
    card = (tmp_path / "export" / "model_card.md").read_text()
    assert "| fd_effnet | 31.25 | 5000 | 30.5 to 32 | extractor effnet-lite0, sampler heun, steps 25 |" in card
    assert "99.5" not in card, "of another step"
    for part in (
        "SiT-Nano/2",
        "effnet-lite0 at depth 1",
        "Apache 2.0",
        "abc123",
        "f" * 32,
        "## Intended use",
        "No VAE",
    ):
        assert part in card


def test_a_vae_travels_by_its_name(trained, tmp_path, capsys):
    words = ("--vae", "x/sd-vae-ft-ema", "--out")
    assert "has no VAE; leave it out" in refused(capsys, "export", trained[0], *words, tmp_path / "e")
    words = ("latents.name=sd-vae-ft-mse", "data.image_size=64", "alignment.repa.weights=/home/me/encoder.pth")
    make_run(tmp_path / "run", words)
    assert run(capsys, "export", tmp_path / "run", "--vae", "x/sd-vae-ft-ema", "--out", tmp_path / "e")[0] == 0
    assert "- VAE sd-vae-ft-ema: MIT." in (tmp_path / "e" / "model_card.md").read_text()
    config = open_source(tmp_path / "e").config
    assert config.latents.weights == "x/sd-vae-ft-ema" and config.alignment["repa"].weights == "encoder.pth"


def test_class_names_travel_where_the_data_set_tells_them(tmp_path, capsys):
    make_run(tmp_path / "run")
    names = [f"class {label}" for label in range(10)]
    told = {"format_version": 1, "class_names": names, "class_counts": [1] * 10, "count": 10}
    keys = ("name", "image_size", "fingerprint", "index_sha256", "quarantined", "recipe", "source")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(told | dict.fromkeys(keys, 0)))
    fuse = tmp_path / "it_ran"
    for text, wanted in (
        (f"data: {{path: {tmp_path}/data}}", tuple(names)),
        (f"data: {{path: {tmp_path}/gone}}", ()),
        (f"data: !!python/object/apply:os.system ['touch {fuse}']", ()),
    ):
        (tmp_path / "run" / "config.yaml").write_text(text)
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        assert run(capsys, "export", tmp_path / "run", "--out", tmp_path / "e")[0] == 0
        assert open_source(tmp_path / "e").class_names == wanted
    assert not fuse.exists()


MEMORY = """
import sys, threading, time
from pathlib import Path
from repa_scale import cli

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

import repa_scale.trained, repa_scale.export, repa_scale.export.safetensors, repa_scale.export.card
before, most, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
assert cli.main(["export", sys.argv[1], "--out", sys.argv[2], "--dtype", sys.argv[3]]) == 0
done.set(); thread.join()
print("GREW", most[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_export_needs_the_memory_of_a_piece(tmp_path):
    make_run(tmp_path / "run", ("model.name=SiT-S/2",), kinds=("master", "ema"))
    command = [sys.executable, "-c", MEMORY, tmp_path / "run", tmp_path / "export", "bf16"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    grew = int(done.stdout.rpartition("GREW ")[2])
    weights = (tmp_path / "export" / "model.safetensors").stat().st_size
    assert weights > 60e6
    assert grew < 40e6, f"{grew / 1e6:.0f} MB more for {weights / 1e6:.0f} MB of weights"


def break_bytes(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["changed", "cut off", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model_card.md", MANIFEST])
def test_a_damaged_export_is_refused_by_name(name, how, export, tmp_path, capsys):
    file = export / name
    if how == "changed":
        break_bytes(file)
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.unlink()
    line = refused(capsys, "sample", export, "--out", tmp_path / "s")
    assert name in line and not (tmp_path / "s").exists()
    assert name in refused(capsys, "export", export, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("change", [{"num_classes": 10**12}, {"name": "SiT-7B/2"}, {"name": 5}, {"name": "SiT-Nano/1"}])
def test_a_configuration_of_another_model_takes_no_memory(change, export, tmp_path, capsys):
    """Also where whoever changed it made the manifest anew."""
    described = json.loads((export / "config.json").read_text())
    described["config"]["model"] |= change
    (export / "config.json").write_text(json.dumps(described))
    seal_folder(export, {"form": "safetensors"})
    assert str(export) in refused(capsys, "sample", export, "--out", tmp_path / "s", "--steps", 1, "--count", 1)


def test_a_manifest_leads_to_no_file_outside(export, tmp_path):
    from repa_scale.sealed import _own

    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret")):
        manifest = json.loads((export / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        manifest["sha256"] = _own(manifest)
        (export / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="is missing"):
            read_sealed(export)


def test_an_export_of_an_unfinished_checkpoint_is_refused(trained, tmp_path, capsys):
    unfinished = tmp_path / "run" / "checkpoints" / "step_00000012"
    shutil.copytree(trained[0] / "checkpoints" / "step_00000012", unfinished)
    (unfinished / MANIFEST).unlink()
    assert "not a complete checkpoint" in refused(capsys, "export", unfinished, "--out", tmp_path / "e")
    assert "is not a run folder with a checkpoint" in refused(
        capsys, "export", tmp_path / "run", "--out", tmp_path / "e"
    )
    temporary = unfinished.with_name("step_00000012.tmp-7")  # as a save that was killed leaves it
    unfinished.rename(temporary)
    assert "not a complete checkpoint" in refused(capsys, "export", temporary, "--out", tmp_path / "e")
    for file in temporary.iterdir():
        file.unlink()
    assert "a save that was not finished" in refused(capsys, "export", temporary, "--out", tmp_path / "e")
    assert not list(tmp_path.glob("e*"))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(trained, tmp_path, capsys):
    checkpoint = tmp_path / "step_00000012"
    shutil.copytree(trained[0] / "checkpoints" / "step_00000012", checkpoint)
    break_bytes(checkpoint / "rank_00001_of_00002.safetensors")
    assert "does not have the checksum" in refused(capsys, "export", checkpoint, "--out", tmp_path / "e")
    assert not list(tmp_path.glob("e*"))


def test_a_folder_with_something_in_it_stays_as_it_is(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        assert "not an empty folder" in refused(capsys, "export", trained[0], "--out", tmp_path / name)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert run(capsys, "export", trained[0], "--out", tmp_path / "empty")[0] == 0
    assert (tmp_path / "empty" / MANIFEST).is_file()


def test_a_form_that_fails_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "over_the_bound.py").write_text(
        "from repa_scale.errors import UserError\n"
        "def write(source, folder, options):\n"
        "    (folder / 'model.bin').write_bytes(b'x')\n"
        "    raise UserError('max_error 0.1 is over the bound 0.01; use --dtype fp32')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FORMS, "onnx", Form("over_the_bound", ""))
    line = refused(capsys, "export", trained[0], "--to", "onnx", "--out", tmp_path / "out" / "e")
    assert "over the bound" in line and not list((tmp_path / "out").iterdir())


def test_wrong_kinds_of_source(trained, export, tmp_path, capsys):
    (tmp_path / "w.pt").write_bytes(b"x")
    assert "repa-scale import" in refused(capsys, "export", tmp_path / "w.pt", "--out", tmp_path / "e")
    assert "holds the ema weights" in refused(capsys, "sample", export, "--weights", "raw", "--out", tmp_path / "s")
    code, _, errors = run(capsys, "export", trained[0], "--to", "onyx", "--out", tmp_path / "e")
    assert code == 64 and "invalid choice: 'onyx'" in errors
    assert run(capsys, "export", trained[0], "--to", "public", "--out", tmp_path / "public")[0] == 0
    assert "holds the form public" in refused(capsys, "sample", tmp_path / "public", "--out", tmp_path / "s")
