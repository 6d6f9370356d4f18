"""Target encoders against timm itself: tokens, pre-processing, weights of every origin."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from repa_scale import torchvision_fix
from repa_scale.encoders import _load_file, build_encoder, preprocess
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.sizes import ENCODERS, encoder_spec

torchvision_fix.ensure()
timm = pytest.importorskip("timm")
CPU, FP32 = torch.device("cpu"), torch.float32


def images(n=2, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_row_is_what_timm_builds(name):
    spec = ENCODERS[name]
    architecture = spec.timm_name.partition(".")[0]
    with torch.device("meta"):
        if spec.kind == "map":
            rows = timm.create_model(architecture).feature_info
            assert (spec.width, spec.stride) in {(row["num_chs"], row["reduction"]) for row in rows}
            return
        network = timm.create_model(architecture, img_size=spec.stride * 16, num_classes=0)
    assert network.num_features == spec.width
    assert network.patch_embed.patch_size == (spec.stride, spec.stride) and network.patch_embed.grid_size == (16, 16)
    assert getattr(network, "num_prefix_tokens", 0) == spec.prefix_tokens
    assert not isinstance(network.norm, torch.nn.Identity)  # some architectures of timm move their norm behind the pool
    assert not spec.timm_name.partition(".")[2] or spec.timm_name in timm.list_pretrained(f"{architecture}*")


def test_clip_has_the_activation_of_its_weights():
    with torch.device("meta"):
        network = timm.create_model(encoder_spec("clip-vit-l").timm_name.partition(".")[0], num_classes=0)
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(network.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))


def test_mae_tokens_are_those_before_the_last_norm():
    encoder = build_encoder("mae-vit-b", "random", (2, 2), CPU, FP32)
    x = images()
    network = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0).eval()
    network.norm = torch.nn.Identity()
    network.load_state_dict(encoder.network.state_dict())
    seen = network.forward_intermediates(preprocess(x, encoder.spec, 32), indices=1, norm=False, output_fmt="NLC")
    assert torch.allclose(encoder(x), seen[1][-1], atol=1e-5)


def test_small_pictures_are_enlarged_to_the_grid():
    assert build_encoder("effnet-lite0", "random", (8, 8), CPU, FP32)(images(size=8)).shape == (2, 64, 112)


def test_dinov2_tokens_are_the_patch_tokens_after_the_final_norm():
    encoder = build_encoder("dinov2-reg-vit-s", "random", (4, 4), CPU, FP32)
    x = images()
    tokens = encoder(x)
    assert tokens.shape == (2, 16, 384) and not tokens.requires_grad
    network = encoder.network
    seen = network.forward_intermediates(preprocess(x, encoder.spec, 56), indices=1, norm=True, output_fmt="NLC")[1][-1]
    assert torch.allclose(tokens, seen, atol=1e-5)


def test_random_weights_are_the_same_everywhere():
    torch.manual_seed(1)
    first = build_encoder("dinov2-vit-s", "random", (2, 2), CPU, FP32)(images())
    torch.manual_seed(2)  # another rank's generator stands elsewhere
    state = torch.random.get_rng_state()
    second = build_encoder("dinov2-vit-s", "random", (2, 2), CPU, FP32)(images())
    assert torch.equal(first, second) and torch.equal(state, torch.random.get_rng_state())


def test_the_packaged_network_is_the_real_one():
    """Equal to timm's own features with the package's tensors, and it knows what is in real pictures."""
    encoder = build_encoder("effnet-lite0", "package", (8, 8), CPU, FP32)
    x = images(size=128)
    tokens = encoder(x)
    assert tokens.shape == (2, 64, 112)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    from repa_scale.encoders import _load_package

    _load_package(network, encoder.spec, "effnet-lite0")
    maps = network.forward_intermediates((x.float() - 127) / 128, indices=[3], intermediates_only=True)[0]
    assert torch.allclose(tokens, maps.flatten(2).transpose(1, 2), atol=1e-4)


def test_real_photographs_are_recognised(data_folder):
    """The class head above the same trunk: so the weights of the package are in their right places."""
    import io
    import zipfile

    import numpy as np
    from PIL import Image

    from repa_scale.data.crop import center_crop
    from repa_scale.encoders import _load_package

    network = timm.create_model("tf_efficientnet_lite0").eval()
    spec = encoder_spec("effnet-lite0")
    _load_package(network, spec, "effnet-lite0")
    with zipfile.ZipFile(data_folder / "imagenet_samples.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".JPEG"))
        classes = sorted({n.split("/")[-2] for n in names})
        pictures = [center_crop(Image.open(io.BytesIO(archive.read(n))).convert("RGB"), 224) for n in names[:40]]
    if len(classes) < 100:
        pytest.skip("the archive has too few classes")
    x = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    with torch.no_grad():
        confidence = network(preprocess(x, spec, 224)).softmax(-1).amax(-1)
    assert confidence.mean() > 0.5  # a network with misplaced weights is sure of nothing


def test_clip_resizes_before_it_normalises():
    spec = encoder_spec("clip-vit-l")
    x = images(size=20)
    resized = F.interpolate(x.float() / 255, size=(28, 28), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    assert torch.allclose(preprocess(x, spec, 28), (resized - mean) / std)


def test_weights_of_the_authors_convert_on_load(tmp_path):
    """A file in the names of DINOv2's authors, at their own 37 x 37 grid, with the mask token that timm lacks."""
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    state = dict(theirs.state_dict())
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = build_encoder("dinov2-vit-s", str(tmp_path / "dinov2.pth"), (37, 37), CPU, FP32)
    x = images(1, size=64)
    with torch.no_grad():
        wanted = theirs.eval().forward_features(preprocess(x, encoder.spec, 518))[:, 1:]
    assert torch.allclose(encoder(x), wanted, atol=1e-5)
    # At another grid the position table is resampled.
    small = build_encoder("dinov2-vit-s", str(tmp_path / "dinov2.pth"), (4, 4), CPU, FP32)
    assert small(x).shape == (1, 16, 384)


