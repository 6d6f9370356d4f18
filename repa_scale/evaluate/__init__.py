"""`repa-scale evaluate`: what samples are worth (images.py, agreement.py), or what a model's hidden tokens hold
(representation.py). Reading the command line and the choice between them live here."""

from __future__ import annotations

import argparse
from pathlib import Path

from repa_scale.errors import ConfigError, DataError, ExitCode

EXAMPLES = """examples:
  repa-scale evaluate samples.npz --reference imagenet256 --extractor inception --metrics fid sfid is precision recall
  repa-scale evaluate samples --reference data/cifar10 --run runs/first
  repa-scale evaluate runs/first --data data/held_out --alignment --linear-probe --denoising
  repa-scale evaluate samples --data data/digits          label agreement: are samples read as their labels?
"""
MARKS = ("checkpoints", "manifest.json", "config.yaml")  # of a run or a checkpoint; an export has config.json


def main(argv: list[str]) -> int:
    """Evaluates images or a checkpoint, as the source says; features, metrics and all in float32 as such."""
    from repa_scale import arithmetic
    from repa_scale.evaluate import representation

    parser = argparse.ArgumentParser(
        prog="repa-scale evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    representation.add_options(parser)
    _add_options(parser)
    args = parser.parse_args(argv)
    with arithmetic.within("fp32"):
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from repa_scale.evaluate import representation

    source = Path(args.source)
    if is_model(source):
        return representation.run(args)
    if not source.exists():
        raise DataError(f"{source} does not exist; give samples.npz, a folder of images, or a run or checkpoint")
    if args.reference:
        from repa_scale.evaluate import images

        code = images.run(args)
        if code or not args.data:
            return code
    elif not args.data:
        raise ConfigError(
            f"{source} holds samples: give --reference (a set, folder, .npz or imagenet256) for their distance to it, "
            "or --data of the run's set for label agreement"
        )
    from repa_scale.evaluate import agreement

    return agreement.run(args) or ExitCode.COMPLETED


def is_model(source: Path) -> bool:
    """Whether a run, a checkpoint or an export lies there, rather than images."""
    export = (source / "config.json").is_file() and any(source.glob("*.safetensors"))
    return source.is_dir() and (export or any((source / mark).exists() for mark in MARKS))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="samples.npz, a folder with it or with images; or a run, checkpoint or export")
    parser.add_argument("--data", help="a prepared data set (of samples: the run's, for label agreement)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    group = parser.add_argument_group("of samples")
    group.add_argument("--reference", help="a prepared data set, a folder of images, an .npz, or imagenet256")
    group.add_argument(
        "--extractor",
        default="effnet-lite0",
        help="inception, effnet-lite0 (default), dinov2-vit-l, or another encoder",
    )
    group.add_argument(
        "--weights", default="", help="the extractor's weights, where they are not fetched: a local file"
    )
    group.add_argument("--inception-weights", default="", help="the same, for --extractor inception alone")
    group.add_argument("--metrics", nargs="+", help="of fid sfid is fd kid precision recall (default: all there are)")
    group.add_argument("--run", help="the run that the samples are of: values are added to RUN/evaluations.jsonl")
    group.add_argument("--step", type=int, help="of the samples' checkpoint, where no sidecar says it")
    group.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    group.add_argument("--cache", help="folder of reference statistics (default: ~/.cache/repa_scale)")
    group.add_argument("--limit", type=int, default=20_000, help="of label agreement: real images to fit on")
