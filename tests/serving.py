"""For the tests of serving: small models with random weights, and a real server process to talk to."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from repa_scale.config import Config
from repa_scale.export import Options, new_folder, seal
from repa_scale.models import build_sit
from repa_scale.trained import Source

NAMES = (
    "tench",
    "goldfish",
    "golden retriever",
    "tabby cat",
    "tiger cat",
    "zebra",
    "piano",
    "teapot",
    "volcano",
    "daisy",
)


def tiny_config(**model):
    config = Config(method="baseline")
    config.model.name, config.model.num_classes, config.data.image_size = "SiT-Nano/2", 10, 8
    config.latents.name = "identity-grey"
    config.sample.steps, config.sample.guidance = 4, 1.5
    for key, value in model.items():
        setattr(config.model, key, value)
    return config


def tiny_source(config=None, names=NAMES, std=0.15):
    """A Source whose weights are drawn at random: nothing about them is special, none is zero."""
    config = config or tiny_config()
    model = build_sit(config)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor if name == "pos_embed" else torch.randn(tensor.shape, generator=generator) * std
        for name, tensor in model.state_dict().items()
    }
    return Source(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda name, start, stop: weights[name].flatten()[start:stop].clone(),
        config,
        {"step": 3, "samples": 192, "identity_hash": "0" * 16, "pair_id": "1" * 16, "weights": "ema"},
        Path("nowhere"),
        class_names=names,
    )


def save_kl_vae(folder, scaling_factor=0.13025):
    """An AutoencoderKL of Stable Diffusion's kind, with an eighth of its channels, drawn at random, as a local folder.

    Its own scaling factor is another than that of the latent space sd-vae-ft-mse: the run's counts, not the VAE's.
    """
    from repa_scale import torchvision_fix

    torchvision_fix.ensure()
    from diffusers import AutoencoderKL

    from repa_scale.latents import KL_SHAPE

    widths = tuple(channels // 8 for channels in KL_SHAPE["block_out_channels"])
    shape = {**KL_SHAPE, "block_out_channels": widths, "norm_num_groups": 8}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        AutoencoderKL(**shape, scaling_factor=scaling_factor).save_pretrained(folder)
    return folder


def export(source, out, form="diffusers", **options):
    """As `repa-scale export` does."""
    from repa_scale.export import FORMS

    chosen = Options(**options)
    with new_folder(out) as folder:
        made = FORMS[form].write(source, folder, chosen)
        seal(folder, form, source, chosen, made)
    return out


class Server:
    """A running `repa-scale serve`."""

    def __init__(self, process, port, heard=lambda: ""):
        self.process, self.port, self.heard = process, port, heard

    def ask(self, method="GET", path="/health", body=None, headers=None, timeout=60):
        """Status, headers and body of the answer; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def images(self, body, **more):
        """Status and the JSON, or the bytes of a PNG, that POST /v1/images gives."""
        status, headers, data = self.ask("POST", "/v1/images", body, **more)
        return status, data if headers["content-type"] == "image/png" else json.loads(data)

    def metric(self, name):
        text = self.ask(path="/metrics")[2].decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@contextmanager
def serving(folder, *words, environment=None, program=("-m", "repa_scale")):
    """Starts a server on a free port; kills what is left of it at the end."""
    process = subprocess.Popen(
        [sys.executable, *program, "serve", str(folder), "--port", "0", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    heard = []
    listener = threading.Thread(
        target=lambda: heard.extend(process.stderr), daemon=True
    )  # so that its pipe never fills
    listener.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)", line)
        if not found:
            process.wait(30)
            listener.join(10)
            raise AssertionError(f"the server did not start: {line}{''.join(heard)[-3000:]}")

        def said():
            """What it wrote to stderr, once it has ended."""
            listener.join(10)
            return "".join(heard)

        yield Server(process, int(found[1]), said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        listener.join(10)
        process.stderr.close()
