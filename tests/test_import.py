"""Checkpoints of the public REPA and SiT code: read without executing them, converted exactly, and gone on from.

With REPA_PUBLIC_REPA and REPA_PUBLIC_SIT, checkouts of the two public repositories, their own models are compared too.
"""

import argparse
import importlib.util
import json
import os
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_run
from launching import SMALL, train
from safetensors.torch import load_file, save_file
from serving import save_kl_vae
from test_export import refused, run
from torch import nn

from repa_scale import rng
from repa_scale.checkpoint import CheckpointReader, list_checkpoints
from repa_scale.errors import DataError
from repa_scale.models.initial import initial_values
from repa_scale.models.sit import FinalLayer, SiT
from repa_scale.sampling import sample
from repa_scale.sealed import MANIFEST, seal_folder
from repa_scale.trained import load_trained, open_source

NANO = {"input_size": 8, "patch_size": 2, "in_channels": 4, "depth": 2, "width": 32, "heads": 2, "num_classes": 10}
LABELS = "y_embedder.embedding_table.weight"


class OriginalSiT(nn.Module):
    """The original's convention, written out: time from noise (0) to data (1), 8 output channels of which 4 count."""

    def __init__(self):
        super().__init__()
        self.inner = SiT(**NANO)
        self.inner.final_layer = FinalLayer(NANO["width"], 2 * 2 * 8)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x, t, labels):
        """(N, 4, H, W), (N,), (N,) -> dx/dt (N, 4, H, W)."""
        m = self.inner
        tokens = m.x_embedder(x) + m.pos_embed
        c = m.t_embedder(t, x.dtype) + m.y_embedder(labels)
        for block in m.blocks:
            tokens = block(tokens, c)
        out = m.final_layer(tokens, c).view(len(x), 4, 4, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), 8, 8, 8).chunk(2, dim=1)[0]

    @torch.no_grad()
    def samples(self, noise, labels, steps, guidance):
        """Euler steps from t = 0 to 1, guided."""
        x, nulls = noise.double(), torch.full_like(labels, NANO["num_classes"])
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
        for now, then in pairwise(times):
            t = torch.full((len(x),), now)
            with_label, without = (self(x.float(), t, which).double() for which in (labels, nulls))
            x = x + (then - now) * (without + guidance * (with_label - without))
        return x


@pytest.fixture(scope="module")
def original():
    return OriginalSiT()


def sit_checkpoint(original, path, bare=False, **args):
    weights = original.inner.state_dict()
    told = argparse.Namespace(**{"model": "SiT-Nano/2", "prediction": "velocity", "path_type": "Linear", **args})
    older = {name: value + 1 for name, value in weights.items()}
    torch.save(weights if bare else {"model": older, "ema": weights, "opt": {}, "args": told, "train_steps": 7}, path)
    return path


@pytest.mark.parametrize("bare", [False, True])
def test_an_original_sit_draws_the_same_samples(bare, original, tmp_path, capsys):
    file = sit_checkpoint(original, tmp_path / "sit.pt", bare)
    code, out, errors = run(capsys, "import", file, "--out", tmp_path / "imported")
    assert code == 0 and "sit convention" in out, errors
    trained = load_trained(tmp_path / "imported")
    assert trained.facts["step"] == (None if bare else 7) and trained.config.data.image_size == 64
    model = trained.build()
    noise, labels = rng.normal(0, "test", 0, torch.arange(3), (4, 8, 8)), torch.tensor([0, 4, 9])
    settings = {"steps": 20, "guidance": 1.7}
    theirs = original.samples(noise, labels, **settings)
    ours = sample(lambda x, t, y: model(x, t, y)[0], noise, labels, 10, sampler="euler", **settings)
    assert (theirs - noise).abs().max() > 0.5, "the model does something"
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_one_time_of_an_original_sit(original, tmp_path, capsys):
    """v(x, t) = -u(x, 1 - t) in float64, where only the rounding of the features of t is left."""
    assert run(capsys, "import", sit_checkpoint(original, tmp_path / "s.pt"), "--out", tmp_path / "i")[0] == 0
    x, labels = rng.normal(0, "x", 0, torch.arange(5), (4, 8, 8)).double(), torch.arange(5)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    model = load_trained(tmp_path / "i").build().double()
    theirs = OriginalSiT().double()
    with torch.no_grad():
        ours, wanted = model(x, t, labels)[0], -theirs(x, 1 - t, labels)
    assert (ours - wanted).abs().max() < 1e-6 * wanted.abs().max()


