"""Weights of the hub: fetched once, checked by hash, and then never asked for again. The real client asks a server."""

import pytest
from hub_server import serving

from repa_scale import weights
from repa_scale.compose import compose
from repa_scale.encoders import build_encoder
from repa_scale.errors import DataError, UserError
from repa_scale.latents import build_latents
from repa_scale.weights import HubFile

FILE = HubFile("owner/name", "model.safetensors", "encoder=some")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one file, and an empty cache."""
    from huggingface_hub import constants, file_download

    folder = tmp_path / "hub"
    (folder / FILE.repo).mkdir(parents=True)
    (folder / str(FILE)).write_bytes(b"weights" * 1000)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving(folder) as server:
        # What HF_ENDPOINT sets when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_file_is_fetched_once_and_then_the_hub_is_not_asked(hub):
    assert weights.cached(FILE) is None
    path = weights.local(FILE)
    assert path.read_bytes() == b"weights" * 1000 and weights.intact(path)
    assert [each.split()[0] for each in hub.asked] == ["HEAD", "GET"]
    hub.asked.clear()
    assert weights.local(FILE) == weights.fetch(FILE) == weights.cached(FILE) == path
    assert hub.asked == []


def test_a_damaged_file_is_found_and_fetched_again(hub):
    path = weights.fetch(FILE)
    blob = path.resolve()
    content = bytearray(blob.read_bytes())
    content[5000] ^= 1
    blob.write_bytes(content)
    assert not weights.intact(path)
    assert weights.intact(weights.fetch(FILE)) and path.read_bytes() == b"weights" * 1000


def test_a_hub_that_sends_something_else_is_not_believed(hub):
    hub.lie = True
    with pytest.raises(DataError, match="another hash than the hub promised"):
        weights.fetch(FILE)
    assert weights.cached(FILE) is None
    hub.lie = False
    weights.fetch(FILE)


def test_a_small_file_is_checked_by_gits_hash(tmp_path):
    import hashlib

    content = b'{"a": 1}'
    blob = tmp_path / hashlib.sha1(b"blob 8\0" + content).hexdigest()
    blob.write_bytes(content)
    assert weights.intact(blob)
    blob.write_bytes(b'{"a": 2}')
    assert not weights.intact(blob)


def test_offline_is_said_with_the_remedy(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"is not in the cache .*HF_HUB_OFFLINE=1 forbids.*repa-scale doctor --fetch"):
        weights.local(FILE)
    assert hub.asked == []


def test_a_run_names_the_files_that_it_reads():
    files = weights.needed(compose(["experiment=repa_sit_xl"]))
    assert [str(file) for file in files] == [
        "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors",
        "stabilityai/sd-vae-ft-mse/config.json",
        "stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
    ]
    assert len(weights.needed(compose(["experiment=baseline_sit_xl"]))) == 2
    assert len(weights.needed(compose(["experiment=repa_sit_xl", "data.source=moments+tokens"]))) == 2
    assert weights.needed(compose(["experiment=demo_repa"])) == []


@pytest.mark.long
def test_networks_are_built_from_the_cache_without_the_hub(hub, tmp_path):
    """Two sorts of weights, made by the libraries themselves; the second time nobody is asked."""
    import timm
    import torch
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    torch.manual_seed(7)
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0)
    folder = hub.folder / "timm" / "vit_small_patch14_dinov2.lvd142m"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    AutoencoderTiny().save_pretrained(hub.folder / "madebyollin" / "taesd")
    config = compose(["latents.name=taesd"])
    for asked in (6, 0):  # HEAD and GET of three files
        encoder = build_encoder("dinov2-vit-s", "hub", (4, 4), "cpu", torch.float32)
        assert torch.equal(encoder.network.blocks[3].mlp.fc1.weight, network.blocks[3].mlp.fc1.weight)
        build_latents(config, "cpu", torch.float32)
        assert len(hub.asked) == asked, hub.asked
        hub.asked.clear()
