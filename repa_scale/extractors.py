"""Networks that turn 8-bit images into the features that metrics/ measures; one row of a table an extractor."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repa_scale import arithmetic, torchvision_fix
from repa_scale.checksums import checksum_file
from repa_scale.encoders import RANDOM_SEED, _load_package, build_encoder
from repa_scale.errors import ConfigError, DataError, UserError, did_you_mean, reason, require
from repa_scale.models.weights import check_names
from repa_scale.sizes import ENCODERS, encoder_spec

VERSION = 1  # of the features: of everything here that decides their values; part of each cache's key
INPUT = 224  # pixels an axis, of all but Inception
SPATIAL_CHANNELS = 7  # of Mixed_6d's first branch, as the ADM suite takes them: 17 x 17 x 7 = 2023 numbers
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_HASH = "6726825d"  # the file's SHA-256 begins so
# Encoders whose class token was trained to stand for the image; of the others the mean of the patch tokens.
CLASS_TOKEN = ("dinov2", "dinov3", "dino-", "mocov3", "clip")
BICUBIC = f"bicubic with antialiasing to {INPUT}, rounded to 8 bits"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractorSpec:
    """One extractor.

    Attributes:
        suffix: of the metrics' names (`fd_effnet`); empty: the names that the field reserves for Inception.
        resize: how an image reaches the network, in words: it belongs to what makes two values comparable.
        pooling: what the features are, in words.
        build: weights -> the network, which maps (N, 3, H, W) uint8 to a dictionary of (N, d) float32: `pool`, and
            of Inception `logits` and `spatial`.
        weights: the default.
    """

    suffix: str
    resize: str
    pooling: str
    build: Callable[[str], nn.Module]
    weights: str = "hub"


class Extractor(nn.Module):
    """A network with its name and the fingerprint of its weights. It computes in float32 as such: TF32 moves a FID in
    its third digit.

    Attributes:
        name: row of the table.
        spec: that row.
        random: its weights were never trained; the metrics' names say so.
        fingerprint: 16 hex digits of name, weights, resize rule and version: equal features for equal images.
    """

    def __init__(self, name: str, spec: ExtractorSpec, network: nn.Module, random: bool = False) -> None:
        super().__init__()
        self.name, self.spec, self.random = name, spec, random
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = _fingerprint(name, spec, network)

    @torch.inference_mode()
    def parts(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 -> {"pool": (N, d), ...} float32; of Inception also `logits` (N, 1008) and `spatial`
        (N, 2023).

        Raises:
            DataError: the images are not 8-bit colour images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}: extractors take (N, 3, H, W) uint8; "
                "round them to 8 bits as they will be stored"
            )
        device = next(self.network.parameters()).device
        with arithmetic.within("fp32"):
            found = self.network(images.to(device, non_blocking=True))
        return {name: value.float() for name, value in found.items()}

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, d) float32."""
        return self.parts(images)["pool"]

    def metric(self, kind: str) -> str:
        """The name of a metric on these features: `fd` is `fid` for Inception alone, else `fd_effnet` and the like."""
        if self.random:
            return f"{kind}_{self.spec.suffix or self.name}_random"
        if self.spec.suffix:
            return f"{kind}_{self.spec.suffix}"
        return "fid" if kind == "fd" else kind


def build_extractor(name: str, weights: str = "", device: torch.device | str = "cpu") -> Extractor:
    """An extractor, frozen, in float32.

    Args:
        name: `inception`, `effnet-lite0`, or any encoder of `sizes.ENCODERS`.
        weights: empty: the row's default (a hub, or the package that brings them); a local file; `random`, for tests.

    Raises:
        ConfigError: unknown extractor.
        UserError: its weights cannot be had or do not fit.
    """
    spec = extractor_spec(name)
    try:
        network = spec.build(weights or spec.weights)
    except UserError as error:
        # encoders.py speaks of the keys of a training run.
        text = str(error).replace("alignment.NAME.weights=path", "--weights FILE")
        text = text.replace("alignment weights=", "--weights ").replace("weights=package", "--weights package")
        raise type(error)(text) from None
    return Extractor(name, spec, network, weights == "random").to(device)


def extractor_spec(name: str) -> ExtractorSpec:
    """The row of an extractor.

    Raises:
        ConfigError: unknown name.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    if name not in ENCODERS:
        raise ConfigError(f"--extractor {name} is not an extractor{did_you_mean(name, [*EXTRACTORS, *ENCODERS])}")
    pooling = "class token" if _has_class_token(name) else "mean of the patch tokens"
    return ExtractorSpec(name.replace("-", "_"), BICUBIC, pooling, lambda weights: _Tokens(name, weights))


def bicubic(images: Tensor, size: int = INPUT) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, size, size) float32 whole numbers in [0, 255]: what Pillow's bicubic filter gives,
    on any device (within one level: it sums in integers). Like Pillow it rounds between the axes."""
    x = images.float()
    for shape in ((x.shape[2], size), (size, size)):
        if x.shape[2:] != shape:
            x = (
                F.interpolate(x, size=shape, mode="bicubic", align_corners=False, antialias=True)
                .round_()
                .clamp_(0, 255)
            )
    return x


