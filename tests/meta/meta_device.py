"""A GPU without a GPU: the `meta` device, watched as a GPU would behave.

`meta` tensors have shapes and dtypes and no values. They refuse to mix with tensors of the host, so a tensor made on
the wrong device is an error; and they cannot be read, so every read is found. Inside `Watched` a read gets an answer
from a table and is noted with the function it stands in. So is each blocking copy, each wait for a stream, and each
tensor that is computed on the host.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import repa_scale

META = torch.device("meta")
ROOT = Path(repa_scale.__file__).parents[1]
ROOMS = {f"{ROOT / 'repa_scale'}/": "", f"{ROOT / 'kernels'}/": "kernels."}
aten = torch.ops.aten
PURE = ("rng", "interpolant", "metrics.")
# They launch nothing on a GPU.
VIEWS = frozenset(
    """view _unsafe_view t transpose permute unsqueeze expand slice select split chunk detach alias as_strided unbind
    squeeze narrow split_with_sizes empty new_empty empty_like view_as reshape empty_strided lift_fresh
    _reshape_alias is_pinned diagonal unfold new_empty_strided""".split()  # noqa: SIM905
)
MOVES = {aten._to_copy.default, aten.copy_.default, aten._pin_memory.default}
# They take tensors of both on a GPU too: positions on the host, and copies.
MIXED = {*MOVES, aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._foreach_copy_.default}
# A tensor on the host that nothing is computed for: a number on its way, a place to copy to.
NOTHING_COMPUTED = {*MOVES, aten.is_pinned.default, aten.empty_like.default, aten.empty_strided.default}


class Watched(TorchDispatchMode):
    """Notes what each phase launches, and where the host waits for the device.

    Args:
        answers: what a read gives, by the function it stands in: a number, or for a whole tensor a function of its
            shape; 0 and zeros where there is none.

    Attributes:
        launches: by phase, how often each operation that is not a view ran on the device.
        notes: (kind, function) -> how often. `read`: a value comes to the host. `upload`: a copy to the device that the
            host waits for. `wait`: for a stream, an event or the device. `host`: a tensor is computed on the host.
        contexts: GPUs on which a thread that left a stream made CUDA start.
    """

    def __init__(self, answers: Mapping[str, object]) -> None:
        super().__init__()
        self.answers = answers
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        self.notes: Counter[tuple[str, str]] = Counter()
        self.contexts: set[object] = set()
        self.phase = "start"
        self._pinned: set[int] = set()
        self._lock = threading.Lock()

    def note(self, kind: str) -> str:
        """Notes it under the innermost function of the package, and returns that function."""
        where = here()
        with self._lock:
            self.notes[kind, where] += 1
        return where

    def forget(self) -> None:
        """What was noted so far: the run is built now."""
        self.launches.clear()
        self.notes.clear()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is aten._local_scalar_dense.default and args[0].device == META:
            answer = self.answers.get(self.note("read"), 0)
            kind = args[0].dtype
            return bool(answer) if kind == torch.bool else float(answer) if kind.is_floating_point else int(answer)
        if op in MOVES and (moved := self._moved(op, args, kwargs)) is not None:
            return moved
        if op is aten.is_pinned.default:
            return self.pinned(args[0])
        if kwargs.get("pin_memory"):
            return self.pin(op(*args, **{**kwargs, "pin_memory": False}))
        if op is aten._fused_adamw_.default or op is aten._fused_adamw_.tensor_lr:  # no kernel for meta
            self._launched(op)
            return None
        if op.overloadpacket is aten.to:  # of a tensor made in inference mode, which dispatch shows undecomposed
            with self:
                return op.decompose(*args, **kwargs)
        if op not in MIXED:
            _require_one_device(op, (*args, *kwargs.values()))
        found = op(*args, **kwargs)
        if isinstance(found, Tensor) and found.device.type == "cpu":
            if op not in NOTHING_COMPUTED and op.__name__.split(".")[0] not in VIEWS:
                self.note("host")
        else:
            self._launched(op)
        return found

    def _launched(self, op) -> None:
        name = op.__name__.split(".")[0]
        if name not in VIEWS:
            with self._lock:
                self.launches[self.phase][name] += 1

    def _moved(self, op, args, kwargs) -> Tensor | None:
        """Copies between host and device, as CUDA makes them: without a wait only out of and into pinned memory."""
        if op is aten._pin_memory.default:
            return self.pin(args[0].clone())
        source = args[1] if op is aten.copy_.default else args[0]
        if op is aten.copy_.default:
            target = args[0].device
            behind = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            target = torch.device(kwargs.get("device") or source.device)
            behind = kwargs.get("non_blocking", False)
        if {source.device.type, target.type} != {"cpu", "meta"}:
            return None
        self._launched(op)
        if target == META:
            if not (behind and self.pinned(source)):
                self.note("upload")
            return None
        if op is aten.copy_.default:
            if not (behind and self.pinned(args[0])):
                self.note("read")
            return args[0].zero_()
        answer = self.answers.get(self.note("read"), torch.zeros)
        return answer(source.shape).to(kwargs.get("dtype") or source.dtype)


def _require_one_device(op, args: tuple) -> None:
    """What CUDA refuses and `meta` lets pass: products, convolutions, lookups and gathers with a tensor of the host."""
    given = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    tensors = [each for each in given if isinstance(each, Tensor)]
    if any(t.device == META for t in tensors) and any(t.device.type == "cpu" and t.dim() for t in tensors):
        raise RuntimeError(f"{op.__name__}: expected all tensors on the same device, found {META} and cpu")


class Factories(TorchFunctionMode):
    """`torch.tensor` of Python numbers on the device copies them there and waits; dispatch does not see it on meta."""

    MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in self.MAKERS and found.device == META:
            self.watched.note("upload")
        return found


def here() -> str:
    """`module.function` of the innermost function of the package that is running, but for generators, lambdas and the
    rooms of pure functions, whose caller chose the device."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for room, prefix in ROOMS.items():
            module = prefix + file[len(room) : -len(".py")].replace("/", ".")
            if file.startswith(room) and not module.startswith(PURE) and not function.startswith("<"):
                return f"{module}.{function}"
        frame = frame.f_back
    return "outside"
