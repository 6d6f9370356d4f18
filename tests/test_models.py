"""The backbone's table and counts, initial weights, projectors, and public weight files."""

import pytest
import torch
from safetensors.torch import save_file

from repa_scale.config import Config
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.models import build_sit
from repa_scale.models.initial import initial_values, initialize
from repa_scale.models.projectors import PROJECTORS as BUILDERS
from repa_scale.models.projectors import build_projector
from repa_scale.models.sit import SiT
from repa_scale.models.weights import check_names, open_weights, public_shapes
from repa_scale.objective import build_objective
from repa_scale.sizes import BACKBONES, PATCH_SIZES, PROJECTORS


def config_of(name, depth=8):
    config = Config()
    config.model.name = name
    config.alignment["repa"].depth = depth
    return config


def count(module):
    """Parameters and the fixed position table, as the published counts have it."""
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())


# With a 768-wide projector and 1000 classes: the paper's code, counted; H to 7B: by the table's depth, width and heads.
@pytest.mark.parametrize(
    ("name", "total", "projector"),
    [
        ("SiT-S/2", 39_515_664, 6_558_464),
        ("SiT-B/2", 137_845_008, 7_344_896),
        ("SiT-L/2", 465_955_600, 7_869_184),
        ("SiT-XL/2", 683_242_512, 8_131_328),
        ("SiT-H/2", 1_378_068_240, None),
        ("SiT-G/2", 2_014_669_328, None),
        ("SiT-3B/2", 3_046_851_344, None),
        ("SiT-7B/2", 7_457_675_024, None),
    ],
)
def test_parameter_counts(name, total, projector):
    config = config_of(name)
    config.model.qk_norm = False  # the published counts are without
    with torch.device("meta"):
        objective = build_objective(config)
    assert count(objective) == total
    assert projector is None or sum(p.numel() for p in objective.projectors.parameters()) == projector


@pytest.mark.parametrize("patch", PATCH_SIZES)
@pytest.mark.parametrize("size", BACKBONES)
def test_every_row_of_the_table_builds(size, patch):
    with torch.device("meta"):
        model = build_sit(config_of(f"{size}/{patch}"))
    row = BACKBONES[size]
    assert len(model.blocks) == row.depth
    norms = 4 * (row.width // row.heads) * row.depth if row.qk_norm else 0
    d, tokens = row.width, (32 // patch) ** 2
    block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    ends = (4 * patch**2 * d + d) + (256 * d + d + d * d + d) + 1001 * d + (2 * d * d + 2 * d) + (d + 1) * 4 * patch**2
    assert count(model) == row.depth * block + norms + ends + tokens * d


def tiny(**changes):
    return SiT(
        **{
            "input_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "depth": 3,
            "width": 32,
            "heads": 4,
            "num_classes": 10,
            **changes,
        }
    )


def test_initial_weights_follow_the_rules():
    model = tiny(qk_norm=True)
    initialize(model, seed=1)
    for block in model.blocks:
        assert block.adaLN_modulation[1].weight.abs().max() == 0 and block.adaLN_modulation[1].bias.abs().max() == 0
        assert torch.equal(block.attn.q_norm.weight, torch.ones(8)) and block.attn.k_norm.bias.abs().max() == 0
        bound = (6 / (32 + 96)) ** 0.5
        assert 0.9 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert model.final_layer.linear.weight.abs().max() == 0
    assert abs(float(model.t_embedder.mlp[0].weight.std()) - 0.02) < 0.001
    assert abs(float(model.y_embedder.embedding_table.weight.std()) - 0.02) < 0.003
    bound = (6 / (32 + 16)) ** 0.5  # the patch convolution by its flattened weight
    assert 0.9 * bound < model.x_embedder.proj.weight.abs().max() <= bound
    # adaLN-Zero: the model starts as the constant 0.
    x = torch.randn(2, 4, 8, 8)
    assert model(x, torch.tensor([0.1, 0.9]), torch.tensor([0, 10]))[0].abs().max() == 0


def test_any_slice_of_an_initial_weight_is_the_same_numbers():
    whole = initial_values("model.blocks.0.mlp.fc1.weight", (64, 16), 0, 1024, seed=3)
    assert torch.equal(initial_values("blocks.0.mlp.fc1.weight", (64, 16), 100, 777, seed=3), whole[100:777])
    assert not torch.equal(initial_values("blocks.1.mlp.fc1.weight", (64, 16), 0, 1024, seed=3), whole)
    with pytest.raises(KeyError, match="no rule"):
        initial_values("blocks.0.something", (4,), 0, 4, seed=0)


def test_every_parameter_of_every_configuration_has_a_rule():
    for kind in PROJECTORS:
        config = config_of("SiT-H/2")
        config.alignment["repa"].projector = kind
        with torch.device("meta"):
            objective = build_objective(config)
        for name, parameter in objective.named_parameters():
            assert initial_values(name, tuple(parameter.shape), 0, 1, seed=0).shape == (1,)


def test_repa_and_baseline_begin_with_the_same_backbone():
    models = {}
    for method in ("repa", "baseline"):
        config = config_of("SiT-Nano/2", depth=1)
        config.method = method
        objective = build_objective(config)
        initialize(objective, seed=5)
        models[method] = objective.model.state_dict()
    assert all(torch.equal(models["repa"][name], value) for name, value in models["baseline"].items())


def test_hidden_tokens_come_from_the_depth_asked_for():
    model = tiny()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    args = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 10]))
    seen = {}
    for depth, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda _m, _i, out, depth=depth: seen.update({depth: out}))
    _, hidden = model(*args, depths=[1, 3])
    assert set(hidden) == {1, 3} and all(torch.equal(hidden[d], seen[d]) for d in hidden)