class _Tokens(nn.Module):
    """An encoder of sizes.ENCODERS with its pooled token, at 224 pixels (FD-DINOv2: Stein et al. 2023)."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.spec = encoder_spec(name)
        side = INPUT // self.spec.stride
        encoder = build_encoder(name, weights, (side, side), "cpu", torch.float32, kernel="torch")
        self.network = encoder.network
        self.first = _has_class_token(name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = bicubic(images) / 255
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.spec.mean, self.spec.std))
        x = (x - mean) / std
        if self.spec.kind == "map":
            return {"pool": self.network(x).mean((2, 3))}
        tokens = self.network.forward_features(x)
        return {"pool": tokens[:, 0] if self.first else tokens[:, self.spec.prefix_tokens :].mean(1)}


class _EfficientNet(nn.Module):
    """EfficientNet-Lite0 up to its pooled 1280 features, the ones that its classifier reads."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        torchvision_fix.ensure()
        timm = require("timm", "train")
        spec = encoder_spec("effnet-lite0")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            self.network = timm.create_model(spec.timm_name, pretrained=False).eval()
        if weights == "package":
            _load_package(self.network, spec, "effnet-lite0")
        elif weights != "random":
            _fill(self.network, _read(Path(weights)), weights, "effnet-lite0")
        self.network.classifier = nn.Identity()
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = ((bicubic(images) - 127) / 128).contiguous(memory_format=torch.channels_last)
        return {"pool": self.network(x)}


class _Inception(nn.Module):
    """torch-fidelity's Inception of 2015, whose weights are those of the ADM suite's graph: resized to 299 as
    TensorFlow 1 does, x in [-1, 1)."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        torchvision_fix.ensure()
        library = require("torch_fidelity.feature_extractor_inceptionv3", "eval")

        class Network(library.FeatureExtractorInceptionV3):
            def load_state_dict(self, tensors, *args, **keywords):
                return super().load_state_dict(tensors, *args, **keywords) if tensors else None

        nothing = io.BytesIO()  # so that the class neither downloads nor reads: weights are loaded and checked below
        torch.save({}, nothing)
        nothing.seek(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            self.network = Network("inception", ["2048", "logits_unbiased"], nothing).eval()
            for module in self.network.modules():
                if isinstance(module, nn.Conv2d):  # of random weights: torch's default would let 94 layers fade out
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights != "random":
            path = _inception_file() if weights == "hub" else Path(weights)
            _fill(self.network, _read(path), str(path), "inception")
            if not checksum_file(path, "sha256").startswith(f"sha256:{INCEPTION_HASH}"):
                log.warning("%s is not the file of %s: a FID by it may differ from other people's", path, INCEPTION_URL)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        for module in self.network.modules():
            if type(module).__name__ == "BasicConv2d":  # what normalises is part of the convolution before it
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "logits": logits, "spatial": self._spatial}


def _inception_file() -> Path:
    """torch-fidelity's weights in torch's cache, fetched if they are not there; their name carries their hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("fetching %s", INCEPTION_URL)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_HASH, progress=False)
        except Exception as error:  # urllib and ssl raise many kinds
            raise UserError(
                f"the weights of --extractor inception cannot be fetched ({reason(error)}); fetch {INCEPTION_URL} "
                "where there is a network and give --weights FILE, or use --extractor effnet-lite0"
            ) from None
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"--weights {path}: there is no such file; give the path of a weight file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise DataError(f"--weights {path} cannot be read as weights ({reason(error)}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"--weights {path} does not hold a dictionary of tensors; give a file of weights")
    return tensors


def _fill(network: nn.Module, tensors: dict[str, Tensor], source: str, name: str) -> None:
    shapes = [{key: tuple(value.shape) for key, value in tree.items()} for tree in (tensors, network.state_dict())]
    check_names(*shapes, f"{source} (--extractor {name})")
    network.load_state_dict(tensors)


def _has_class_token(name: str) -> bool:
    return name.startswith(CLASS_TOKEN)


def _fingerprint(name: str, spec: ExtractorSpec, network: nn.Module) -> str:
    digest = hashlib.sha256(f"{VERSION} {name} {spec.resize} {spec.pooling}".encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


EXTRACTORS: dict[str, ExtractorSpec] = {
    "inception": ExtractorSpec(
        "", "bilinear to 299 as TensorFlow 1 does, without antialiasing", "pool_3, 2048 numbers", _Inception
    ),
    "effnet-lite0": ExtractorSpec("effnet", BICUBIC, "pooled features, 1280 numbers", _EfficientNet, "package"),
}
