"""Makes checkpoints of random weights for the tests, as any number of ranks would have written them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from launching import SMALL
from torch import Tensor

from repa_scale.checkpoint import KINDS, Piece, publish, step_folder, write_manifest, write_pieces
from repa_scale.compose import compose
from repa_scale.config import Config
from repa_scale.objective import build_objective
from repa_scale.state import NOT_PORTABLE


def make_run(
    run: Path, words: tuple[str, ...] = (), ranks: int = 2, step: int = 12, kinds: tuple[str, ...] = KINDS
) -> tuple[Config, dict[str, dict[str, Tensor]]]:
    """A run folder with one checkpoint; returns its configuration and {kind: {name: values}}.

    The values depend on the names alone, not on the ranks. No tensor is cut where another is.
    """
    config = compose([*SMALL, f"run.dir={run}", *words])
    shapes = {name: tuple(value.shape) for name, value in build_objective(config).named_parameters()}
    values: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for number, (name, shape) in enumerate(shapes.items()):
        for offset, kind in enumerate(kinds):
            generator = torch.Generator().manual_seed(4 * number + offset)
            values[kind][name] = 0.1 * torch.randn(shape, generator=generator)
    folder = run / "checkpoints" / f"{step_folder(step)}.tmp-1"
    folder.mkdir(parents=True)
    entries = [write_pieces(folder, rank, ranks, _share(values, shapes, rank, ranks)) for rank in range(ranks)]
    portable = {key: value for key, value in asdict(config).items() if key not in NOT_PORTABLE}
    portable["data"].pop("path")
    facts = {
        "step": step,
        "samples": step * config.train.global_batch,
        "identity": {"data.fingerprint": "f" * 32},
        "identity_hash": "0123456789abcdef",
        "pair_id": "fedcba9876543210",
        "config": portable,
        "world_size": ranks,
        "zero_stage": 3,
        "versions": {"git_commit": "c" * 40},
        "scalars": {},
    }
    write_manifest(folder, entries, facts)
    publish(folder, folder.with_name(step_folder(step)))
    return config, values


def _share(values: dict, shapes: dict, rank: int, ranks: int) -> list[Piece]:
    pieces = []
    for number, (name, shape) in enumerate(shapes.items()):
        total = int(torch.Size(shape).numel())
        cuts = [0, *sorted((total * (part + 1) + 7 * number) // (ranks + 1) % (total + 1) for part in range(ranks - 1))]
        start, stop = ([*cuts, total][rank + i] for i in (0, 1))
        pieces.append(Piece(name, shape, start, stop, {k: v[name].flatten()[start:stop] for k, v in values.items()}))
    return pieces