def test_activation_checkpointing_changes_no_bit():
    model = tiny()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    args = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 10]))
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model(*args)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unlabelled_data_has_one_label():
    model = tiny(num_classes=0)
    initialize(model, seed=0)
    assert model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64))[0].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projectors_keep_the_tokens(kind):
    projector = build_projector(kind, 32, 64, 24, (4, 4))
    assert projector(torch.randn(2, 16, 32)).shape == (2, 16, 24)


def test_the_table_of_names_is_the_table_of_builders():
    assert set(PROJECTORS) == set(BUILDERS)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        build_projector("linaer", 1, 1, 1, (1, 1))


def test_a_conv_projector_sees_neighbours_in_the_image():
    """A change of one token reaches the 3x3 tokens around it in the map, and no other."""
    projector = build_projector("conv", 8, 0, 4, (4, 4))
    tokens = torch.randn(1, 16, 8)
    changed = tokens.clone()
    changed[0, 5] += 1.0  # row 1, column 1
    moved = (projector(tokens) - projector(changed)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_public_weight_files(tmp_path):
    model = tiny()
    file = tmp_path / "model.safetensors"
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file({**tensors, "projectors.0.0.bias": torch.zeros(3)}, file)
    for path in (file, tmp_path):
        assert public_shapes(path) == {name: tuple(t.shape) for name, t in tensors.items()}
        shapes, read = open_weights(path)
        assert shapes["projectors.0.0.bias"] == (3,)
        bias = tensors["blocks.0.attn.qkv.bias"]
        assert torch.equal(read("blocks.0.attn.qkv.bias", 5, len(bias)), bias[5:])
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    check_names(have, have, "x")
    wrong = {**have, "blocks.0.attn.qkv.bias": (7,), "surplus": (1,)}
    del wrong["pos_embed"]
    with pytest.raises(UserError) as problem:
        check_names(wrong, have, "some.safetensors")
    for part in (
        "some.safetensors",
        "missing: pos_embed",
        "not expected: surplus",
        "blocks.0.attn.qkv.bias [7] instead of [96]",
    ):
        assert part in str(problem.value)


def test_weight_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_weights(tmp_path / "none.safetensors")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="pickle"):
        open_weights(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        open_weights(tmp_path / "a.safetensors")
