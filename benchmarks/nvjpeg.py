"""How far a GPU's JPEG decoder is from Pillow, by kind of picture, and how fast it is.

    torchvision  decode_jpeg(device="cuda"), which is nvJPEG with its own defaults: subsampled chroma is repeated
    DALI         the decoder of data.decoder=dali, where installed: nvJPEG that interpolates chroma, as Pillow does
    Pillow       the reference, in one thread

Pictures are made here, the same on every machine; --folder adds JPEG files. Differences are in levels of 255.

python -m benchmarks.nvjpeg                    needs a GPU and torchvision
python -m benchmarks.nvjpeg --rehearse         the same program on the CPU, in seconds
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.command import Parser, positive, put_row
from repa_scale import torchvision_fix
from repa_scale.data.dali import DaliDecoder, left_to_dali, why_not_dali
from repa_scale.data.decode import decode

Decoder = Callable[[Sequence[bytes]], list[Tensor]]  # JPEG files -> (H, W, 3) uint8 each

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
BINS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 255))  # levels
BATCH = 64

# name -> width, height, and how it is saved
KINDS = {
    "4:4:4, quality 95, 256 px (`prepare --format jpeg`)": (256, 256, {"quality": 95, "chroma": "4:4:4"}),
    "4:2:0, quality 95, 256 px": (256, 256, {"quality": 95, "chroma": "4:2:0"}),
    "4:2:0, quality 75, 256 px": (256, 256, {"quality": 75, "chroma": "4:2:0"}),
    "4:2:2, quality 90, 256 px": (256, 256, {"quality": 90, "chroma": "4:2:2"}),
    "4:2:0, quality 90, 500 x 375": (500, 375, {"quality": 90, "chroma": "4:2:0"}),
    "4:2:0, quality 90, 501 x 377": (501, 377, {"quality": 90, "chroma": "4:2:0"}),
    "4:2:0, quality 90, 1600 x 1200": (1600, 1200, {"quality": 90, "chroma": "4:2:0"}),
    "4:2:0, quality 90, 17 x 13": (17, 13, {"quality": 90, "chroma": "4:2:0"}),
    "4:4:4, progressive, quality 90, 256 px": (256, 256, {"quality": 90, "chroma": "4:4:4", "progressive": True}),
    "4:2:0, progressive, quality 90, 500 x 375": (500, 375, {"quality": 90, "chroma": "4:2:0", "progressive": True}),
    "grey, quality 90, 256 px": (256, 256, {"quality": 90, "grey": True}),
}
SPEED = {"256 px, 4:4:4, quality 95": 0, "500 x 375, 4:2:0, quality 90": 4}  # -> the kind, by its place


def picture(number: int, width: int, height: int) -> Image.Image:
    """Like a photograph for a codec: noise of all scales, and shapes with hard edges."""
    random = np.random.default_rng(number)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        grid = random.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 127.5) / octave
    for _ in range(6):
        left, top = random.integers(0, width), random.integers(0, height)
        right, bottom = left + random.integers(1, 1 + width // 3), top + random.integers(1, 1 + height // 3)
        total[top:bottom, left:right] = random.uniform(-160, 160, 3)
    return Image.fromarray((127.5 + total).clip(0, 255).astype(np.uint8))


def encoded(number: int, width: int, height: int, how: dict) -> bytes:
    image, buffer = picture(number, width, height), io.BytesIO()
    if how.get("grey"):
        image.convert("L").save(buffer, "JPEG", quality=how["quality"])
    else:
        chroma, progressive = SUBSAMPLING[how["chroma"]], how.get("progressive", False)
        image.save(buffer, "JPEG", quality=how["quality"], subsampling=chroma, progressive=progressive)
    return buffer.getvalue()


def files_of(folder: Path, count: int) -> list[bytes]:
    """JPEG files that training would leave to DALI, in the order of their names."""
    names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return list(islice((data for path in names if left_to_dali(data := path.read_bytes())), count))


def by_pillow(files: Sequence[bytes]) -> list[Tensor]:
    return [torch.from_numpy(decode(data).copy()) for data in files]


def torchvision_decoder(device: torch.device) -> Decoder:
    """Raises ImportError, OSError or RuntimeError where torchvision has none for `device`."""
    torchvision_fix.ensure()
    from torchvision.io import ImageReadMode, decode_jpeg

    def run(files: Sequence[bytes]) -> list[Tensor]:
        data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        return [planes.permute(1, 2, 0) for planes in decode_jpeg(data, mode=ImageReadMode.RGB, device=device)]

    run([encoded(0, 16, 16, {"quality": 90, "chroma": "4:4:4"})])
    return run


def dali_decoder(device: torch.device) -> Decoder:
    decoder = DaliDecoder(BATCH, len(os.sched_getaffinity(0)), device)

    def run(files: Sequence[bytes]) -> list[Tensor]:
        found = decoder(files, [""] * len(files))
        if faults := decoder.take_faults():
            raise RuntimeError(faults[0].reason)
        return found

    return run


def decoders(device: torch.device, rehearse: bool) -> dict[str, Decoder]:
    """What can be compared with Pillow here; in a rehearsal at least Pillow itself."""
    ways: dict[str, Decoder] = {}
    try:
        ways["torchvision"] = torchvision_decoder(device)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchvision cannot decode on {device}: {str(error).splitlines()[0]}")
    if (why := why_not_dali(device)) is None:
        ways["DALI"] = dali_decoder(device)
    else:
        print(why)
    return ways or ({"Pillow": by_pillow} if rehearse else {})


def difference(decoder: Decoder, files: Sequence[bytes]) -> dict:
    """How far the pixels are from Pillow's, over all values of the pictures; those that it refuses are counted."""
    counts, refused = np.zeros(256, np.int64), 0
    for data, wanted in zip(files, by_pillow(files), strict=True):
        try:
            (found,) = decoder([data])
        except RuntimeError:
            refused += 1
            continue
        levels = (found.cpu().int() - wanted.int()).abs()
        counts += torch.bincount(levels.flatten(), minlength=256).numpy()
    total = max(1, int(counts.sum()))
    shares = {
        f"{low}" if low == high else f"{low}-{high}": float(counts[low : high + 1].sum() / total) for low, high in BINS
    }
    largest = int(np.flatnonzero(counts).max(initial=0))
    return {
        "pictures": len(files),
        "refused": refused,
        "largest": largest,
        "mean": float(counts @ np.arange(256) / total),
        "share_by_levels": shares,
    }


