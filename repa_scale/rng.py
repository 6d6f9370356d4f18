"""Counter-based random numbers: pure functions of (seed, purpose, step, sample index, element).

A generator with a state gives other numbers as soon as ranks, micro batches or a resume change who draws when. Philox
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter into random bits directly, so
every number is a function of what it is for. All arithmetic is on int64 tensors and float64, on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 4  # 32-bit words that one counter gives
CHUNK = 1 << 20  # counters a call of `*_range`, so that a large slice does not need ten times its memory


Key = tuple[int, int] | tuple[Tensor, Tensor]


def normal(
    seed: int, purpose: str, step: int, index: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers. index: (N,) int64 global sample indices -> (N, *shape) `dtype`."""
    return _to_normal(_sample_words(_key(seed, purpose), step, index, shape)).to(dtype).view(len(index), *shape)


def normal_of_seeds(
    seeds: Sequence[int],
    purpose: str,
    step: int,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample number 0 of each seed: row i is `normal(seeds[i], purpose, step, [0], shape)`. -> (N, *shape) `dtype`."""
    return normal_of_keys(keys_of_seeds(seeds, purpose, device), step, shape, dtype=dtype)


def keys_of_seeds(seeds: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> Tensor:
    """(N, 2, 1) int64: for `normal_of_keys`, which then copies nothing to the device."""
    return torch.tensor([_key(seed, purpose) for seed in seeds], device=device).view(-1, 2, 1)


def normal_of_keys(keys: Tensor, step: int, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`normal_of_seeds` of seeds whose keys were made before: (N, 2, 1) int64 -> (N, *shape) `dtype`."""
    index = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    words = _sample_words((keys[:, 0], keys[:, 1]), step, index, shape)
    return _to_normal(words).to(dtype).view(len(keys), *shape)


def uniform(
    seed: int, purpose: str, step: int, index: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers, never 0 and never 1. index: (N,) int64 global sample indices -> (N, *shape) `dtype`."""
    return _to_uniform(_sample_words(_key(seed, purpose), step, index, shape)).to(dtype).view(len(index), *shape)


def bernoulli(p: float, seed: int, purpose: str, step: int, index: Tensor) -> Tensor:
    """True with probability p. index: (N,) int64 global sample indices -> (N,) bool."""
    return uniform(seed, purpose, step, index, (), dtype=torch.float64) < p


def normal_range(seed: int, purpose: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements [start, stop) of one endless stream of standard normal numbers -> (stop - start,) float32."""
    return _range(_to_normal, seed, purpose, start, stop, device)


def uniform_range(seed: int, purpose: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements [start, stop) of one endless stream of uniform numbers in (0, 1) -> (stop - start,) float32."""
    return _range(_to_uniform, seed, purpose, start, stop, device)


def permutation(seed: int, purpose: str, epoch: int, n: int) -> Tensor:
    """A random order of range(n): the order of n random 64-bit keys. -> (n,) int64."""
    counter = torch.arange(n)
    high, low, _, _ = philox(
        counter & MASK, counter >> 32, torch.tensor(epoch & MASK), torch.tensor(0), _key(seed, purpose)
    )
    return torch.argsort((high << 32) | low, stable=True)


def hash64(ids: Tensor) -> Tensor:
    """A 64-bit hash of each id (the finaliser of splitmix64). (N,) int64 -> (N,) int64."""
    x = ids + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def fingerprint(ids: Tensor) -> int:
    """The sum of the ids' hashes modulo 2**64: the same for any order, and a sum over ranks of their parts."""
    return int(hash64(ids).sum()) % 2**64


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for every 128-bit counter.

    Args:
        c0, c1, c2, c3: int64 tensors that hold 32-bit words and broadcast against each other.
        key: two 32-bit words; or int64 tensors of them, which broadcast like the counters.
    """
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap modulo 2**64 in int64; the mask makes the arithmetic shift a logical one.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _sample_words(key: Key, step: int, index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """32-bit words of each sample, (N, LANES, blocks), and how many elements of it are wanted.

    The counter is (block of elements, low and high word of the index, step): no two elements share one.
    """
    count = math.prod(shape)
    blocks = torch.arange(-(-count // LANES), device=index.device)[None]
    index = index[:, None]
    step_word = torch.full_like(index, step & MASK)
    words = philox(blocks, index & MASK, (index >> 32) & MASK, step_word, key)
    return torch.stack(words, dim=1), count


def _range(convert, seed: int, purpose: str, start: int, stop: int, device: torch.device | str) -> Tensor:
    pieces = []
    at = start
    while at < stop:
        first = at // LANES
        last = min(-(-stop // LANES), first + CHUNK)
        block = torch.arange(first, last, device=device)
        zero = torch.zeros_like(block)
        words = torch.stack(philox(block & MASK, block >> 32, zero, zero, _key(seed, purpose)))
        # Here a block's four elements stand side by side, so that a range can begin anywhere.
        values = convert((words[None], LANES * len(block))).view(LANES, -1).T.reshape(-1)
        end = min(stop, last * LANES)
        pieces.append(values[at - first * LANES : end - first * LANES].float())
        at = end
    return torch.cat(pieces) if pieces else torch.empty(0, device=device)


def _to_uniform(words: tuple[Tensor, int]) -> Tensor:
    """(k + 1/2) / 2**23 of the upper 23 bits: exact in float32, and neither 0 nor 1."""
    bits, count = words
    return ((bits >> 9).double() + 0.5).mul_(2.0**-23).flatten(1)[:, :count]


def _to_normal(words: tuple[Tensor, int]) -> Tensor:
    """Box-Muller in float64 on pairs of words: lanes 0 and 1, lanes 2 and 3. Largest value 6.7."""
    bits, count = words
    u = (bits.double() + 0.5).mul_(2.0**-32)
    radius = u[:, 0::2].log().mul_(-2.0).sqrt_()
    angle = u[:, 1::2] * (2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1).flatten(1)[:, :count]


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
