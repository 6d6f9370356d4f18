"""Extractors against the pipelines they stand for: torch-fidelity's, timm's with Pillow, sFID's layer in NumPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from repa_scale import extractors, torchvision_fix
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.extractors import bicubic, build_extractor
from repa_scale.metrics.frechet import Moments, frechet_distance


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten PNG files of smooth colours, and their pixels (10, 3, 48, 48)."""
    folder = tmp_path_factory.mktemp("pictures")
    coarse = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(48, 48), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round().byte()
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder, pixels


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception with random weights from a file of torch-fidelity's form, and that file."""
    torchvision_fix.ensure()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, tensors, *args, **keywords):
            return None

    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], str(file))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):  # so that folding it has something to fold
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.1)
    torch.save(network.state_dict(), file)
    return build_extractor("inception", str(file)), file


def test_features_are_those_of_torch_fidelity_on_the_same_files(pictures, inception):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    folder, pixels = pictures
    ours, file = inception
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(file),
    )
    found = extract_featuresdict_from_input_id(
        1, theirs, input1=str(folder), cuda=False, save_cpu_ram=True, batch_size=4, verbose=False
    )
    parts = ours.parts(pixels)
    for name, part in (("2048", "pool"), ("logits_unbiased", "logits")):
        assert found[name].std(0).mean() > 0.005, "they tell images apart"
        assert torch.allclose(parts[part], found[name], rtol=1e-4, atol=1e-5 * found[name].abs().max().item())
    from repa_scale.evaluate.image_sets import open_images

    read = np.concatenate(list(open_images(folder).read(0, 10, 4)))
    assert np.array_equal(read, pixels.permute(0, 2, 3, 1).numpy()), "the files are read as they were written"


def test_sfid_is_the_adm_suites_definition_in_numpy(pictures, inception):
    """The first 7 channels of mixed_6/conv (a convolution, normalised, ReLU), channels last, 2023 numbers."""
    extractor, file = inception
    tensors = {name: value.double().numpy() for name, value in torch.load(file).items()}
    entering = {}
    hook = extractor.network.network.Mixed_6d.register_forward_pre_hook(lambda _, x: entering.update(x=x[0]))
    spatial = extractor.parts(pictures[1])["spatial"]
    hook.remove()
    x = entering["x"].double().numpy()
    name = "Mixed_6d.branch1x1"
    y = np.einsum("nchw,oc->nohw", x, tensors[f"{name}.conv.weight"][:, :, 0, 0])
    bn = {key: tensors[f"{name}.bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")}
    y = (y - bn["running_mean"]) / np.sqrt(bn["running_var"] + 0.001) * bn["weight"] + bn["bias"]
    wanted = np.maximum(y, 0).transpose(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
    assert wanted.shape == (10, 17 * 17 * 7)
    assert np.allclose(spatial.numpy(), wanted, rtol=1e-4, atol=1e-4)
    # The distance of two halves, on a few numbers: of all, 5 images span too little for SciPy's root.
    varied = wanted.std(0).argsort()[[-1, -200, -400]]
    halves = [wanted[:5, varied], wanted[5:, varied]]
    covariances = [np.cov(half, rowvar=False) for half in halves]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    known = np.square(halves[0].mean(0) - halves[1].mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    ours = frechet_distance(Moments.of(spatial[:5, varied]), Moments.of(spatial[5:, varied]))
    assert ours == pytest.approx(known, rel=1e-3)


def test_resizing_is_pillows_within_a_level():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 300, 3), dtype=np.uint8)
    for size in (32, 300):
        images = np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in pixels])
        wanted = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
        ours = bicubic(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - np.stack(wanted)).max() <= 1


def test_effnet_gives_the_features_that_its_classifier_reads(pictures):
    import timm

    extractor = build_extractor("effnet-lite0")
    features = extractor(pictures[1])
    assert features.shape == (10, 1280) and features.dtype == torch.float32
    network = timm.create_model("tf_efficientnet_lite0").eval()
    own = extractor.network.network.state_dict()
    network.load_state_dict({**network.state_dict(), **own})
    with torch.no_grad():
        wanted = network.forward_head(network.forward_features((bicubic(pictures[1]) - 127) / 128), pre_logits=True)
    assert torch.allclose(features, wanted, rtol=1e-4, atol=1e-4)
    assert extractor.metric("fd") == "fd_effnet" and extractor.metric("precision") == "precision_effnet"


@pytest.mark.parametrize(
    "name, first", [("dinov2-vit-s", True), pytest.param("siglip2-vit-b", False, marks=pytest.mark.long)]
)
def test_encoders_give_their_class_token_or_the_mean_of_the_patches(pictures, name, first):
    extractor = build_extractor(name, "random")
    pixels = pictures[1][:2]
    network, spec = extractor.network.network, extractor.network.spec
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        tokens = network.forward_features((bicubic(pixels) / 255 - mean) / std)
    assert torch.allclose(extractor(pixels), tokens[:, 0] if first else tokens.mean(1), rtol=1e-5, atol=1e-5)
    assert extractor(pixels).shape == (2, spec.width)
    assert ("class token" in extractor.spec.pooling) == first
    assert extractor.metric("fd") == f"fd_{name.replace('-', '_')}_random", "untrained weights never pass for others"


def test_fid_is_a_name_of_trained_inception_alone(inception):
    assert inception[0].metric("fd") == "fid" and inception[0].metric("kid") == "kid"
    assert build_extractor("inception", "random").metric("fd") == "fd_inception_random"


def test_the_fingerprint_is_of_the_weights_and_the_rules(tmp_path, monkeypatch):
    import timm

    tensors = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(tensors, tmp_path / "one.pth")
    tensors["conv_stem.weight"][0, 0] += 1e-3
    torch.save(tensors, tmp_path / "other.pth")
    one, again, other = (
        build_extractor("effnet-lite0", str(tmp_path / f"{name}.pth")).fingerprint for name in ("one", "one", "other")
    )
    assert one == again != other
    monkeypatch.setattr(extractors, "VERSION", extractors.VERSION + 1)
    assert build_extractor("effnet-lite0", str(tmp_path / "one.pth")).fingerprint != one


def test_what_is_no_8_bit_image_is_refused():
    extractor = build_extractor("effnet-lite0", "random")
    for images in (torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(DataError, match=r"take \(N, 3, H, W\) uint8"):
            extractor(images)


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_URL", "http://127.0.0.1:9/weights-6726825d.pth")
    with pytest.raises(UserError, match="give --weights FILE, or use --extractor effnet-lite0"):
        build_extractor("inception")
    for name in ("inception", "effnet-lite0", "dinov2-vit-s"):
        with pytest.raises(DataError, match="there is no such file"):
            build_extractor(name, str(tmp_path / "none.pth"))
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 not one")
    with pytest.raises(DataError, match="cannot be read as weights"):
        build_extractor("inception", str(tmp_path / "damaged.pth"))
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match="--extractor inception"):
        build_extractor("inception", str(tmp_path / "small.pth"))
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        build_extractor("incepton")
