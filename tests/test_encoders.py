"""Target encoders against timm itself: tokens, pre-processing, weights of every origin."""

import pytest
import torch
import torch.nn.functional as F

from repa_scale import torchvision_fix
from repa_scale.encoders import build_encoder, preprocess
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


def test_weights_that_cannot_be_used(tmp_path):
    def build(name, weights):
        return build_encoder(name, str(weights), (2, 2), CPU, FP32)

    with pytest.raises(ConfigError, match="did you mean 'dinov2-vit-b'"):
        build("dinov2-vitb", "random")
    with pytest.raises(ConfigError, match="has no package"):
        build("dinov2-vit-s", "package")
    with pytest.raises(ConfigError, match="is not on the hub"):
        build("mocov3-vit-b", "hub")
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
