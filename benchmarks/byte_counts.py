"""Bytes an element that the plain forms move on a GPU, eagerly and through torch.compile, counted without one.

Eager: what each operation reads and writes, at its dispatch. Compiled: the plain form is traced on CPU tensors; the
graph is propagated again with CUDA tensors that have no contents, and handed to Inductor, which is stopped when it has
written its kernels. It counts their reads and writes itself: each buffer once a kernel.

    python -m benchmarks.byte_counts
"""

from __future__ import annotations

import contextlib
import logging
import math
import types
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from repa_scale.kernels import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IMAGES, TOKENS, WIDTH = 32, 256, 768
H100 = types.SimpleNamespace(
    name="H100", multi_processor_count=132, major=9, minor=0, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, regs_per_multiprocessor=65536, warp_size=32, total_memory=80 << 30,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
    gcnArchName="", L2_cache_size=50 << 20,
)  # fmt: skip


class Written(Exception):
    """Inductor has written its code; `args[0]` is the bytes it moves."""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    elements = IMAGES * TOKENS * WIDTH

    def bf16(tokens: int = TOKENS) -> Tensor:
        return torch.randn(IMAGES, tokens, WIDTH, dtype=torch.bfloat16)

    settings = {"out_dtype": torch.bfloat16}
    print("bytes an element in bf16: eager operations; Inductor's code for an H100, forward + backward")
    for name, function, inputs, differentiable in (
        ("cosine, forward and backward", reference.cosine_loss, (bf16().requires_grad_(), bf16()), True),
        (
            "layernorm, affine, prefix of 1",
            lambda x, *affine: reference.normalize_tokens(x, "layernorm", 1, affine=affine, **settings),
            (bf16(TOKENS + 1), torch.randn(WIDTH), torch.randn(WIDTH)),
            False,
        ),
        ("spatial", lambda x: reference.normalize_tokens(x, "spatial", **settings), (bf16(),), False),
    ):
        with pretended_gpu():  # before anything of Inductor is imported
            moved = inductor_bytes(function, inputs, differentiable)
        eager = eager_bytes(function, inputs, differentiable) / elements
        parts = " + ".join(f"{part / elements:.2f}" for part in moved)
        print(f"{name:32s} eager {eager:6.1f}; Inductor {parts} = {sum(moved) / elements:.2f}")


class Traffic(TorchDispatchMode):
    """Bytes read and written by operations that are no views. A broadcast dimension counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not any(result.alias_info for result in function._schema.returns):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            for x in tensors.values():
                sides = (side for side, stride in zip(x.shape, x.stride(), strict=True) if stride)
                self.moved += math.prod(sides) * x.element_size()
        return out


def eager_bytes(function: Callable, inputs: tuple[Tensor, ...], differentiable: bool) -> int:
    """Bytes of the operations, forward and backward."""
    with Traffic() as traffic, torch.set_grad_enabled(differentiable):
        out = function(*inputs)
        if differentiable:
            out.backward()
    return traffic.moved


def inductor_bytes(function: Callable, inputs: tuple[Tensor, ...], differentiable: bool) -> list[int]:
    """Bytes of the forward graph, and of the backward graph where there is one."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[torch.fx.GraphModule, list, bool]] = []

    def keep(backward: bool) -> Callable:
        def compiler(graph: torch.fx.GraphModule, example: list) -> torch.fx.GraphModule:
            graphs.append((graph, list(example), backward))
            return graph

        return compiler

    traced = aot_function(
        function,
        fw_compiler=keep(False),
        bw_compiler=keep(True),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with torch.set_grad_enabled(differentiable):
        out = traced(*inputs)
    if differentiable:
        out.sum().backward()
    return [_moved(*graph) for graph in graphs]


def _moved(graph: torch.fx.GraphModule, example: list, backward: bool) -> int:
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def stop(lowering: GraphLowering):
        lowering.codegen()
        raise Written(lowering.count_bytes()[0])

    fake = FakeTensorMode()
    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        with fake, torch.no_grad():
            on_gpu = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in example
            ]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        graph.recompile()
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*on_gpu)
        try:
            with tracing(TracingContext(fake)), fake:
                compile_fx.compile_fx_inner(graph, on_gpu, is_backward=backward)
        except Exception as error:
            written = error
            while written is not None and not isinstance(written, Written):
                written = written.__cause__ or written.__context__
            if written is None:
                raise
            return written.args[0]
    raise RuntimeError("Inductor wrote no code")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """What Inductor asks of a GPU before it writes code, answered as an H100 would."""
    import torch._inductor.config as inductor
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    def always(value: object) -> Callable:
        return lambda *_, **__: value

    answers = {
        "is_available": True, "current_device": 0, "device_count": 1, "get_compute_capability": 90,
        "is_bf16_supported": True, "synchronize": None, "is_triton_capable": True, "get_raw_stream": 0,
        "raise_if_triton_unavailable": None, "get_device_properties": H100,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        for name, answer in answers.items():
            patch(mock.patch.object(CudaInterface, name, staticmethod(always(answer))))
        for name, answer in (("get_device_properties", H100), ("current_device", 0)):
            patch(mock.patch.object(CudaInterface.Worker, name, staticmethod(always(answer))))
        for name, answer in (
            ("is_available", True), ("current_device", 0), ("device_count", 1), ("get_device_properties", H100),
            ("get_device_capability", (9, 0)), ("_lazy_init", None), ("set_rng_state", None),
            ("get_rng_state", torch.zeros(16, dtype=torch.uint8)),
        ):  # fmt: skip
            patch(mock.patch.object(torch.cuda, name, always(answer)))
        patch(mock.patch.object(torch.cuda, "device", lambda *_: contextlib.nullcontext()))
        patch(mock.patch.object(CudaInterface, "device", lambda *_: contextlib.nullcontext()))
        patch(mock.patch.object(torch.version, "cuda", "13.0"))
        for name in ("has_triton", "has_triton_package"):
            patch(mock.patch.object(_triton, name, always(True)))
        patch(mock.patch.object(_triton, "triton_hash_with_backend", always("none")))
        patch(inductor.patch(compile_threads=1, force_disable_caches=True))
        yield


if __name__ == "__main__":
    main()
