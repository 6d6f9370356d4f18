"""Stored features: what is kept of them, that they are of the pixels before encoding, and that training takes them."""

import hashlib
import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import BIN, SMALL, end_all, free_port, train
from PIL import Image
from test_latents import small_vae

from repa_scale import features as networks
from repa_scale.clock import Clock
from repa_scale.config import Config, TermConfig
from repa_scale.data.batches import Batches, decode, open_dataset
from repa_scale.data.crop import center_crop
from repa_scale.data.features import FLIPPED, Stored, stored_features
from repa_scale.draws import draw
from repa_scale.encoders import build_encoder
from repa_scale.errors import ConfigError, DataError
from repa_scale.frozen import Frozen
from repa_scale.identity import identity_hash, identity_keys, pair_id
from repa_scale.objective import build_terms
from repa_scale.prepare import main
from repa_scale.ranks import Ranks
from repa_scale.train import stored_features_of

CPU = torch.device("cpu")
ENCODER = "effnet-lite0"


def stored(dtype, shape=(6, 40), kind="tokens"):
    return Stored(kind, ENCODER, "package", "0" * 16, dtype, shape)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_values_come_back_as_the_stored_type_rounds_them(dtype):
    values = torch.randn(3, 6, 40) * 30
    one = stored(dtype)
    packed = one.pack(values)
    back = torch.stack([one.unpack_one(data, "x") for data in packed])
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(back, values.to(kind)) and {len(data) for data in packed} == {one.bytes}


def test_int8_keeps_the_direction_of_a_token():
    """One scale a token: half a step at most, also beside a channel a hundred times the others, and for zeros."""
    values = torch.randn(4, 6, 40)
    values[:, 1, 3] *= 100
    values[:, 2] = 0
    one = stored("int8")
    packed = one.pack(values)
    back = torch.stack([one.unpack_one(data, "x") for data in packed])
    assert [len(data) for data in packed] == [6 * 40 + 6 * 4] * 4 and one.bytes == 264
    assert ((back - values).abs() <= values.abs().amax(dim=2, keepdim=True) / 254 * 1.0001).all()
    assert torch.equal(back[:, 2], values[:, 2])


def test_what_is_not_finite_is_not_stored():
    values = torch.zeros(3, 6, 40)
    values[1, 0, 0], values[2, 5, 39] = 1e6, float("nan")
    assert [data is None for data in stored("fp16").pack(values)] == [False, True, True]
    assert [data is None for data in stored("bf16").pack(values)] == [False, False, True]
    assert [data is None for data in stored("int8").pack(values)] == [False, False, True]