def rate(decoder: Decoder, files: Sequence[bytes], device: torch.device, seconds: float) -> dict:
    """Images per second of batches: the median of the rounds, and how far they spread."""
    rates: list[float] = []
    began = time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        decoder(files)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(len(files) / (time.perf_counter() - start))
    rates = rates[1:]
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates), "rounds": len(rates)}


def show(differences: dict[str, dict[str, dict]], rates: dict[str, dict[str, dict]]) -> None:
    """Both as tables for docs/data.md."""
    ways = list(next(iter(differences.values())))
    print(f"\n| picture | {' | '.join(f'{way}: largest, mean, within 2 levels' for way in ways)} |")
    print("|---|" + "---|" * len(ways))
    for kind, found in differences.items():
        cells = []
        for way in ways:
            row = found[way]
            within = sum(row["share_by_levels"][level] for level in ("0", "1", "2"))
            refused = f", {row['refused']} of {row['pictures']} refused" if row["refused"] else ""
            cells.append(f"{row['largest']}, {row['mean']:.3f}, {100 * within:.2f}%{refused}")
        print(f"| {kind} | {' | '.join(cells)} |")
    ways = list(next(iter(rates.values())))
    print(f"\n| images/s | {' | '.join(ways)} |")
    print("|---|" + "---|" * len(ways))
    for what, found in rates.items():
        medians = (found[way]["median"] for way in ways)
        print(f"| {what} | {' | '.join(f'{median:,.0f}' for median in medians)} |")


def versions() -> dict[str, str]:
    found = {}
    for name in ("torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.prog = "nvjpeg"
    parser.add_argument("--folder", type=Path, help="a folder of JPEG files to compare as well")
    parser.add_argument("--pictures", type=positive, help="per kind (default: 16; rehearsal: 2)")
    parser.add_argument("--seconds", type=float, help="per measurement of speed (default: 2; rehearsal: 0.05)")
    args = parser.parse_args(argv)
    files = files_of(args.folder, 100 * (args.pictures or 16)) if args.folder else []
    if args.folder and not files:
        parser.error(f"--folder {args.folder} holds no JPEG files")
    if not args.rehearse and not torch.cuda.is_available():
        print("nvjpeg: torch sees no GPU; rehearse on the CPU with --rehearse", file=sys.stderr)
        return 64
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    count = args.pictures or (2 if args.rehearse else 16)
    seconds = args.seconds or (0.05 if args.rehearse else 2.0)
    ways = decoders(device, args.rehearse)
    if not ways:
        print("nvjpeg: neither torchvision nor DALI decodes JPEG on this GPU; install one", file=sys.stderr)
        return 64
    pictures = {kind: [encoded(n, *how) for n in range(count)] for kind, how in KINDS.items()}
    if args.folder:
        pictures[f"files of {args.folder.name}"] = files[: 100 * count]
    differences = {
        kind: {way: difference(decoder, files) for way, decoder in ways.items()} for kind, files in pictures.items()
    }
    rates = {}
    for what, place in SPEED.items():
        kind = list(KINDS)[place]
        files = [pictures[kind][n % count] for n in range(BATCH if not args.rehearse else 4)]
        rates[what] = {
            way: rate(decoder, files, device, seconds) for way, decoder in {"Pillow": by_pillow, **ways}.items()
        }
    show(differences, rates)
    row = {
        "decoded_on": device.type,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "differences": differences,
        "images_per_second": rates,
    }
    put_row("nvjpeg", row, args.rehearse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