def test_a_file_of_dinov2_with_registers_converts(tmp_path):
    """Its authors add a position to the class token; timm keeps the sum, and calls the registers by another name."""
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0).eval()
    state = dict(theirs.state_dict())
    row = torch.randn(1, 1, 384)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - row
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_reg.pth")
    encoder = build_encoder("dinov2-reg-vit-s", str(tmp_path / "dinov2_reg.pth"), (4, 4), CPU, FP32)
    x = images(1, size=64)
    with torch.no_grad():
        wanted = theirs.forward_features(preprocess(x, encoder.spec, 56))[:, 5:]
    assert torch.allclose(encoder(x), wanted, atol=1e-5)


def loaded(theirs, file, contents):
    """A second network of the class and shape of `theirs`, its weights drawn anew and then read from `contents`."""
    import copy

    ours = copy.deepcopy(theirs)
    for value in ours.state_dict().values():
        value.normal_()
    torch.save(contents, file)
    _load_file(ours, file, "a small one")
    return ours.state_dict()


def equal(have, want):
    return have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)


def test_files_of_other_authors_convert(tmp_path):
    """Small networks with the names and the wrapping of the published files of DINOv2-g, MoCo v3 and I-JEPA."""
    giant = timm.create_model(
        "vit_giant_patch14_dinov2", embed_dim=32, depth=2, num_heads=2, img_size=28, num_classes=0
    )
    want = giant.state_dict()
    names = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    state = {re.sub("|".join(names), lambda m: names[m[0]], name): value for name, value in want.items()}
    assert "blocks.1.mlp.w12.weight" in state
    assert equal(loaded(giant, tmp_path / "giant.pth", {**state, "mask_token": torch.zeros(1, 32)}), want)

    moco = timm.create_model("vit_large_patch16_224", embed_dim=32, depth=15, num_heads=2, num_classes=0)
    want = moco.state_dict()
    odd = {
        "13.norm1.": "13.norm13.",
        "13.mlp.fc1.": "13.mlp.fc13.",
        "14.norm2.": "14.norm14.",
        "14.mlp.fc2.": "14.mlp.fc14.",
    }
    state = {}
    for name, value in want.items():
        for usual, published in odd.items():
            name = name.replace("blocks." + usual, "blocks." + published)
        state["module.base_encoder." + name] = value
        state["module.momentum_encoder." + name] = value + 1
    assert "module.base_encoder.blocks.14.mlp.fc14.bias" in state
    state["module.base_encoder.head.0.weight"] = state["module.predictor.0.weight"] = torch.zeros(4, 4)
    assert equal(loaded(moco, tmp_path / "moco.pth", {"epoch": 300, "arch": "vit_large", "state_dict": state}), want)

    jepa = timm.create_model("vit_huge_patch14_gap_224", embed_dim=32, depth=1, num_heads=2, num_classes=0)
    want = jepa.state_dict()
    contents = {
        "encoder": {"module." + name: value for name, value in want.items()},
        "target_encoder": {"module." + name: value + 1 for name, value in want.items()},
        "epoch": 300,
    }
    assert equal(loaded(jepa, tmp_path / "jepa.pth", contents), want)


