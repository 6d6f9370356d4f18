"""Every number of the golden files: what the public implementation computes, ours computes.

The files lie in tests/golden, or in the folder that REPA_SCALE_GOLDEN names. Errors are max|a - b| / max|b|.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repa_scale.alignment import AlignmentTerm
from repa_scale.config import TermConfig
from repa_scale.ema import ShardEma
from repa_scale.interpolant import Interpolant
from repa_scale.models.projectors import build_projector
from repa_scale.models.sit import SiT, position_table
from repa_scale.objective import Objective, total
from repa_scale.sampling import sample

FOLDER = Path(os.environ.get("REPA_SCALE_GOLDEN", Path(__file__).parent / "golden"))
INDEX = json.loads((FOLDER / "index.json").read_text())
FLOAT64, GRADIENTS, TRAINED_WEIGHTS, TRAINING_LOSSES = 5e-9, 1e-5, 1e-6, 1e-9
SAMPLE_KEY = re.compile(
    r"sample\.(?:ode_(?P<ode>euler|heun)|(?P<sde>sde))_(?P<steps>\d+)(?:_(?P<path>linear|cosine))?"
    r"(?:_cfg(?P<guidance>[\d.]+)_(?P<low>[\d.]+)_(?P<high>[\d.]+))?"
)


def error(ours, golden):
    return float((ours.detach().double() - golden.double()).abs().max() / golden.double().abs().max().clamp_min(1e-300))


class Golden:
    """One configuration: its numbers, and our modules with its weights."""

    def __init__(self, name):
        self.entry, self.numbers = INDEX[name], load_file(FOLDER / f"{name}.safetensors")
        self.config = self.entry["config"]
        self.grid = self.config["input_size"] // self.config["patch_size"]

    def __getitem__(self, key):
        return self.numbers[key]

    def under(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self.numbers.items() if key.startswith(prefix)}

    def objective(self):
        """Ours in float64 with the golden weights, loaded strictly under public names."""
        c = self.config
        model = SiT(
            c["input_size"],
            c["patch_size"],
            c["in_channels"],
            c["depth"],
            c["hidden_size"],
            c["num_heads"],
            c["num_classes"],
            mlp_ratio=c.get("mlp_ratio", 4.0),
            qk_norm=c["qk_norm"],
        )
        weight = self.entry["proj_coeff"] / len(c["z_dims"])
        terms = {
            str(k): AlignmentTerm(str(k), TermConfig(depth=c["encoder_depth"], weight=weight))
            for k in range(len(c["z_dims"]))
        }
        projectors = nn.ModuleDict(
            {
                str(k): build_projector("mlp", c["hidden_size"], c["projector_dim"], z, (self.grid, self.grid))
                for k, z in enumerate(c["z_dims"])
            }
        )
        objective = Objective(model, projectors, terms).double()
        objective.load_state_dict(ours_under(self.under("weights.")), strict=True)
        return objective

    def targets(self):
        return {key: value for key, value in self.under("in.target.").items()}

    def step(self, objective, x0, noise, t, y, path):
        """Mean losses of a batch: (per image losses, total)."""
        x_t, velocity = Interpolant(path)(x0, noise, t)
        losses = objective(x_t, t, y, velocity, self.targets())
        return losses, total(losses, {name: term.weight_at(1) for name, term in objective.terms.items()})


def ours_under(public):
    """Public names -> names of `Objective`."""
    return {name if name.startswith("projectors.") else f"model.{name}": value for name, value in public.items()}


def public_name(name):
    return name.removeprefix("model.")


@pytest.fixture(scope="module", params=sorted(INDEX))
def golden(request):
    return Golden(request.param)


@pytest.fixture(params=["linear", "cosine"])
def path(request, golden):
    if request.param not in golden.entry["path_types"]:
        pytest.fail(f"the index does not list {request.param}")
    return request.param


def test_the_position_table_is_the_public_one(golden):
    table = position_table(golden.grid, golden.config["hidden_size"])
    assert error(table, golden["weights.pos_embed"]) == 0.0


def test_one_step(golden, path):
    """x_t, velocity, projections, losses, gradients."""
    objective = golden.objective()
    x0, noise, t, y = (golden[f"in.{name}"] for name in ("x0", "noise", "t", "y"))
    x_t, _ = Interpolant(path)(x0, noise, t)
    assert error(x_t, golden[f"{path}.x_t"]) < FLOAT64

    depth = golden.config["encoder_depth"]
    predicted, hidden = objective.model(x_t, t, y, [depth])
    assert error(predicted, golden[f"{path}.velocity"]) < FLOAT64
    for k, projector in objective.projectors.items():
        assert error(projector(hidden[depth]), golden[f"{path}.projected.{k}"]) < FLOAT64

    losses, loss = golden.step(objective, x0, noise, t, y, path)
    assert error(losses["denoising"], golden[f"{path}.denoising_loss"]) < FLOAT64
    alignment = torch.stack([losses[f"alignment/{k}"].mean() for k in objective.terms]).mean()
    assert error(alignment, golden[f"{path}.projection_loss"]) < FLOAT64
    assert error(loss, golden[f"{path}.total"]) < FLOAT64

    loss.backward()
    wanted = golden.under(f"{path}.grad.")
    ours = {public_name(name): p.grad for name, p in objective.named_parameters()}
    assert set(ours) == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # A key's bias shifts all logits of a query alike, so its gradient is 0 and both sides hold rounding alone.
        if name.endswith("k_norm.bias"):
            assert max(ours[name].abs().max(), gradient.abs().max()) < 1e-12 * largest, name
        else:
            assert error(ours[name], gradient) < GRADIENTS, name


def test_every_sampler(golden):
    objective = golden.objective()
    checked = 0
    for key in golden.numbers:
        match = SAMPLE_KEY.fullmatch(key)
        if match is None:
            assert key in ("sample.latents", "sample.y", "sample.sde_noise") or not key.startswith("sample."), key
            continue
        ours = sample(
            lambda x, t, y: objective(x, t, y)["velocity"],
            golden["sample.latents"],
            golden["sample.y"],
            golden.config["num_classes"],
            sampler=match["ode"] or "sde",
            steps=int(match["steps"]),
            guidance=float(match["guidance"] or 1.0),
            interval=(float(match["low"] or 0.0), float(match["high"] or 1.0)),
            path=match["path"] or "linear",
            step_noise=lambda i: golden["sample.sde_noise"][i],
        )
        assert ours.dtype == torch.float64
        assert error(ours, golden[key]) < FLOAT64, key
        checked += 1
    assert checked >= 7


def test_six_training_steps(golden):
    """Losses, gradient norms, final weights and EMA of the public loop's AdamW in float64."""
    objective = golden.objective()
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    ema = ShardEma(parameters, decay=0.9999)
    ours = []
    for step in range(len(golden["train.losses"])):
        x0, noise, t, y = (golden[f"train.{step}.{name}"] for name in ("x0", "noise", "t", "y"))
        losses, loss = golden.step(objective, x0, noise, t, y, "linear")
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        alignment = torch.stack([losses[f"alignment/{k}"].mean() for k in objective.terms]).mean()
        ours.append(torch.stack([losses["denoising"].mean(), alignment, loss, norm]).detach())
        optimizer.step()
        ema.update()
    for column, name in enumerate(("denoising", "alignment", "total", "gradient norm")):
        assert error(torch.stack(ours)[:, column], golden["train.losses"][:, column]) < TRAINING_LOSSES, name
    names = [public_name(name) for name, _ in objective.named_parameters()]
    for kind, values in (("final", parameters), ("ema", ema.values)):
        wanted = golden.under(f"train.{kind}.")
        assert set(wanted) == {*names, "pos_embed"}
        for name, value in zip(names, values, strict=True):
            assert error(value.detach(), wanted[name]) < TRAINED_WEIGHTS, (kind, name)


PREPROCESS = FOLDER / "preprocess.safetensors"
if PREPROCESS.exists():  # a set of other configurations need not bring pictures

    @pytest.mark.parametrize("size", [64, 128, 256])
    def test_the_crop_is_the_public_one(size):
        from PIL import Image

        from repa_scale.data.crop import center_crop

        numbers = load_file(PREPROCESS)
        crop = center_crop(Image.fromarray(numbers["picture"].numpy()), size)
        assert torch.equal(as_tensor(crop), numbers[f"adm_center_crop_{size}"])

    def test_the_input_of_dinov2_is_the_public_one():
        from repa_scale.encoders import preprocess
        from repa_scale.sizes import encoder_spec

        numbers = load_file(PREPROCESS)
        images = numbers["adm_center_crop_256"].permute(2, 0, 1)[None]
        ours = preprocess(images, encoder_spec("dinov2-vit-b"), 224)
        assert error(ours, numbers["dinov2_input_224"]) < 1e-5

    def as_tensor(image):
        import numpy as np

        return torch.from_numpy(np.asarray(image).copy())
