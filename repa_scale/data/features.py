"""Features that lie beside the pictures of a set: VAE moments and encoder tokens, as bytes and back.

What they are of stands in the manifest's recipe; training compares it with its configuration. Computing them is the
business of repa_scale/features.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from repa_scale.arithmetic import spelled
from repa_scale.errors import ConfigError, DataError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
MOMENTS_DTYPES = ("fp32", "fp16")  # bf16 would round the posterior away
TOKENS_DTYPES = ("bf16", "fp16", "int8")
SCALE_BYTES = 4  # of int8: one fp32 scale a token
FLIPPED = ".flipped"  # the column of the mirrored picture's features


@dataclass(frozen=True)
class Stored:
    """One feature of every sample.

    Attributes:
        kind: `moments` or `tokens`.
        network: a row of sizes.LATENTS or sizes.ENCODERS.
        weights: `hub`, `package`, `random`, or the name of a file or folder.
        weights_sha256: of the network's tensors.
        dtype: fp32 | fp16 | bf16 | int8 (one scale a token).
        shape: (2C, h, w), or (C, h, w) of a latent space without posterior; (T, z).
        arithmetic: kind of device and what it computed in (arithmetic.name), such as `cuda bf16`; empty: fp32 on a CPU,
            or not recorded, in a set of an earlier release.
    """

    kind: str
    network: str
    weights: str
    weights_sha256: str
    dtype: str
    shape: tuple[int, ...]
    arithmetic: str = ""

    @property
    def column(self) -> str:
        return self.kind if self.kind == "moments" else column_of_tokens(self.network)

    def columns(self, flip: bool) -> tuple[str, ...]:
        return (self.column, self.column + FLIPPED) if flip else (self.column,)

    @property
    def bytes(self) -> int:
        """Of one image."""
        return prod(self.shape) * BYTES[self.dtype] + (SCALE_BYTES * self.shape[0] if self.dtype == "int8" else 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON; without `arithmetic` where it is empty, so that the fingerprints of earlier sets stay."""
        value = {**asdict(self), "shape": list(self.shape)}
        return value if self.arithmetic else {key: value[key] for key in value if key != "arithmetic"}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Stored:
        return cls(**{**value, "shape": tuple(value["shape"])})

    def pack(self, values: Tensor) -> list[bytes | None]:
        """(N, *shape) float -> the bytes of each image; None where a value is not finite in the stored dtype."""
        values = values.detach().float().cpu()
        if self.dtype == "int8":
            peak = values.abs().amax(dim=2, keepdim=True)
            scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
            whole = (values / scale).round()
            finite = torch.isfinite(scale * 127).flatten(1).all(dim=1) & torch.isfinite(whole).flatten(1).all(dim=1)
            bodies = whole.nan_to_num(0).clamp(-127, 127).to(torch.int8).numpy()
            heads = scale.squeeze(2).numpy()
            packed = [head.tobytes() + body.tobytes() for head, body in zip(heads, bodies, strict=True)]
        else:
            stored = values.to(DTYPES[self.dtype]).contiguous()
            finite = torch.isfinite(stored).flatten(1).all(dim=1)
            raw = stored.view(torch.uint8 if self.dtype == "fp32" else torch.int16).numpy()
            packed = [row.tobytes() for row in raw]
        return [data if good else None for data, good in zip(packed, finite.tolist(), strict=True)]

    def unpack(self, raw: Tensor) -> Tensor:
        """(N, bytes) uint8 -> (N, *shape), in the stored dtype; int8 becomes fp32."""
        if self.dtype == "int8":
            head = SCALE_BYTES * self.shape[0]
            scale = raw[:, :head].contiguous().view(torch.float32)
            return raw[:, head:].contiguous().view(torch.int8).view(-1, *self.shape) * scale[:, :, None]
        return raw.view(DTYPES[self.dtype]).view(-1, *self.shape)

    def unpack_one(self, data: bytes, what: str) -> Tensor:
        """The bytes of one image -> its values.

        Raises:
            DataError: another number of bytes.
        """
        if len(data) != self.bytes:
            raise DataError(f"{what}: {self.column} has {len(data)} bytes instead of {self.bytes}; prepare it again")
        return self.unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])[0]


def other_arithmetic(a: dict[str, Any], b: dict[str, Any], places: tuple[str, str] = ("there", "here")) -> str:
    """Which features of two recipes that agree in all else were computed in different arithmetic, in words; empty: they
    differ in more, or not at all."""
    if without_arithmetic(a) != without_arithmetic(b):
        return ""
    pairs = zip(a.get("features", ()), b.get("features", ()), strict=True)
    return "; ".join(
        f"{one['kind']} of {one['network']} by {spelled(one.get('arithmetic', ''))} {places[0]}, by "
        f"{spelled(other.get('arithmetic', ''))} {places[1]}"
        for one, other in pairs
        if one.get("arithmetic") != other.get("arithmetic")
    )


def why_another(there: dict[str, Any], job: dict[str, Any]) -> str:
    """Why a preparation that was begun (job.json) is not this one; empty: it is."""
    if there == job:
        return ""
    same = there.get("source") == job["source"] and isinstance(there.get("recipe"), dict)
    computed = other_arithmetic(there["recipe"], job["recipe"]) if same else ""
    return f"{computed}: see --device" if computed else "other images or another recipe"


