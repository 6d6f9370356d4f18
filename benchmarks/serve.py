"""Latency and throughput of each way to draw guided images, and what the server adds to the pipeline.

All ways draw the same number of Euler steps with guidance, in turns in one process: the plain eager loop of
sampling.py, our pipeline eager and compiled, and the exported forms that this installation can make (AOTInductor,
onnxruntime), all without decoding; and our pipeline against diffusers' DiTPipeline of the same size (DDIM), both with
the same small VAE, since the latter always decodes. Goal: the server adds at most 3 % at 8 images a request.

    python -m benchmarks.serve                     SiT-Tiny/2 on latents of 32 x 32: minutes on two cores
    python -m benchmarks.serve --model SiT-XL/2 --batches 1 8 32 --steps 50 250 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import write_row
from repa_scale import rng, torchvision_fix
from repa_scale.config import Config
from repa_scale.errors import UserError
from repa_scale.export import FORMS, Options, new_folder, seal
from repa_scale.models import build_sit
from repa_scale.sampling import sample
from repa_scale.trained import Source

GOAL = 0.03
GUIDANCE = 1.8
CLASSES = 1000
SIZE = 256  # pixels; latents of 32 x 32
SERVER_BATCH = 8
TINY = "SiT-Nano/2"
CROWD = (500, 50)  # requests, clients

Draw = Callable[[int, int], Any]  # (images, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-Tiny/2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--server-steps", type=int, default=25)
    args = parser.parse_args()
    torchvision_fix.ensure()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = made_up(args.model)
    row: dict[str, Any] = {"model": args.model, "guidance": GUIDANCE, "cases": [], "left_out": {}}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Draw] = {}
        for name in args.forms:
            try:
                ways[name] = WAYS[name](source, device, Path(folder))
            except (UserError, ImportError) as error:
                row["left_out"][name] = str(error)
                print(f"{name}: left out: {error}")
        for batch in args.batches:
            for steps in args.steps:
                row["cases"].append(case(ways, batch, steps, args.rounds, device))
        row["server"] = server(source, Path(folder), args.server_steps, args.rounds)
        row["crowd"] = crowd(made_up(TINY, "identity", 32), Path(folder) / "tiny")
    row["goal"] = GOAL
    print(f"written to {write_row('serve', row)}")


def case(ways: dict[str, Draw], batch: int, steps: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of one batch by each way: the median of rounds that are run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for draw in ways.values():
        draw(batch, 2)  # compiles for this size
    for _ in range(rounds):
        for name, draw in ways.items():
            began = time.perf_counter()
            draw(batch, steps)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    base = medians.get("plain", next(iter(medians.values())))
    print(f"batch {batch}, {steps} steps")
    for name, each in medians.items():
        print(f"  {name:<12}{each:8.3f} s  {batch / each:8.2f} images/s  {base / each:5.2f} times plain")
    return {"batch": batch, "steps": steps, "seconds": medians}


def made_up(name: str, latents: str = "taesd", size: int = SIZE) -> Source:
    """A model of the size asked for with random weights."""
    config = Config(method="baseline")
    config.model.name, config.model.num_classes, config.data.image_size = name, CLASSES, size
    config.latents.name, config.latents.weights = latents, "random"
    weights = build_sit(config).state_dict()
    for key, tensor in weights.items():
        if key != "pos_embed":
            weights[key] = rng.normal_range(0, key, 0, tensor.numel()).view(tensor.shape) * 0.02
    return Source(
        {key: tuple(tensor.shape) for key, tensor in weights.items()},
        lambda key, start, stop: weights[key].flatten()[start:stop].clone(),
        config,
        {"step": 0, "samples": 0, "identity_hash": "", "pair_id": "", "weights": "ema"},
        Path("made-up"),
    )


def export(source: Source, form: str, out: Path) -> Path:
    options = Options()
    with new_folder(out) as folder:
        seal(folder, form, source, options, FORMS[form].write(source, folder, options))
    return out


def plain(source: Source, device: str, folder: Path) -> Draw:
    """The loop of sampling.py over the eager model."""
    model = source.build(device)

    def draw(images: int, steps: int) -> Tensor:
        noise, labels = begin(images, device)
        return sample(lambda x, t, y: model(x, t, y)[0], noise, labels, CLASSES, steps=steps, guidance=GUIDANCE)

    return draw


def pipeline(source: Source, device: str, folder: Path, compiled: bool = False, output: str = "latent") -> Draw:
    """Our pipeline."""
    from repa_scale.serving import SiTPipeline

    pipe = SiTPipeline.from_pretrained(str(_once(source, "diffusers", folder))).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile()
    return lambda images, steps: pipe([1] * images, seed=0, steps=steps, guidance=GUIDANCE, output_type=output)


def dit(source: Source, device: str, folder: Path) -> Draw:
    """diffusers' own pipeline and transformer of the same size, with the same VAE."""
    from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    out = _once(source, "diffusers-dit", folder)
    transformer = DiTTransformer2DModel.from_pretrained(str(out), subfolder="transformer", low_cpu_mem_usage=False)
    vae = AutoencoderTiny.from_pretrained(
        str(_once(source, "diffusers", folder)), subfolder="vae", low_cpu_mem_usage=False
    )
    pipe = DiTPipeline(transformer, vae, DDIMScheduler()).to(device)
    pipe.set_progress_bar_config(disable=True)
    return lambda images, steps: pipe(
        [1] * images, guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="np"
    )