def repa_checkpoint(tmp_path, capsys, *words, **changes):
    """A public REPA checkpoint: made by `--to public`, with `args` as their train.py saves them."""
    make_run(tmp_path / "run", words)
    assert run(capsys, "export", tmp_path / "run", "--to", "public", "--out", tmp_path / "public")[0] == 0
    held = torch.load(tmp_path / "public" / "checkpoint.pt")
    file = tmp_path / "repa.pt"
    torch.save({**held, "args": argparse.Namespace(**held["args"]), **changes}, file)
    return file, held


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_public_layout_comes_back_as_it_was(weights, tmp_path, capsys):
    file, held = repa_checkpoint(tmp_path, capsys)
    assert held["steps"] == 12 and held["args"]["model"] == "SiT-Nano/2"
    assert not torch.equal(held["model"][LABELS], held["ema"][LABELS])
    words = ("--latents", "identity-grey", "--weights", weights)
    assert run(capsys, "import", file, "--out", tmp_path / "imported", *words)[0] == 0
    ours, again = load_trained(tmp_path / "run", weights), load_trained(tmp_path / "imported", weights)
    assert set(ours.weights) == set(again.weights)
    assert all(torch.equal(value, again.weights[name]) for name, value in ours.weights.items())
    card = (tmp_path / "imported" / "model_card.md").read_text()
    assert "repa.pt, sha256" in card and "encoder_depth 1" in card and "global batch" not in card
    assert again.config.model.name == "SiT-Nano/2" and again.facts["imported"]["convention"] == "repa"
    code, out, errors = run(
        capsys,
        "sample",
        tmp_path / "imported",
        "--weights",
        weights,
        "--out",
        tmp_path / "s",
        "--count",
        2,
        "--steps",
        1,
    )
    assert code == 0 and "2 samples" in out, errors


def test_early_repa_checkpoints_count_their_decoder_blocks_anew(tmp_path, capsys):
    file, held = repa_checkpoint(tmp_path, capsys)
    renamed = {f"module.{name.replace('blocks.1.', 'decoder_blocks.0.')}": v for name, v in held["ema"].items()}
    torch.save({"ema": renamed}, file)
    assert run(capsys, "import", file, "--out", tmp_path / "imported")[0] == 0
    ours = load_trained(tmp_path / "run").weights
    assert all(torch.equal(value, ours[name]) for name, value in load_trained(tmp_path / "imported").weights.items())


@pytest.mark.parametrize("words", [(), ("method=baseline",), ("model.qk_norm=true",)])
def test_the_public_code_loads_an_export_strictly_and_gives_the_same_velocity(words, tmp_path, capsys):
    """Of sihyun-yu/REPA: `REPA_PUBLIC_REPA` is a checkout of it."""
    theirs = public_module("REPA_PUBLIC_REPA", "models/sit.py")
    if "model.qk_norm=true" in words:
        from timm.models import vision_transformer  # today's Attention wants the norm that it took for granted then

        theirs.Attention = lambda *a, **k: vision_transformer.Attention(*a, **k, norm_layer=nn.LayerNorm)
    words = ("alignment.repa.projector_dim=2048", *words) if "method=baseline" not in words else words
    _, held = repa_checkpoint(tmp_path, capsys, *words)
    args = held["args"]
    model = theirs.SiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=32, decoder_hidden_size=32, depth=2, num_heads=2,
        encoder_depth=args["encoder_depth"], num_classes=args["num_classes"], use_cfg=True, qk_norm=args["qk_norm"],
        fused_attn=True, z_dims=[int(z) for z in args["projector_embed_dims"].split(",")],
    )  # fmt: skip
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])
    for key, weights in (("ema", "ema"), ("model", "raw")):
        model.load_state_dict(held[key], strict=True)
        with torch.no_grad():
            wanted = model.eval()(x, t, labels)[0]
            ours = load_trained(tmp_path / "run", weights).build()(x, t, labels)[0]
        assert wanted.abs().mean() > 0.05
        assert (ours - wanted).abs().max() < 2e-6 * max(1.0, wanted.abs().max().item())


