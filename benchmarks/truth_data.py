"""What `truth` trains on: a small MDS set of drawn pictures and fixed encoder weights, the same on every machine.

Both are made on the spot from numpy's RandomState, whose numbers never change: nothing has to be carried to a machine,
and neither torch's nor timm's initialization plays a part.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from repa_scale.data.manifest import FORMAT_VERSION, MANIFEST, data_fingerprint
from repa_scale.data.mds import read_index
from repa_scale.data.recipe import Recipe
from repa_scale.data.sources import Item

CLASSES, COUNT, SIZE = 8, 256, 32  # of the set; pixels per side
SHARD = "shard.00000.mds"


def make_set(folder: Path) -> Path:
    """Write the prepared set to `folder`: colored gratings whose direction is their class. Returns `folder`."""
    random = np.random.RandomState(0)
    recipe = Recipe(SIZE)
    items = [Item(f"direction {number % CLASSES}/{number}.png", number % CLASSES, None, -1) for number in range(COUNT)]
    samples = [
        {"image": _png(grating(item.label, random)), "label": item.label, "id": item.id, "name": item.name}
        for item in items
    ]
    folder.mkdir(parents=True)
    data = _shard(samples, recipe.columns)
    (folder / SHARD).write_bytes(data)
    sizes = [8 if encoding == "int" else None for encoding in recipe.columns.values()]
    row = {
        "format": "mds",
        "version": 2,
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": None,
        "column_names": list(recipe.columns),
        "column_encodings": list(recipe.columns.values()),
        "column_sizes": sizes,
        "samples": COUNT,
        "raw_data": {"basename": SHARD, "bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}},
        "zip_data": None,
    }
    index = json.dumps({"version": 2, "shards": [row]}).encode()
    (folder / "index.json").write_bytes(index)
    names = [f"direction {number}" for number in range(CLASSES)]
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": "gratings",
        "image_size": SIZE,
        "count": COUNT,
        "class_names": names,
        "class_counts": [COUNT // CLASSES] * CLASSES,
        "fingerprint": data_fingerprint(recipe.as_dict(), names, read_index(folder)),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "recipe": recipe.as_dict(),
        "source": {"name": "gratings", "fingerprint": "0" * 16, "images": COUNT},
        "quarantined": [],
        "versions": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def grating(label: int, random: np.random.RandomState, size: int = SIZE) -> np.ndarray:
    """A picture of class `label`: (size, size, 3) uint8."""
    angle = np.pi * label / CLASSES
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (3 * (x * np.cos(angle) + y * np.sin(angle)) + random.rand()))
    colors = random.rand(2, 3)
    mixed = (wave[..., None] + 1) / 2 * colors[0] + (1 - wave[..., None]) / 2 * colors[1]
    return (255 * mixed).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _shard(samples: list[dict], columns: dict[str, str]) -> bytes:
    """An MDS file: number of samples, offsets, the column description, the samples (data/mds.py reads it)."""
    packed = [_packed(sample, columns) for sample in samples]
    words = json.dumps({"columns": columns}).encode()
    begin = 4 * (len(packed) + 2) + len(words)
    offsets = np.cumsum([begin, *map(len, packed)]).astype("<u4")
    return np.uint32(len(packed)).tobytes() + offsets.tobytes() + words + b"".join(packed)


def _packed(sample: dict, columns: dict[str, str]) -> bytes:
    """Sizes of the columns that vary, then all columns."""
    values = []
    for name, encoding in columns.items():
        value = sample[name]
        values.append(
            value.to_bytes(8, "little") if encoding == "int" else value.encode() if encoding == "str" else value
        )
    sizes = [len(value) for value, encoding in zip(values, columns.values(), strict=True) if encoding != "int"]
    return np.array(sizes, "<u4").tobytes() + b"".join(values)


def make_encoder(file: Path, name: str, grid: tuple[int, int]) -> Path:
    """Write weights of encoder `name` for a token grid to `file` (safetensors). Returns `file`.

    Matrices keep the size of what passes through them; gains lie around 1, so that every layer has a say.
    """
    import torch
    from safetensors.torch import save_file

    from repa_scale import torchvision_fix
    from repa_scale.sizes import encoder_spec

    torchvision_fix.ensure()
    import timm

    spec = encoder_spec(name)
    with torch.device("meta"):
        network = timm.create_model(spec.timm_name.partition(".")[0], img_size=spec.stride * grid[0], num_classes=0)
    random = np.random.RandomState(1)
    tensors = {}
    for key, value in network.state_dict().items():
        numbers = torch.from_numpy(random.standard_normal(value.shape).astype(np.float32))
        if value.dim() == 1:
            tensors[key] = 0.1 * numbers + (0.0 if key.endswith("bias") else 1.0)
        else:
            tensors[key] = numbers / max(1, value[0].numel()) ** 0.5
    save_file(tensors, file)
    return file