def test_the_state_of_openai_clip_converts(tmp_path):
    """Both towers in one dictionary of half precision, beside it a projection that the tokens do not pass."""
    clip = timm.create_model(
        "vit_large_patch14_clip_quickgelu_224", embed_dim=32, depth=2, num_heads=2, img_size=28, num_classes=0
    )
    clip.half().float()
    names = [
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm([12])", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"^blocks", "transformer.resblocks"),
    ]
    state = {"visual.proj": torch.zeros(32, 8), "token_embedding.weight": torch.zeros(4, 4)}
    want = clip.state_dict()
    for name, value in want.items():
        for ours, theirs in names:
            name = re.sub(ours, theirs, name)
        state["visual." + name] = value.half()
    state["visual.class_embedding"] = state.pop("visual.cls_token")[0, 0]
    state["visual.positional_embedding"] = state.pop("visual.pos_embed")[0]
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in state
    assert equal(loaded(clip, tmp_path / "clip.pth", state), want)


def test_weights_that_cannot_be_used(tmp_path):
    def build(name, weights):
        return build_encoder(name, str(weights), (2, 2), CPU, FP32)

    with pytest.raises(ConfigError, match="did you mean 'dinov2-vit-b'"):
        build("dinov2-vitb", "random")
    with pytest.raises(ConfigError, match="has no package"):
        build("dinov2-vit-s", "package")
    with pytest.raises(ConfigError, match="is not on the hub"):
        build("mocov3-vit-b", "hub")
    with pytest.raises(ConfigError, match="weights=package"):
        build("effnet-lite0", "hub")
    with pytest.raises(DataError, match="there is no such file"):
        build("dinov2-vit-s", tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot be read as weights"):
        build("dinov2-vit-s", tmp_path / "broken.pth")
    state = dict(build("dinov2-vit-s", "random").network.state_dict())
    state.pop("blocks.3.mlp.fc1.bias")
    state["surplus"] = torch.zeros(1)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.3\.mlp\.fc1\.bias; not expected: surplus"):
        build("dinov2-vit-s", tmp_path / "wrong.pth")


def test_weights_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match="cannot be read as weights"):
        build_encoder("dinov2-vit-s", str(tmp_path / "evil.pth"), (2, 2), CPU, FP32)


def test_torchvision_imports_beside_any_torch():
    """In a fresh process, asked twice, in the order in which everything here asks."""
    pytest.importorskip("torchvision")
    code = "from repa_scale import torchvision_fix as f; f.ensure(); f.ensure(); import torchvision; f.ensure()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_without_torchvision_nothing_is_declared(monkeypatch):
    monkeypatch.setattr(torchvision_fix, "_declared", [])
    monkeypatch.setattr(torchvision_fix.importlib.util, "find_spec", lambda name: None)
    torchvision_fix.ensure()
    assert torchvision_fix._declared == []
