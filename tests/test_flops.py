"""The counted operations against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa_scale.compose import compose
from repa_scale.encoders import build_encoder
from repa_scale.flops import backbone_flops, encoder_flops, most_images_per_second, projector_flops
from repa_scale.models import build_sit
from repa_scale.models.projectors import build_projector


def counted(module, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/4"])
def test_a_backbone_is_counted_within_2_percent(name):
    """Embeddings, the last layer and the conditioning network are left out."""
    with sdpa_kernel(SDPBackend.MATH):
        model = build_sit(compose([f"model.name={name}"]))
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        real = counted(model, *inputs)
    tokens = (32 // int(name[-1])) ** 2
    assert backbone_flops(name, tokens) == pytest.approx(real, rel=0.02)


def test_the_papers_numbers():
    assert backbone_flops("SiT-XL/2", 256) / 1e9 == pytest.approx(237, abs=1)
    with torch.device("meta"):
        projector = build_projector("mlp", 1152, 2048, 768, (16, 16))
        assert projector_flops(1152, 768, 256) == counted(projector, torch.zeros(1, 256, 1152))


def test_a_vit_is_counted_within_2_percent():
    with sdpa_kernel(SDPBackend.MATH):
        encoder = build_encoder("dinov2-vit-s", "random", (16, 16), "cpu", torch.float32)
        real = counted(encoder, torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    assert encoder_flops("dinov2-vit-s", 256) == pytest.approx(real, rel=0.02)


def test_a_convolutional_encoder_is_counted_within_2_percent():
    encoder = build_encoder("effnet-lite0", "random", (8, 8), "cpu", torch.float32)
    real = counted(encoder, torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    assert encoder_flops("effnet-lite0", 64) == pytest.approx(real, rel=0.02)


def test_a_faster_gpu_and_a_baseline_need_more_images():
    slow, fast = (most_images_per_second("SiT-XL/2", "dinov2-vit-b", 256, gpu) for gpu in ("A100", "H100"))
    assert 1 < slow < fast < most_images_per_second("SiT-XL/2", None, 256, "H100")