def without_arithmetic(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON, but for what its features were computed in."""
    if "features" not in recipe:
        return recipe
    plain = [{key: one[key] for key in one if key != "arithmetic"} for one in recipe["features"]]
    return {**recipe, "features": plain}


def column_of_tokens(encoder: str) -> str:
    return f"tokens.{encoder}"


def stored_features(manifest: dict[str, Any]) -> list[Stored]:
    """What the samples of a set hold besides the picture.

    Raises:
        DataError: a recipe that this program does not understand.
    """
    recipe = manifest["recipe"]
    try:
        found = [Stored.from_dict(value) for value in recipe.get("features", ())]
        known = all(one.dtype in BYTES and one.kind in ("moments", "tokens") and one.bytes > 0 for one in found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the features in the recipe of dataset.json are damaged ({error}); prepare again") from None
    if not known:
        raise DataError("the recipe of dataset.json has features that this program does not know; use a newer one")
    return found


@dataclass(frozen=True)
class Cached:
    """Which stored features a run reads.

    Attributes:
        moments: None: latents are made from the pictures.
        tokens: by encoder; empty: targets are made from the pictures.
        pictures: whether the pictures are needed at all.
    """

    moments: Stored | None = None
    tokens: tuple[Stored, ...] = ()
    pictures: bool = True

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.tokens if self.moments is None else (self.moments, *self.tokens)

    def buffers(self, count: int) -> dict[str, Tensor]:
        """(count, bytes) uint8 by column, for the bytes of a batch as they are stored."""
        return {one.column: torch.empty(count, one.bytes, dtype=torch.uint8) for one in self.stored}

    def places(self, buffers: dict[str, Tensor], row: int, flipped: bool) -> dict[str, memoryview]:
        """Where each stored column of the sample in `row` belongs."""
        return {
            one.column + (FLIPPED if flipped else ""): memoryview(buffers[one.column][row].numpy())
            for one in self.stored
        }

    def values(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """By column: moments (N, 2C, h, w) fp32; tokens (N, T, z) as stored, or fp32 where that is int8."""
        values = {one.column: one.unpack(buffers[one.column]) for one in self.stored}
        if self.moments is not None:
            values["moments"] = values["moments"].float()
        return values


def choose_features(
    manifest: dict[str, Any],
    source: str,
    latents: tuple[str, str],
    moments_shapes: Iterable[tuple[int, ...]],
    encoders: Iterable[tuple[str, str]],
    tokens: int,
) -> Cached:
    """What a run with `data.source=source` reads, compared with what the set holds.

    Args:
        latents: name and weights of the configuration's latent space.
        moments_shapes: those that it can have: with posterior, and without.
        encoders: name and weights of each target encoder; none for a baseline.
        tokens: an image has that many in the transformer.

    Raises:
        ConfigError: the set lacks the feature, or it is of another network; names both.
    """
    encoders = list(encoders)
    if source == "image":
        return Cached()
    stored = stored_features(manifest)
    moments = next((one for one in stored if one.kind == "moments"), None)
    if moments is None:
        raise ConfigError(
            f"data.source={source}, but the set holds no moments; prepare it with --moments {latents[0]}, "
            "or use data.source=image"
        )
    _same(moments, latents, "latents", "latents.name")
    if moments.shape not in set(moments_shapes):
        raise ConfigError(f"data.source={source}: the set's moments have the shape {moments.shape}; prepare it again")
    chosen = []
    if source == "moments+tokens":
        for name, weights in encoders:
            one = next((one for one in stored if one.kind == "tokens" and one.network == name), None)
            if one is None:
                held = ", ".join(s.network for s in stored if s.kind == "tokens") or "none"
                raise ConfigError(
                    f"data.source={source}: the set holds no tokens of encoder={name} (it holds: {held}); "
                    f"prepare it with --tokens {name}, or use data.source=moments"
                )
            _same(one, (name, weights), "encoder", "alignment.NAME.encoder")
            if one.shape[0] != tokens:
                raise ConfigError(
                    f"data.source={source}: the set holds {one.shape[0]} tokens an image of encoder={name}, but the "
                    f"model has {tokens}; prepare it with --token-grid {int(tokens**0.5)}"
                )
            chosen.append(one)
    return Cached(moments, tuple(chosen), pictures=bool(encoders) and not chosen)


def _same(stored: Stored, wanted: tuple[str, str], what: str, key: str) -> None:
    name, weights = wanted
    if stored.network != name:
        raise ConfigError(
            f"{key}={name}, but the {stored.kind} of the set are of {stored.network}; use {key}={stored.network}, "
            f"prepare the set with --{stored.kind} {name}, or use data.source=image"
        )
    if stored.weights != base_name(weights):
        raise ConfigError(
            f"the set's {stored.kind} of {name} were made with the weights {stored.weights}, but the run's {what} "
            f"has {weights}; use the same, or prepare the set with --{stored.kind} {name}={weights}"
        )


def base_name(weights: str) -> str:
    """A file or folder counts by its name: where it lies may differ between machines."""
    return weights.rstrip("/").rsplit("/", 1)[-1]
