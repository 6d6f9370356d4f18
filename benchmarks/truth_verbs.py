"""Do sample, export, serve and prepare give on this device what they give on a CPU? The real verbs, as processes.

The weights are random but fixed: a small SiT in the latents of Stable Diffusion's VAE. Each case draws or computes on
the device and again on a CPU; the cases are independent and go side by side.

    python -m benchmarks.truth_verbs                       on this machine's GPU, or its CPU
    python -m benchmarks.truth_verbs --cases serve sample
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.command import Parser, answered, put_row
from benchmarks.counted_memory import Counter
from benchmarks.truth import LEVELS, Check
from benchmarks.truth_data import CLASSES, grating, make_encoder
from repa_scale.errors import require
from repa_scale.ranks import pick_device

VAE, ENCODER, TOKENS = "sd-vae-ft-mse", "dinov2-vit-s", 4  # TOKENS: per side
SECONDS = 100.0  # per process
GUIDED = ("--guidance", "1.8", "--interval", "0", "0.7")
# Of 64 images of 256 px: latents.py's 3,072 bytes per pixel of a part, and what allocator and cuDNN add.
PEAK_GB = 1.25 * 3072 * 2**20 / 1e9
# Ten steps through programs whose single step keeps 5e-5 of its largest value (export/step.py).
LATENT = 1e-3
# Two fp32 convolution stacks that sum in other orders: 40 layers deep, each a few 1e-7 of its largest value.
MOMENTS = 1e-4
# A GPU computes tokens in bf16, a CPU in fp32. bf16 on a CPU is 9e-5 away from that (1 - cosine, the worst token).
TOKEN = 5e-4
SEEDED = threading.Lock()  # random weights seed the process's generator, which the cases share


@dataclass(frozen=True)
class Work:
    """What a case gets: an empty folder of its own, the exported model, the device, how many images and pixels."""

    folder: Path
    model: Path
    device: str
    images: int
    size: int


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="default: all")
    args = parser.parse_args(argv)
    return answered(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    for module in ("diffusers", "fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    device = pick_device("cpu" if args.rehearse else args.device).type
    images, size = (2, 32) if args.rehearse else (8, 64)
    passed = True
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model", size)
        works = {case: Work(Path(name) / case, model, device, images, size) for case in args.cases}
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(len(works) if device != "cpu" else min(cores, len(works))) as pool:
            for case, checks in zip(works, pool.map(lambda case: checked(case, works[case]), works), strict=True):
                for check in checks:
                    print(check, flush=True)
                    row = {"case": case, "check": check.what, "value": check.value, "bound": check.bound}
                    put_row("truth", {**row, "passed": check.passed, "steps": 10}, args.rehearse)
                    passed &= check.passed
    return 0 if passed else 1


def checked(case: str, work: Work) -> list[Check]:
    """The checks of a case; one that fails, with the reason printed, where it does not come through."""
    work.folder.mkdir()
    began = time.monotonic()
    try:
        found = CASES[case](work)
    except Exception as error:
        print(f"-- {case}: {type(error).__name__}: {error}", flush=True)
        found = [Check(case, "came to its end (0: yes)", 1, 0)]
    print(f"-- {case}: {time.monotonic() - began:.1f} s", flush=True)
    return found


def make_model(folder: Path, size: int) -> Path:
    """An export (safetensors) of a small SiT with random weights, none of them zero. Returns `folder`."""
    from repa_scale.config import Config
    from repa_scale.export import FORMS, Options, new_folder, seal
    from repa_scale.models import build_sit
    from repa_scale.trained import Source

    config = Config(method="baseline")
    config.model.name, config.model.num_classes, config.data.image_size = "SiT-Nano/2", CLASSES, size
    config.latents.name, config.latents.weights = VAE, "random"
    random = np.random.RandomState(2)
    weights = {
        name: tensor if name == "pos_embed" else torch.from_numpy(0.1 * random.standard_normal(tensor.shape)).float()
        for name, tensor in build_sit(config).state_dict().items()
    }
    source = Source(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda name, start, stop: weights[name].flatten()[start:stop].clone(),
        config,
        {"step": 0, "samples": 0, "identity_hash": "0" * 16, "pair_id": "1" * 16, "weights": "ema"},
        Path("nowhere"),
    )
    with new_folder(folder) as out:
        seal(out, "safetensors", source, Options(), FORMS["safetensors"].write(source, out, Options()))
    return folder


# The cases.


def sample(work: Work) -> list[Check]:
    """An ODE's and an SDE's samples, and the memory that decoding takes."""
    checks = []
    for sampler in ("euler", "sde"):
        ours, wanted = (drawn(work, device, sampler, work.images) for device in (work.device, "cpu"))
        checks.append(Check("sample", f"{sampler}: max difference from a CPU's (of 255)", apart(ours, wanted), LEVELS))
        checks.append(Check("sample", f"{sampler}: pictures that are one color", flat(wanted), 0))
    peak = decoding_peak(work.device) / 1e9
    return [*checks, Check("sample", "decoding 64 images of 256 px, GB", peak, PEAK_GB)]


def export(work: Work) -> list[Check]:
    """The programs of torch.export and AOTInductor, loaded by the stand-alone sampler on the device."""
    out = work.folder / "programs"
    verb("export", work.model, "--to", "torch-export", "--out", out)
    made = {file.name for file in out.iterdir()}
    packages = {"cpu": "denoiser.aoti.pt2", "cuda": "denoiser.cuda.aoti.pt2"}
    checks = [Check("export", f"{packages[work.device]} is absent", packages[work.device] not in made, 0)]

    def latent(program: str, device: str) -> Tensor:
        file = work.folder / f"{program}-{device}.pt"
        words = (["--device", device] if device != "cpu" else []) + ["--program", program, "--out", file]
        words = [out / "sample.py", "--seed", 3, "--label", 1, "--steps", 10, *words]
        process(words, {"PYTHONSAFEPATH": ""})  # it imports rng.py, which lies beside it
        return torch.load(file, weights_only=True).cpu()

    wanted = latent("torch", "cpu")
    for program in ("torch", "aoti"):
        if program == "torch" or packages[work.device] in made:
            off = relative(latent(program, work.device), wanted)
            checks.append(Check("export", f"{program}: latents after 10 steps against the CPU's", off, LATENT))
    return checks


def serve(work: Work) -> list[Check]:
    """The server on the device: health, one image, and its end."""
    out = work.folder / "pipeline"
    verb("export", work.model, "--to", "diffusers", "--out", out)
    started = subprocess.Popen(
        [sys.executable, "-m", "repa_scale", "serve", str(out), "--port", "0", "--device", work.device],
        stdout=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(SECONDS, started.kill)
    killer.start()
    try:
        found = re.search(r"http://[\d.]+:(\d+)", started.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start; see its lines above")
        port = int(found[1])
        health = ask(port, "GET", "/health")[0]
        asked = {"class": 1, "seed": 3, "steps": 10, "guidance": 1.8, "interval": [0, 0.7], "sampler": "euler"}
        status, png = ask(port, "POST", "/v1/images", json.dumps(asked))
        started.send_signal(signal.SIGTERM)
        code = started.wait(SECONDS)
    finally:
        killer.cancel()
        with suppress(ProcessLookupError):
            started.kill()
        started.wait()
    checks = [
        Check("serve", "/health: difference from 200", abs(health - 200), 0),
        Check("serve", "/v1/images: difference from 200", abs(status - 200), 0),
        Check("serve", "exit code after SIGTERM", abs(code), 0),
    ]
    if status != 200:
        print(f"-- serve: {png[:500]!r}")
        return checks
    ours = np.asarray(Image.open(io.BytesIO(png)))[None]
    off = apart(ours, drawn(work, "cpu", "euler", 1))
    return [*checks, Check("serve", "max difference from a CPU's `sample` (of 255)", off, LEVELS)]


def prepare(work: Work) -> list[Check]:
    """Moments and tokens of a few pictures, by the networks that `prepare` runs; the verb also needs the package
    streaming, which has no part in them."""
    from repa_scale.features import FeatureNetworks

    random = np.random.RandomState(3)
    pictures = np.stack([grating(number % CLASSES, random, work.size) for number in range(2 * work.images)])
    encoder = make_encoder(work.folder / "encoder.safetensors", ENCODER, (TOKENS, TOKENS))
    columns = []
    for device in (work.device, "cpu"):
        with SEEDED:
            networks = FeatureNetworks(
                work.size, (VAE, "random"), [(ENCODER, str(encoder))], moments_dtype="fp32", tokens_dtype="bf16",
                grid=TOKENS, flip=False, device=torch.device(device),
            )  # fmt: skip
        columns.append(networks(pictures))
    moments, tokens = networks.stored
    (ours, wanted), (seen, target) = (
        (torch.stack([stored.unpack_one(row[stored.column], "") for row in rows]).float() for rows in columns)
        for stored in (moments, tokens)
    )
    off = 1 - torch.nn.functional.cosine_similarity(seen, target, dim=-1).min().item()
    return [
        Check("prepare", "moments against the CPU's", relative(ours, wanted), MOMENTS),
        Check("prepare", "tokens: 1 - cosine to the CPU's, the worst", off, TOKEN),
    ]


CASES: dict[str, Callable[[Work], list[Check]]] = {
    "export": export,  # the longest first
    "serve": serve,
    "sample": sample,
    "prepare": prepare,
}

# What they share.


def drawn(work: Work, device: str, sampler: str, count: int) -> np.ndarray:
    """Samples of class 1 from `repa-scale sample`: (count, S, S, 3) uint8."""
    file = work.folder / f"{device}-{sampler}-{time.monotonic_ns()}.npz"
    words = ["--out", file, "-n", count, "--batch", count, "--sampler", sampler, "--steps", 10, "--seed", 3]
    verb("sample", work.model, *words, *GUIDED, "--labels", 1, "--precision", "fp32", "--device", device)
    with np.load(file) as found:
        return found["arr_0"]


def decoding_peak(device: str) -> int:
    """Bytes beyond weights and latents that decoding 64 images of 256 px takes at most; counted where there is no
    GPU."""
    from repa_scale.config import Config
    from repa_scale.latents import build_latents

    config = Config()
    config.latents.name, config.latents.weights = VAE, "random"
    if device == "cpu":
        with SEEDED:
            latents = build_latents(config, "meta", torch.float32)
        given = torch.empty(64, 4, 32, 32, device="meta")
        counter = Counter()
        counter.known(given, *latents.vae.parameters(), *latents.vae.buffers())
        with counter:
            latents.decode(given)
        return counter.most
    with SEEDED:
        latents = build_latents(config, device, torch.float32)
    given = torch.zeros(64, 4, 32, 32, device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    latents.decode(given)
    return torch.cuda.max_memory_allocated() - before


def verb(name: str, *words: object, environment: dict[str, str] | None = None) -> None:
    """`repa-scale NAME`, in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    process(["-m", "repa_scale", name, *words], environment)


def process(words: list[object], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=None if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else SECONDS,
    )
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise RuntimeError(f"{' '.join(map(str, words[:4]))} exited with code {done.returncode}:\n{end}")


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two sets of pictures, in levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).max()) if a.shape == b.shape else math.inf


def flat(pictures: np.ndarray) -> int:
    """How many hardly differ from one color: comparing these would show nothing."""
    return int((pictures.reshape(len(pictures), -1).std(axis=1) < 5).sum())


def relative(value: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value; nan if one is."""
    return ((value - wanted).abs().max() / wanted.abs().max()).item() if value.shape == wanted.shape else math.inf


if __name__ == "__main__":
    sys.exit(main())
