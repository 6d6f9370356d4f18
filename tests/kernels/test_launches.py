"""How the kernels are launched, with the launch itself stubbed: CUDA's limits of a grid, the number of launches."""

import pytest
import torch
from repa_scale.kernels import choice, cosine_loss, normalize_tokens, table

pytest.importorskip("triton")
BF16, META = torch.bfloat16, torch.device("meta")
LIMITS = ((1 << 31) - 1, 65535, 65535)  # programs of a grid along x, y, z
IMAGES = 200_000


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, grid)] of the calls so far, on any device."""
    found = []
    monkeypatch.setattr(choice, "unavailable", lambda device: "")
    monkeypatch.setattr(choice, "untraced", lambda *tensors: True)
    monkeypatch.setattr(table, "start", lambda kernel, grid, *_: found.append((kernel.fn.__name__, grid)))
    return found


def normalized(kind, *shape):
    return lambda: normalize_tokens(torch.empty(shape, dtype=BF16, device=META), kind, kernel="triton")


def cosine(reduction, *shape):
    def call():
        x, y = (torch.empty(shape, dtype=BF16, device=META, requires_grad=i == 0) for i in range(2))
        loss = cosine_loss(x, y, reduction=reduction, kernel="triton")
        loss.backward(torch.empty_like(loss))

    return call


def silu(rows, width):
    def call():
        from repa_scale.kernels.projector import through_silu

        through_silu(*(torch.empty(rows, width, dtype=BF16, device=META) for _ in range(2)))

    return call


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (normalized("spatial", IMAGES, 256, 768), {"spatial"}),
        (normalized("spatial", IMAGES, 2, 4096), {"spatial"}),
        (normalized("layernorm", IMAGES, 256, 768), {"layernorm"}),
        (cosine("image", IMAGES, 256, 4096), {"cosine_forward", "group_sums", "cosine_backward"}),
        (cosine("mean", 1, choice.MAX_ROWS, 4), {"cosine_forward", "group_sums", "cosine_backward"}),
        (silu(IMAGES * 256, 2048), {"silu_backward"}),
        (silu(2, 65535 * 64), {"silu_backward"}),
    ],
)
def test_a_grid_of_many_images_is_within_cudas_limits(launches, call, kernels):
    call()
    assert {name for name, _ in launches} == kernels
    for name, grid in launches:
        assert all(1 <= size <= limit for size, limit in zip(grid, LIMITS, strict=False)), (name, grid)


def test_more_rows_than_32_bits_number_are_left_to_torch(launches):
    x = torch.empty(1, choice.MAX_ROWS + 1, 4, dtype=BF16, device=META)
    with pytest.raises(ValueError, match=r"1073741825 rows are more than 1073741824; use kernel='auto' or 'torch'"):
        cosine_loss(x, x, kernel="triton")
    assert cosine_loss(x, x).shape == () and not launches


@pytest.mark.parametrize("reduction", ["mean", "image"])
def test_the_cosine_is_three_launches(launches, reduction):
    cosine(reduction, 32, 256, 768)()
    assert [name for name, _ in launches] == ["cosine_forward", "group_sums", "cosine_backward"]