def test_a_feature_of_another_size_is_damage():
    with pytest.raises(DataError, match=r"sample 3: tokens.effnet-lite0 has 5 bytes instead of 480"):
        stored("bf16").unpack_one(b"12345", "sample 3")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    small_vae(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 smooth pictures of 2 classes, of which the JPEG differs from the pixels."""
    root = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for i in range(40):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        coarse.resize((56, 48), Image.Resampling.BICUBIC).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


def words(vae, *more):
    tokens = ["--tokens", f"{ENCODER}=package", "--token-grid", "2"]
    return ["--size", "32", "--moments", f"sd-vae-ft-mse={vae}", *tokens, "--workers", "2", *more]


@pytest.fixture(scope="module")
def cached(vae, source, tmp_path_factory):
    """The same pictures as PNG and as JPEG; the JPEG set has the mirrored features too."""
    folder = tmp_path_factory.mktemp("cached")
    assert main([str(source), "--out", str(folder / "png"), *words(vae)]) == 0
    more = ["--format", "jpeg", "--flip", "--moments-dtype", "fp16", "--tokens-dtype", "int8"]
    assert main([str(source), "--out", str(folder / "jpeg"), *words(vae, *more)]) == 0
    return folder


def config_of(path, vae, source="image", method="repa"):
    config = Config(method=method)
    config.data.path, config.data.source, config.data.image_size = str(path), source, 32
    config.model.name, config.model.num_classes = "SiT-Nano/2", 2
    config.latents.name, config.latents.weights = "sd-vae-ft-mse", str(vae)
    config.alignment = {"repa": TermConfig(encoder=ENCODER, weights="package", depth=1)}
    config.train.precision = "fp32"
    return config


def step_inputs(config, batch_size=8):
    """What the trainer feeds the model in step 1: clean latents and targets."""
    dataset = open_dataset(config.data.path)
    dataset.cached = stored_features_of(config, dataset)
    stream = Batches(dataset, seed=0, global_batch=batch_size, rank=0, world=1, workers=0, start_step=0)
    batch = next(iter(stream))
    terms = build_terms(config)
    frozen = Frozen(config, terms, Ranks(0, 0, 1, CPU), Clock(CPU), dataset.cached)
    noise = draw(0, 1, batch.index, frozen.latent_shape)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    targets = [frozen.targets(part.images, 1, part.features) for part in parts]
    clean = frozen.clean(batch.images, noise.posterior, batch.features)
    return batch, clean, torch.cat([target["repa"] for target in targets]) if terms else None, frozen


def test_training_from_the_cache_is_training_from_the_pictures(cached, vae):
    """fp32 moments: 1e-5 of the latent's largest value (other batches, other sums); bf16 tokens: half a step, 2**-8."""
    batch, clean, targets, _ = step_inputs(config_of(cached / "png", vae))
    for mode in ("moments", "moments+tokens"):
        other, clean2, targets2, frozen2 = step_inputs(config_of(cached / "png", vae, mode))
        assert torch.equal(other.ids, batch.ids)
        assert (clean - clean2).abs().max() <= 1e-5 * clean.abs().max()
        tolerance = 2**-8 if mode == "moments+tokens" else 1e-6
        assert (targets - targets2).abs().max() <= tolerance * targets.abs().max()
        assert targets2.dtype == torch.float32
        assert bool(frozen2.encoders) == (mode == "moments"), "a stored encoder is not even built"
        assert other.images.shape[-1] == (32 if mode == "moments" else 0), "pictures that nobody needs are not decoded"
    baseline, clean3, _, _ = step_inputs(config_of(cached / "png", vae, "moments", "baseline"))
    assert baseline.images.shape[-1] == 0 and torch.equal(clean2, clean3)


def test_features_are_of_the_pixels_before_encoding_and_of_their_mirror(cached, vae, source):
    dataset = open_dataset(cached / "jpeg")
    moments, tokens = stored_features(dataset.manifest)
    maker = networks.FeatureNetworks(
        32, ("sd-vae-ft-mse", str(vae)), [(ENCODER, "package")],
        moments_dtype="fp32", tokens_dtype="fp16", grid=2, flip=False, device=CPU,
    )  # fmt: skip
    for number in (0, 21, 39):
        row = dataset.reader[number]
        crop = np.array(center_crop(Image.open(source / row["name"]).convert("RGB"), 32))
        assert not np.array_equal(decode(row["image"]), crop)
        for suffix, pixels in (("", crop), (FLIPPED, crop[:, ::-1].copy())):
            (wanted,) = maker(pixels[None])
            exact = [one.unpack_one(wanted[one.column], "x").float() for one in maker.stored]
            back = moments.unpack_one(row[moments.column + suffix], "x").float()
            assert (back - exact[0]).abs().max() <= 2**-11 * exact[0].abs().max() + 1e-5
            back = tokens.unpack_one(row[tokens.column + suffix], "x").float()
            assert torch.nn.functional.cosine_similarity(back, exact[1], dim=-1).min() > 0.999
    assert dataset.manifest["recipe"]["flip"] is True and moments.weights == "vae"
    assert main(["--check", str(cached / "jpeg")]) == 0


def test_the_int8_error_of_the_real_encoder(source):
    """docs/data.md gives the figure."""
    encoder = build_encoder(ENCODER, "package", (2, 2), CPU, torch.float32)
    pictures = [np.asarray(center_crop(Image.open(path), 32)) for path in sorted(source.rglob("*.png"))]
    values = encoder(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).float()
    for dtype, limit in (("int8", 2e-4), ("bf16", 5e-6), ("fp16", 1e-6)):
        one = stored(dtype, tuple(values.shape[1:]))
        back = torch.stack([one.unpack_one(data, "x").float() for data in one.pack(values)])
        error = 1 - torch.nn.functional.cosine_similarity(back.double(), values.double(), dim=-1)
        assert error.max() < limit, (dtype, float(error.max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: setattr(c.latents, "name", "sd-vae-ft-ema"),
            "latents.name=sd-vae-ft-ema, but the moments of the set",
        ),
        (lambda c: setattr(c.latents, "weights", "hub"), "made with the weights vae, but the run's latents has hub"),
        (lambda c: setattr(c.alignment["repa"], "encoder", "dinov2-vit-b"), "no tokens of encoder=dinov2-vit-b"),
        (
            lambda c: setattr(c.alignment["repa"], "weights", "random"),
            "weights package, but the run's encoder has random",
        ),
        (
            lambda c: setattr(c.model, "name", "SiT-Nano/4"),
            "holds 4 tokens an image of encoder=effnet-lite0, but the model",
        ),
    ],
)
def test_features_of_other_networks_are_refused(cached, vae, change, message):
    config = config_of(cached / "png", vae, "moments+tokens")
    change(config)
    with pytest.raises(ConfigError, match=message) as error:
        stored_features_of(config, open_dataset(cached / "png"))
    assert "\n" not in str(error.value)