def aoti(source: Source, device: str, folder: Path) -> Draw:
    """The program that AOTInductor compiled, in our Euler loop."""
    out = _once(source, "torch-export", folder)
    file = out / ("denoiser.cuda.aoti.pt2" if device == "cuda" else "denoiser.aoti.pt2")
    return _loop(torch._inductor.aoti_load_package(str(file)), device)


def onnx(source: Source, device: str, folder: Path) -> Draw:
    """onnxruntime on the CPU, in our Euler loop."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file = str(_once(source, "onnx", folder) / "denoiser.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def step(*inputs: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return _loop(step, "cpu")


def _loop(step: Callable[..., Tensor], device: str) -> Draw:
    """Euler over a guided step (x, t, labels, guidance) -> velocity."""

    def draw(images: int, steps: int) -> Tensor:
        noise, labels = begin(images, device)
        scale = torch.full((images,), GUIDANCE, device=device)
        state, times = noise.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        for i in range(steps):
            velocity = step(state.float(), torch.full((images,), times[i], device=device), labels, scale)
            state = state + (times[i + 1] - times[i]) * velocity.double()
        return state

    return draw


def begin(images: int, device: str) -> tuple[Tensor, Tensor]:
    noise = rng.normal(0, "sample noise", 0, torch.arange(images, device=device), (4, SIZE // 8, SIZE // 8))
    return noise, torch.ones(images, dtype=torch.int64, device=device)


def _once(source: Source, form: str, folder: Path) -> Path:
    out = folder / form
    return out if out.is_dir() else export(source, form, out)


def server(source: Source, folder: Path, steps: int, rounds: int) -> dict[str, float]:
    """A request of 8 images, from the client's side, against the time that the pipeline inside took for its batch.

    Both are taken of the same requests, so that what else runs on the machine does not count.
    """
    with serving(_once(source, "diffusers", folder), SERVER_BATCH) as url:
        body = {"class": 1, "n": SERVER_BATCH, "seed": 0, "steps": steps, "guidance": GUIDANCE}
        _ask(url, body)
        added, inside = [], []
        for _ in range(rounds):
            before, began = _drawing(url), time.perf_counter()
            _ask(url, body)
            outside = time.perf_counter() - began
            inside.append(_drawing(url) - before)
            added.append(outside - inside[-1])
    result = {"steps": steps, "pipeline": statistics.median(inside), "added": statistics.median(added)}
    result["overhead"] = result["added"] / result["pipeline"]
    print(
        f"server, {SERVER_BATCH} images of {steps} steps: pipeline {result['pipeline']:.3f} s, the server adds "
        f"{1e3 * result['added']:.1f} ms: {result['overhead']:.2%} (goal {GOAL:.0%})"
    )
    return result


def crowd(source: Source, folder: Path) -> dict[str, float]:
    """Many clients at once, one image a request: how long they wait. Every answer must be the image of its own seed."""
    requests, clients = CROWD
    folder.mkdir()
    with serving(_once(source, "diffusers", folder), 32) as url, ThreadPoolExecutor(clients) as pool:
        body = {"class": 1, "n": 1, "steps": 2, "guidance": 1.0, "format": "json"}

        def one(seed: int) -> tuple[float, str]:
            began = time.perf_counter()
            (image,) = _ask(url, {**body, "seed": seed})
            assert image["seed"] == seed
            return time.perf_counter() - began, image["png"]

        one(0)
        began = time.perf_counter()
        answers = list(pool.map(one, range(requests)))
        took = time.perf_counter() - began
    assert len({png for _, png in answers}) == requests, "an image came twice"
    waits = sorted(wait for wait, _ in answers)
    result = {"requests": requests, "clients": clients, "a_second": requests / took}
    result |= {"p50": statistics.median(waits), "p99": waits[math.ceil(0.99 * requests) - 1]}
    print(
        f"{requests} requests of {clients} clients at once, {source.config.model.name}: none lost or doubled, "
        f"{result['a_second']:.0f} a second, p50 {result['p50']:.2f} s, p99 {result['p99']:.2f} s"
    )
    return result


@contextmanager
def serving(folder: Path, batch: int) -> Iterator[str]:
    """`repa-scale serve` in a process of its own; its address."""
    command = [sys.executable, "-m", "repa_scale", "serve", str(folder), "--port", "0", "--max-batch", str(batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.terminate()
            process.wait(60)


def _drawing(url: str) -> float:
    """Seconds that the server has spent in its pipeline so far."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(r"^repa_scale_batch_seconds_sum (\S+)$", text, re.MULTILINE)[1])


def _ask(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(f"{url}/v1/images", json.dumps(body).encode())
    answer = json.loads(urllib.request.urlopen(request).read())
    assert len(answer["images"]) == body["n"]
    return answer["images"]


WAYS: dict[str, Callable[[Source, str, Path], Draw]] = {
    "plain": plain,
    "pipeline": pipeline,
    "compiled": lambda source, device, folder: pipeline(source, device, folder, compiled=True),
    "decoded": lambda source, device, folder: pipeline(source, device, folder, output="uint8"),
    "dit": dit,
    "aoti": aoti,
    "onnx": onnx,
}

if __name__ == "__main__":
    main()
