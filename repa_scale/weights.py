"""Where the weights of encoders and VAEs lie: the hub's cache on this node. Fetching them once, checking their hashes.

A file that the cache holds is used without asking the hub, so that many ranks never ask it at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repa_scale.config import Config
from repa_scale.errors import DataError, UserError, reason, require
from repa_scale.sizes import encoder_spec, latent_spec

WEIGHTS = "model.safetensors"  # of timm's repositories
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
CHUNK = 1 << 22


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub, and what needs it (`encoder=dinov2-vit-b`)."""

    repo: str
    name: str
    need: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


def needed(config: Config) -> list[HubFile]:
    """The hub's files that a run of `config` reads: those of `weights=hub` of its terms and latent space."""
    files: list[HubFile] = []
    terms = {} if config.method == "baseline" or config.data.source == "moments+tokens" else config.alignment
    for name in dict.fromkeys(term.encoder for term in terms.values() if term.weights == "hub"):
        files += encoder_files(name)
    spec = latent_spec(config.latents.name)
    if spec.kind != "identity" and config.latents.weights == "hub":
        files += vae_files(spec.source, f"latents.name={config.latents.name}")
    return files


def encoder_files(name: str) -> list[HubFile]:
    """Of a row of sizes.ENCODERS; none where timm knows a URL alone, or nothing."""
    from repa_scale import torchvision_fix

    torchvision_fix.ensure()
    timm = require("timm", "train")
    spec = encoder_spec(name)
    source = timm.get_pretrained_cfg(spec.timm_name) if "." in spec.timm_name else None
    if source is None or not source.hf_hub_id:
        return []
    return [HubFile(source.hf_hub_id, source.hf_hub_filename or WEIGHTS, f"encoder={name}")]


def vae_files(repo: str, need: str) -> list[HubFile]:
    return [HubFile(repo, name, need) for name in VAE_FILES]


def cached(file: HubFile) -> Path | None:
    """Where the cache of this node holds the file, without asking the hub; None: nowhere."""
    found = require("huggingface_hub", "train").try_to_load_from_cache(file.repo, file.name)
    return Path(found) if isinstance(found, str) else None  # another object: known to be absent from the hub


def local(file: HubFile) -> Path:
    """The file on this node; fetched, and checked by its hash, if the cache does not hold it.

    Raises:
        UserError: it cannot be fetched, or HF_HUB_OFFLINE=1 forbids it.
    """
    return cached(file) or fetch(file)


def fetch(file: HubFile) -> Path:
    """Brings the file into the cache, in place of one that is damaged, and checks its hash.

    Raises:
        UserError: the hub does not give it.
        DataError: what it gives has another hash than it says.
    """
    hub = require("huggingface_hub", "train")
    have = cached(file)
    if have is not None and intact(have):
        return have
    if offline():
        state = "is damaged in" if have else "is not in"
        raise UserError(
            f"{file.need}: {file} {state} the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to "
            "fetch it; run `repa-scale doctor --fetch` where there is a network, or copy the cache"
        )
    try:
        path = Path(hub.hf_hub_download(file.repo, file.name, force_download=have is not None))
    except Exception as error:  # each of the hub's libraries raises its own
        raise UserError(f"{file.need}: {file} cannot be fetched: {reason(error)}") from None
    if not intact(path):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DataError(f"{file.need}: {file} came with another hash than the hub promised; fetch it again")
    return path


def offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to ask the hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def intact(path: Path) -> bool:
    """Whether a file of the hub's cache has the hash under which the cache keeps it.

    The cache names a file's content by what the hub says of it: the SHA-256 of a large file, git's SHA-1 of a small
    one. A hub that says neither cannot be checked: true.
    """
    promised = path.resolve().name
    size = path.stat().st_size
    digests: dict[int, Callable] = {64: hashlib.sha256, 40: lambda: hashlib.sha1(b"blob %d\0" % size)}
    if len(promised) not in digests or any(letter not in "0123456789abcdef" for letter in promised):
        return True
    digest = digests[len(promised)]()
    with path.open("rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == promised