def test_the_original_code_gives_the_negative_velocity(tmp_path, capsys):
    """Of willisma/SiT: `REPA_PUBLIC_SIT` is a checkout of it."""
    theirs = public_module("REPA_PUBLIC_SIT", "models.py").SiT(
        input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    torch.save({"ema": theirs.state_dict()}, tmp_path / "sit.pt")
    assert run(capsys, "import", tmp_path / "sit.pt", "--out", tmp_path / "imported")[0] == 0
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        wanted = -theirs.eval()(x, 1 - t, labels)
        ours = load_trained(tmp_path / "imported").build()(x, t, labels)[0]
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()


def public_module(variable, file):
    """A file of a public repository."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name a checkout of the public code")
    from repa_scale import torchvision_fix

    torchvision_fix.ensure()
    spec = importlib.util.spec_from_file_location(variable.lower(), Path(folder) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.distributed
def test_training_goes_on_from_an_import_with_other_classes(digits, tmp_path, capsys):
    """The label table and the optimiser begin anew, everything else is kept to the bit.

    The run is real; it saves what it holds before its first step as step 0, and then takes one step.
    """
    file, held = repa_checkpoint(tmp_path, capsys, "model.num_classes=7")
    assert run(capsys, "import", file, "--out", tmp_path / "imported", "--latents", "identity-grey")[0] == 0
    words = [*SMALL, f"data.path={digits}", f"train.init_from={tmp_path}/imported", "train.steps=1"]
    rate, (beta_1, beta_2) = 1e-3, (0.9, 0.999)
    settings = [f"optimizer.learning_rate={rate}", f"optimizer.betas=[{beta_1},{beta_2}]", "seed=3"]
    settings += ["optimizer.weight_decay=0", "optimizer.eps=1e-30", "optimizer.warmup_steps=0"]
    faults = json.dumps([["save_again", "all", 1]])
    train([*words, *settings], tmp_path / "tuned", 1, "alone", FAULTS=faults)
    start, after = map(CheckpointReader, list_checkpoints(tmp_path / "tuned" / "checkpoints"))
    assert (start.step, after.step) == (0, 1)
    assert [reader.manifest["scalars"]["optimizer_steps"] for reader in (start, after)] == [0, 1]
    assert held["ema"][LABELS].shape == (8, 32) and start.shape(f"model.{LABELS}") == (11, 32)
    kept = moved = 0
    for name in start.names:
        found, shape = start.tensor("master", name), start.shape(name)
        public = name.removeprefix("model.")
        if public in held["ema"] and public != LABELS and name.startswith("model."):
            wanted, kept = held["ema"][public], kept + 1
        else:
            wanted = initial_values(name, shape, 0, found.numel(), 3).view_as(found)
        assert torch.equal(found, wanted), name
        assert torch.equal(start.tensor("ema", name), wanted), name
        assert not any(start.tensor(moment, name).any() for moment in ("exp_avg", "exp_avg_sq")), name
        # The first step of an AdamW without a past: m = (1 - b1) g, v = (1 - b2) g^2, and the weight moves by the rate.
        m, v = (after.tensor(moment, name) for moment in ("exp_avg", "exp_avg_sq"))
        gradient = m / (1 - beta_1)
        assert torch.allclose(v, (1 - beta_2) * gradient**2, rtol=1e-4, atol=1e-30), name
        sure = gradient.abs() > 1e-12
        step = (found - after.tensor("master", name))[sure]
        assert torch.allclose(step, rate * gradient[sure].sign(), rtol=1e-3, atol=1e-6), name
        moved += int(sure.sum())
    assert kept == len([name for name in held["ema"] if not name.startswith("projectors.")]) - 2  # labels, positions
    assert moved > 1000
    other = [word for word in words if not word.startswith("model.name")]
    line = refused(capsys, "train", *other, "model.name=SiT-Nano/1", f"run.dir={tmp_path}/other")
    assert "does not fit this model" in line
    weights = tmp_path / "imported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "model.safetensors has" in refused(capsys, "train", *words, f"run.dir={tmp_path}/other")


class Bomb:
    """Runs a command when it is unpickled by whatever executes pickles."""

    def __init__(self, fuse):
        self.fuse = fuse

    def __reduce__(self):
        return os.system, (f"touch {self.fuse}",)


@pytest.fixture
def bomb(tmp_path):
    fuse = tmp_path / "it_ran"
    yield Bomb(fuse)
    assert not fuse.exists(), "the pickle was executed"


def test_the_bomb_goes_off_where_pickles_are_executed(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    "place", ["whole", "among the weights", "in args", "beside", "a bare pickle", "as safetensors"]
)
def test_a_bomb_as_a_model(place, bomb, original, tmp_path, capsys):
    weights = original.inner.state_dict()
    file = tmp_path / "model.pt"
    if place == "a bare pickle":
        file.write_bytes(pickle.dumps(bomb))
    elif place == "as safetensors":
        file = tmp_path / "model.safetensors"
        file.write_bytes(pickle.dumps(bomb))
    else:
        held = {
            "whole": bomb,
            "among the weights": {"ema": {**weights, "x": bomb}},
            "in args": {"ema": weights, "args": argparse.Namespace(model=bomb)},
            "beside": {"ema": weights, "opt": bomb},
        }[place]
        torch.save(held, file)
    line = refused(capsys, "import", file, "--out", tmp_path / "imported")
    assert "it is not read" in line or "not a readable safetensors file" in line
    assert not (tmp_path / "imported").exists()
    assert "it asks for" not in line or "system" in line


def test_a_class_that_looks_like_a_namespace_is_refused(original, tmp_path, capsys):
    class Namespace(argparse.Namespace):
        pass

    Namespace.__qualname__, Namespace.__module__ = "Namespace", "test_import"
    sys.modules["test_import"].Namespace = Namespace
    torch.save({"ema": original.inner.state_dict(), "args": Namespace(model="x")}, tmp_path / "m.pt")
    assert "test_import.Namespace" in refused(capsys, "import", tmp_path / "m.pt", "--out", tmp_path / "i")
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "allowed for one file alone"


def test_a_bomb_as_a_checkpoint(bomb, tmp_path, capsys):
    make_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000012"
    file = checkpoint / "rank_00000_of_00002.safetensors"
    data = pickle.dumps(bomb)
    for name in (MANIFEST, file.name):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data)
        assert "step_00000012" in refused(capsys, "export", tmp_path / "run", "--out", tmp_path / "e")
        (checkpoint / name).write_bytes(kept)
    # One whose manifest vouches for it.
    from repa_scale.checkpoint import write_manifest
    from repa_scale.checksums import checksum_file

    reader = CheckpointReader(checkpoint)
    facts = {
        k: v for k, v in reader.manifest.items() if k not in ("format_version", "checksum", "files", "tensors", "kinds")
    }
    entries = [
        {
            "file": name,
            **entry,
            "pieces": [
                (tensor, told["shape"], part["start"], part["stop"])
                for tensor, told in reader.manifest["tensors"].items()
                for part in told["parts"]
                if part["file"] == name
            ],
        }
        for name, entry in reader.manifest["files"].items()
    ]
    file.write_bytes(data)
    entries[0] |= {"bytes": len(data), "checksum": checksum_file(file, "sha256")}
    write_manifest(checkpoint, entries, facts)
    CheckpointReader(checkpoint).verify()
    assert "not a readable safetensors file" in refused(capsys, "export", checkpoint, "--out", tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
def test_a_bomb_in_an_export(name, bomb, tmp_path, capsys):
    make_run(tmp_path / "run")
    assert run(capsys, "export", tmp_path / "run", "--out", tmp_path / "e")[0] == 0
    (tmp_path / "e" / name).write_bytes(pickle.dumps(bomb))
    if name != MANIFEST:  # a manifest that vouches for it
        facts = {
            k: v for k, v in json.loads((tmp_path / "e" / MANIFEST).read_text()).items() if k in ("form", "trained")
        }
        (tmp_path / "e" / MANIFEST).unlink()
        seal_folder(tmp_path / "e", facts)
    assert name in refused(capsys, "sample", tmp_path / "e", "--out", tmp_path / "s")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "config.json"])
def test_a_bomb_as_a_vae(name, bomb, tmp_path, capsys):
    make_run(tmp_path / "run", ("latents.name=sd-vae-ft-mse", "data.image_size=64"))
    vae = save_kl_vae(tmp_path / "vae")
    if name.endswith(".bin"):
        (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"decoder.conv_in.bias": bomb}, vae / name)
    words = ("export", tmp_path / "run", "--to", "diffusers", "--vae", vae, "--out", tmp_path / "e")
    assert "cannot be read from" in refused(capsys, *words)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_that_was_cut_off_is_not_imported(name, original, tmp_path, capsys):
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"ema": original.inner.state_dict()}, file)
    else:
        save_file(original.inner.state_dict(), file)
    whole = file.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:size])
        assert str(file) in refused(capsys, "import", file, "--out", tmp_path / "i", "--convention", "sit")
    assert not list(tmp_path.glob("i*"))


def test_an_import_leaves_a_full_folder_as_it_is(original, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    file = sit_checkpoint(original, tmp_path / "sit.pt")
    assert "not an empty folder" in refused(capsys, "import", file, "--out", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_bomb_as_samples(bomb, digits, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    np.savez(tmp_path / "s" / "samples.npz", arr_0=np.array([bomb], dtype=object), labels=np.zeros(1))
    assert "samples.npz" in refused(capsys, "evaluate", tmp_path / "s", "--data", digits)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "good.npz", arr_0=images)
    for arrays in ({"arr_0": np.array([bomb], dtype=object)}, {"mu": np.array([bomb], dtype=object), "sigma": images}):
        np.savez(tmp_path / "reference.npz", **arrays)
        words = ("evaluate", tmp_path / "good.npz", "--reference", tmp_path / "reference.npz")
        assert "reference.npz" in refused(capsys, *words)


def test_a_bomb_as_a_configuration(bomb, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    for text in (
        f"!!python/object/apply:os.system ['touch {bomb.fuse}']",
        f"seed: !!python/object/apply:os.system [touch {bomb.fuse}]",
    ):
        file.write_text(text)
        assert "config" in refused(capsys, "train", "--config", file)
    file.write_bytes(pickle.dumps(bomb))
    assert "config" in refused(capsys, "train", "--config", file)


def change(weights, **other):
    return {"ema": {**weights, **{name.replace("__", "."): value for name, value in other.items()}}}


WRONG = {
    "no dict": (lambda w: [1, 2], "holds a list"),
    "no tensors": (lambda w: {"ema": {"x": 1}}, "'x' among its weights"),
    "whole numbers": (lambda w: change(w, pos_embed=torch.ones(1, 16, 32, dtype=torch.int64)), "'pos_embed'"),
    "a small file that claims a large tensor": (
        lambda w: change(w, y_embedder__embedding_table__weight=torch.zeros(1, 1).expand(10**9, 32)),
        "embedding_table",
    ),
    "another network": (lambda w: {"ema": {"conv.weight": torch.ones(3)}}, "does not hold the weights of a SiT"),
    "an unknown size": (
        lambda w: {"ema": {n: v for n, v in w.items() if "blocks.1." not in n}}, "1 blocks of width 32"
    ),
    "a missing weight": (
        lambda w: {"ema": {n: v for n, v in w.items() if n != "blocks.0.mlp.fc1.bias"}},
        "missing: blocks.0.mlp.fc1.bias",
    ),
    "another position table": (lambda w: change(w, pos_embed=torch.zeros(1, 16, 32)), "another position table"),
    "a model of the noise": (
        lambda w: {"ema": w, "args": argparse.Namespace(prediction="noise")}, "predict 'noise'"
    ),
    "a path that is not known": (lambda w: {"ema": w, "args": {"path_type": "VP"}}, "path 'vp'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_checkpoints(what, original, tmp_path, capsys):
    held, wanted = WRONG[what]
    torch.save(held(dict(original.inner.state_dict())), tmp_path / "m.pt")
    line = refused(capsys, "import", tmp_path / "m.pt", "--out", tmp_path / "i")
    assert wanted in line and "m.pt" in line
    assert not list(tmp_path.glob("i*"))


def test_a_checkpoint_that_does_not_say_which_way_its_time_runs(tmp_path, capsys):
    weights = SiT(**NANO).state_dict()
    save_file(weights, tmp_path / "m.safetensors")
    words = ("import", tmp_path / "m.safetensors", "--out", tmp_path / "i")
    assert "--convention repa" in refused(capsys, *words)
    assert run(capsys, *words, "--convention", "repa")[0] == 0
    assert torch.equal(load_file(tmp_path / "i" / "model.safetensors")[LABELS], weights[LABELS])
    assert "--convention sit" in refused(
        capsys,
        "import",
        sit_checkpoint(OriginalSiT(), tmp_path / "s.pt"),
        "--out",
        tmp_path / "j",
        "--convention",
        "repa",
    )
    line = refused(capsys, *words[:3], tmp_path / "k", "--convention", "repa", "--latents", "identity")
    assert "has 4 channels; spaces that fit: sd-vae-ft-mse" in line
    assert "is not a file" in refused(capsys, "import", tmp_path / "none.safetensors", "--out", tmp_path / "k")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04" + b"x" * 50)
    assert "it is not read" in refused(capsys, "import", tmp_path / "cut.pt", "--out", tmp_path / "k")
    with pytest.raises(DataError):
        open_source(tmp_path / "cut.pt")
