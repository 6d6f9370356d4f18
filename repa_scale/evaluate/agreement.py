"""Label agreement: does a classifier of the real images read the samples as the labels they were asked for?

It is a yardstick for small images, such as the demo's digits. It is no measure of variety.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from repa_scale.data.batches import open_dataset
from repa_scale.errors import ConfigError, DataError, ExitCode, require
from repa_scale.rng import permutation

MAX_PIXELS = 64  # an axis: on larger images pixels say little of the class
HELD_OUT = 0.2  # share of the real images that the classifier is tested on


def run(args: argparse.Namespace) -> int:
    """Prints the label agreement of SOURCE/samples.npz and writes evaluation.json beside it."""
    source = Path(args.source)
    file = source if source.suffix == ".npz" else source / "samples.npz"
    folder = file.parent
    samples, labels = _read_samples(file)
    images, truth = _read_real(args.data, args.limit)
    if images.shape[1:] != samples.shape[1:]:
        raise DataError(
            f"{folder} has images of {samples.shape[1:3]}, {args.data} of {images.shape[1:3]}; use its data set"
        )
    agreement, real = label_agreement(images, truth, samples, labels)
    result = {
        "label_agreement": agreement,
        "samples": len(samples),
        "agreement_on_held_out_real_images": real,
        "classifier": "1 nearest neighbour on pixels",
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"label agreement {agreement:.1%} of {len(samples)} samples "
        f"(the same classifier reads {real:.1%} of held-out real images as labelled)"
    )
    return ExitCode.COMPLETED


def label_agreement(
    images: np.ndarray, truth: np.ndarray, samples: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Shares of the samples, and of held-out real images, that a nearest-neighbour classifier reads as labelled.

    Args:
        images, truth: (M, H, W, 3) uint8 real images and their labels (M,).
        samples, labels: (N, H, W, 3) uint8 and the labels asked for (N,).
    """
    neighbours = require("sklearn.neighbors", "eval")
    order = permutation(0, "held-out images", 0, len(images)).numpy()
    held_out, fitted = np.split(order, [max(1, int(HELD_OUT * len(images)))])
    classifier = neighbours.KNeighborsClassifier(1).fit(_flat(images[fitted]), truth[fitted])
    return float(classifier.score(_flat(samples), labels)), float(
        classifier.score(_flat(images[held_out]), truth[held_out])
    )


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def _read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as archive:
            return archive["arr_0"], archive["labels"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; make it with: repa-scale sample RUN --out {path.parent}") from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error}); draw the samples again") from None


def _read_real(path: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    from repa_scale.data.batches import decode

    dataset = open_dataset(path)
    if dataset.image_size > MAX_PIXELS or len(dataset.class_names) < 2:
        raise ConfigError(
            f"--data {path}: label agreement needs classes and images of at most {MAX_PIXELS} pixels; "
            f"this set has {len(dataset.class_names)} classes and {dataset.image_size} pixels"
        )
    chosen = permutation(0, "evaluated images", 0, dataset.count)[:limit].tolist()
    rows = [dataset.reader[i] for i in chosen]
    return np.stack([decode(row["image"]) for row in rows]), np.array([row["label"] for row in rows])
