"""What samples are measured against: statistics of a reference set, read from an .npz or made once and cached."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from repa_scale import arithmetic
from repa_scale.checksums import checksum_file, default_algorithm
from repa_scale.errors import ConfigError, DataError
from repa_scale.evaluate.features import Features, collect
from repa_scale.evaluate.image_sets import ImageSet, npz_array, npz_arrays, open_images
from repa_scale.extractors import Extractor
from repa_scale.metrics.frechet import Moments
from repa_scale.ranks import Ranks
from repa_scale.statistics_file import read_statistics, statistics_name, write_statistics

FEATURES = 10_000  # of a reference that are kept, for the metrics of neighbours and kernels; as many as ADM's batches
SUITE = "https://github.com/openai/guided-diffusion/tree/main/evaluations"
NAMED = {
    "imagenet64": "VIRTUAL_imagenet64_labeled.npz",
    "imagenet128": "VIRTUAL_imagenet128_labeled.npz",
    "imagenet256": "VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": "VIRTUAL_imagenet512.npz",
}
FOLDER = "REPA_SCALE_REFERENCES"  # the environment variable with the folder of such files
# Parts of the features and the arrays of the ADM suite with their mean and covariance.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
UNKNOWN = 1 << 40  # images behind statistics that do not say: enough not to matter
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """How a reference is to be had.

    Attributes:
        size: (height, width) of the samples.
        features: whether rows of features are needed, and not their moments alone.
    """

    size: tuple[int, int]
    features: bool
    batch: int
    cache: Path


def cache_folder(given: str | None) -> Path:
    """`--cache`, or $XDG_CACHE_HOME/repa_scale, or ~/.cache/repa_scale."""
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repa_scale"


def locate(reference: str, cache: Path) -> Path:
    """The file or folder of `--reference`.

    Raises:
        ConfigError: a named reference whose file is not here.
    """
    if reference not in NAMED or Path(reference).exists():
        return Path(reference)
    folders = [Path(folder) for folder in (os.environ.get(FOLDER), cache) if folder]
    for folder in folders:
        if (folder / NAMED[reference]).is_file():
            return folder / NAMED[reference]
    raise ConfigError(
        f"--reference {reference}: {NAMED[reference]} is not in {' or '.join(map(str, folders))}; "
        f"fetch it ({SUITE}), then set {FOLDER} to its folder or give its path"
    )


def load_reference(
    path: Path,
    extractor: Extractor,
    ranks: Ranks,
    wanted: Wanted,
    progress: Callable[[str, int], Callable[[int], object]],
) -> Features:
    """Statistics of a reference set, complete on rank 0.

    Args:
        progress: (what is being done, images) -> what is called as images are done.

    Raises:
        DataError: not readable, of another size than the samples, or statistics of another extractor.
    """
    known = _statistics(path, extractor) if path.suffix == ".npz" else None
    if known and not (wanted.features and known.count):
        return known
    images = open_images(path)
    if images.size != wanted.size:
        raise DataError(
            f"the samples are {_by(wanted.size)}, the images of {path} {_by(images.size)}; give a reference of the "
            f"samples' size (repa-scale prepare IMAGES --out DATA --size {wanted.size[0]})"
        )
    made = _cached(images, extractor, ranks, wanted, progress)
    # Statistics that the file brings are of more images than it holds: they count.
    return replace(made, moments=known.moments, fingerprint=known.fingerprint) if known else made


def _statistics(path: Path, extractor: Extractor) -> Features | None:
    """Mean and covariance that an .npz brings; `count`: of its images. None: it holds images alone."""
    arrays = npz_arrays(path)
    if "mu" not in arrays and "sigma" not in arrays:
        return None
    moments = {}
    for part, names in STATISTICS.items():
        if part == "spatial" and "mu_s" not in arrays:
            continue
        mean, covariance = (_numbers(path, name, arrays) for name in names)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(
                f"{path}: {names[0]} of shape {tuple(mean.shape)} and {names[1]} of {tuple(covariance.shape)} are no "
                "mean and covariance; they must be (d,) and (d, d)"
            )
        moments[part] = Moments.from_covariance(UNKNOWN, mean, covariance)
    width = len(moments["pool"].mean)
    if extractor.name != "inception" or width != 2048:
        raise DataError(
            f"{path} holds statistics of {width} numbers, as of Inception's 2048, and --extractor is {extractor.name}; "
            "use --extractor inception, or give the reference's images"
        )
    count = arrays["arr_0"][0][0] if "arr_0" in arrays else 0
    return Features(path.name, checksum_file(path, default_algorithm()), count, moments)


def _numbers(path: Path, name: str, arrays: dict[str, tuple]) -> Tensor:
    if name not in arrays or arrays[name][1].kind != "f":
        raise DataError(f"{path} has no {name} of numbers beside mu; a reference has mu and sigma, or images in arr_0")
    values = torch.from_numpy(npz_array(path, name)).double()
    if not torch.isfinite(values).all():
        raise DataError(f"{path}: {name} is not finite; fetch or make it again")
    return values


def _cached(
    images: ImageSet,
    extractor: Extractor,
    ranks: Ranks,
    wanted: Wanted,
    progress: Callable[[str, int], Callable[[int], object]],
) -> Features:
    """From the cache, else made by all ranks and put there. The key is of the contents, the extractor with its weights
    and resize rule, the kind of device with its arithmetic, and the versions."""
    fingerprint, found = "", None
    if ranks.is_main:
        fingerprint = images.fingerprint()
        essence = (FEATURES, fingerprint, extractor.fingerprint)
        file = wanted.cache / statistics_name("reference", *essence, arithmetic=arithmetic.name(ranks.device, "fp32"))
        found = read_statistics(file)
    if ranks.broadcast_object(found is not None):
        return Features(images.name, fingerprint, images.count, *(found or ()))
    chosen = torch.randperm(images.count, generator=torch.Generator().manual_seed(0))[:FEATURES].sort().values
    done = progress(f"features of {images.name}", images.count)
    made = collect(images, extractor, ranks, wanted.batch, {"pool": chosen}, done, fingerprint)
    if ranks.is_main:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(file, made.moments, made.kept)
        except OSError as error:  # costs time and no result
            log.warning("the statistics of %s are not cached: %s", made.name, error)
    return made


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
