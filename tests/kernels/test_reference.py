"""The plain definitions: their derivatives, weights and shapes, what is refused, and the choice of the kernel."""

import pytest
import torch
import torch.nn.functional as F
from repa_scale.kernels import choice, cosine_loss, normalize_tokens, projector_cosine_loss, table
from torch import nn


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["mean", "image"])
def test_gradcheck_of_the_cosine(reduction):
    x, y, weight = normal(2, 3, 7).requires_grad_(), normal(2, 3, 7, seed=1), normal(2, 1, seed=2)
    for w in (None, weight):
        assert torch.autograd.gradcheck(lambda x, w=w: cosine_loss(x, y, w, reduction), x)
    assert torch.autograd.gradgradcheck(lambda x: cosine_loss(x, y, None, reduction), x)


def test_gradcheck_of_the_projector():
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3)).double()
    hidden = normal(2, 3, 4).requires_grad_()
    parameters = [p.detach().requires_grad_() for p in projector.parameters()]

    def loss(hidden, *parameters):
        named = dict(zip((name for name, _ in projector.named_parameters()), parameters, strict=True))
        project = torch.func.functional_call
        return cosine_loss(project(projector, named, (hidden,)), normal(2, 3, 3, seed=1), reduction="image")

    assert torch.autograd.gradcheck(loss, (hidden, *parameters))
    assert torch.equal(
        loss(hidden, *parameters),
        projector_cosine_loss(hidden, projector, normal(2, 3, 3, seed=1), reduction="image"),
    )


@pytest.mark.parametrize(("kind", "prefix"), [("layernorm", 0), ("layernorm", 2), ("spatial", 0), ("spatial", 2)])
def test_gradcheck_of_the_normalisations(kind, prefix):
    assert torch.autograd.gradcheck(lambda x: normalize_tokens(x, kind, prefix), normal(2, 5, 4).requires_grad_())


def test_weights_and_reductions():
    x, y, weight = normal(2, 3, 7), normal(2, 3, 7, seed=1), normal(2, 3, seed=2)
    cosine = F.cosine_similarity(x, y, dim=-1)
    assert torch.allclose(cosine_loss(x, y), -cosine.mean())
    assert torch.allclose(cosine_loss(x, y, reduction="image"), -cosine.mean(1))
    assert torch.allclose(cosine_loss(x, y, weight), -(weight * cosine).mean())
    assert torch.allclose(cosine_loss(x, y, weight[:, :1], "image"), -(weight[:, :1] * cosine).mean(1))
    assert torch.allclose(cosine_loss(x[0], y[0], weight[0]), -(weight[0] * cosine[0]).mean())
    assert torch.allclose(cosine_loss(x[None], y[None], weight), -(weight * cosine).mean())


def test_layernorm_with_affine_and_prefix_is_that_of_a_network():
    norm = nn.LayerNorm(8, eps=1e-6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = normal(2, 9, 8)
    ours = normalize_tokens(x, "layernorm", 5, affine=(norm.weight, norm.bias))
    assert torch.allclose(ours, norm(x)[:, 5:])
    assert normalize_tokens(x, "layernorm", out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert normalize_tokens(x.half(), "layernorm").dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: cosine_loss(x, x[:, :2]), "one shape"),
        (lambda x: cosine_loss(x, x, kernel="cuda"), "must be one of auto, triton, torch"),
        (lambda x: cosine_loss(x, x, reduction="sum"), "mean, or image"),
        (lambda x: cosine_loss(x[0], x[0], reduction="image"), "mean, or image"),
        (lambda x: cosine_loss(x, x, torch.ones(3, 5)), "does not broadcast"),
        (lambda x: normalize_tokens(x, "batch"), "layernorm or spatial"),
        (lambda x: normalize_tokens(x, "spatial", 2), "need 2 or more behind a prefix of 2"),
        (lambda x: normalize_tokens(x, "layernorm", 3), "need 1 or more"),
        (lambda x: projector_cosine_loss(x, nn.Identity(), x, reduction="image", chunk=8), "reduction='mean'"),
        (lambda x: projector_cosine_loss(x, nn.Identity(), x, chunk=0), "1 row or more"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(torch.ones(2, 3, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_takes_torch_and_refuses_triton():
    x = torch.ones(2, 3, 4)
    assert cosine_loss(x, x).item() == -1.0
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        cosine_loss(x, x, kernel="triton")


def test_no_rows_are_no_launch():
    assert cosine_loss(torch.ones(0, 3, 4), torch.ones(0, 3, 4), reduction="image", kernel="triton").shape == (0,)


def test_the_table_covers_every_size_and_keeps_the_order_of_sums():
    for size in range(1, choice.MAX_WIDTH + 1):
        for kernel in ("cosine", "layernorm"):
            assert size <= table.tile(kernel, size, 90).columns < max(128, 2 * size)
    for size in range(1, choice.MAX_TOKENS + 1):
        assert size <= table.tile("spatial", size, 90).rows
    rows = [table.TILES["cosine"][architecture] for architecture in table.ARCHITECTURES]
    assert all(row == rows[0] for row in rows)
    assert table.tile("cosine", 768, 89) == table.TILES["cosine"][80][1024]
    assert table.tile("cosine", 768, 120) == table.TILES["cosine"][100][1024]