def test_a_set_without_features_and_a_vae_with_other_weights(cached, vae, digits, tmp_path):
    with pytest.raises(ConfigError, match="holds no moments; prepare it with --moments"):
        stored_features_of(config_of(digits, vae, "moments"), open_dataset(digits))
    other = small_vae(tmp_path / "vae")  # the same name, other weights
    with torch.no_grad():
        other.encoder.conv_in.bias += 0.1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match="moments were made by a sd-vae-ft-mse with other weights"):
        step_inputs(config_of(cached / "png", tmp_path / "vae", "moments"))


def test_stored_features_are_part_of_the_identity_and_leave_a_pair_a_pair(vae):
    keys = {}
    for mode in ("image", "moments", "moments+tokens"):
        for method in ("repa", "baseline"):
            keys[mode, method] = identity_keys(config_of("set", vae, mode, method), "fingerprint")
    assert len({identity_hash(keys[mode, "repa"]) for mode in ("image", "moments", "moments+tokens")}) == 3
    assert pair_id(keys["moments+tokens", "repa"]) == pair_id(keys["moments", "baseline"])
    assert "data.stored_moments" not in keys["image", "repa"], "older runs keep their hash"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--moments", "sd-vae"], "latents.name=sd-vae is not a latent space"),
        (["--moments", "identity", "--moments-dtype", "bf16"], "would round the posterior away; use fp32 or fp16"),
        (["--tokens", "dino"], "encoder=dino is not an encoder"),
        (["--tokens", ENCODER], "give --token-grid"),
        (["--tokens", ENCODER, "--tokens-dtype", "fp8"], "use bf16, fp16, int8"),
        (["--flip"], "give --moments or --tokens"),
        (["--moments", "sd-vae-ft-mse"], "does not divide by 8"),
    ],
)
def test_wrong_words(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        main(["digits", "--out", str(tmp_path / "set"), "--size", "8" if "sd-vae-ft-mse" not in more else "12", *more])
    assert not (tmp_path / "set").exists()


def test_sizes_are_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    """ImageNet's tokens on a disk that cannot hold them."""
    monkeypatch.setattr("repa_scale.prepare.shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ConfigError, match=r"has 10 KB free, but the features alone take 5\.98 MB"):
        main(["digits", "--out", str(tmp_path / "set"), "--size", "8", "--moments", "identity=random", "--flip",
              "--tokens", "effnet-lite0=package", "--token-grid", "2", "--tokens-dtype", "fp16"])  # fmt: skip
    out = capsys.readouterr().out
    assert "moments of identity 768 B (fp32)" in out and "tokens of effnet-lite0 896 B (fp16)" in out
    assert "1797 images" in out and not (tmp_path / "set").exists()


def test_a_changed_feature_is_found_by_the_check(cached, tmp_path, capsys):
    """Of a set whose hashes are right: a feature that is not finite, one that is cut."""
    dataset = open_dataset(cached / "png")
    column = "tokens.effnet-lite0"
    # Three of the first class, whose counts the copy is given.
    rows = [row for row in map(dataset.reader.__getitem__, range(dataset.count)) if row["label"] == 0][:3]
    rows[1][column] = b"\xff\x7f" + rows[1][column][2:]
    rows[2]["moments"] = rows[2]["moments"][:-4]
    _rewrite(dataset, rows, tmp_path / "set")
    with pytest.raises(DataError, match="2 problems"):
        main(["--check", str(tmp_path / "set")])
    out = capsys.readouterr().out
    assert "its tokens of effnet-lite0 are not finite" in out and "moments has 508 bytes instead of 512" in out


def _rewrite(dataset, rows, out):
    """A set of some rows with the manifest of another."""
    from streaming import MDSWriter

    from repa_scale.data.manifest import data_fingerprint
    from repa_scale.data.mds import read_index
    from repa_scale.data.recipe import COLUMNS

    columns = {"image": "png", **COLUMNS, "moments": "bytes", "tokens.effnet-lite0": "bytes"}
    with MDSWriter(out=str(out), columns=columns, hashes=["sha256"]) as writer:
        for row in rows:
            writer.write(row)
    manifest = {**dataset.manifest, "count": len(rows), "class_counts": [len(rows), 0]}
    manifest["index_sha256"] = hashlib.sha256((out / "index.json").read_bytes()).hexdigest()
    manifest["fingerprint"] = data_fingerprint(manifest["recipe"], manifest["class_names"], read_index(out))
    (out / "dataset.json").write_text(json.dumps(manifest))


def assert_agree(cached, live):
    """fp32 moments and bf16 tokens: the cosine within 1e-4, all else within 2**-9 of its value."""
    assert len(cached) == len(live) > 0
    for a, b in zip(cached, live, strict=True):
        assert a["batch_fingerprint"] == b["batch_fingerprint"]
        assert abs(a["alignment_loss"] - b["alignment_loss"]) < 1e-4
        for key in ("denoising_loss", "loss", "grad_norm"):
            assert abs(a[key] - b[key]) <= 2**-9 * abs(b[key]), (a["step"], key, a[key], b[key])


@pytest.mark.distributed
@pytest.mark.long
def test_two_ranks_prepare_one_set_and_training_takes_it(tmp_path):
    """Under torchrun the bytes are those of one process; 6 steps from the cache are those from the pictures."""
    command = ["digits", "--size", "8", "--limit", "600", "--moments", "identity-grey", "--workers", "1"]
    command += ["--tokens", f"{ENCODER}=package", "--token-grid", "4"]
    launch = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "repa_scale"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "prepare", *command, "--out", tmp_path / "two"], check=True, env=environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*command, "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one" / "dataset.json").read_text() == (tmp_path / "two" / "dataset.json").read_text()
    try:
        rows = {
            source: train(
                [*SMALL, "train.steps=6", f"data.path={tmp_path / 'two'}", f"data.source={source}"],
                tmp_path / source.replace("+", "_"), 1, "alone",
            )
            for source in ("image", "moments+tokens")
        }  # fmt: skip
    finally:
        end_all()
    assert_agree(rows["moments+tokens"], rows["image"])
    assert rows["moments+tokens"][-1].get("encoder_seconds", 0) < 0.5 * rows["image"][-1]["encoder_seconds"]
