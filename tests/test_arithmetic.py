"""float32 is what a recipe says: in convolutions and in matrix products, whatever was set before."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from repa_scale import arithmetic
from repa_scale.config import Config
from repa_scale.data.features import Stored, stored_features, why_another
from repa_scale.data.ingest import _claim
from repa_scale.data.recipe import Recipe
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.evaluate.hidden import Asked, Subject
from repa_scale.evaluate.pictures import Block
from repa_scale.extractors import Extractor, ExtractorSpec
from repa_scale.features import FeatureNetworks, tokens_arithmetic
from repa_scale.online import OnlineEvaluation
from repa_scale.prepare import _check_ranks, _same_recipe
from repa_scale.ranks import Ranks

B = torch.backends
STARTS = {
    "torch's own": lambda: None,
    "the older interface": lambda: (setattr(B.cuda.matmul, "allow_tf32", True), setattr(B.cudnn, "allow_tf32", False)),
    "the newer interface": lambda: (
        setattr(B.cuda.matmul, "fp32_precision", "tf32"),
        setattr(B.cudnn.conv, "fp32_precision", "ieee"),
    ),
    "the whole of torch": lambda: setattr(B, "fp32_precision", "tf32"),
    "bf16 products on a CPU": lambda: torch.set_float32_matmul_precision("medium"),
}


def switches():
    """Convolutions and products by the newer interface, then by the older one, which raises where they disagree."""
    newer = B.cudnn.conv.fp32_precision, B.cuda.matmul.fp32_precision
    return (*newer, B.cudnn.allow_tf32, B.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())


FP32, TF32 = ("ieee", "ieee", False, False, "highest"), ("tf32", "tf32", True, True, "high")


@pytest.fixture(autouse=True)
def switches_are_given_back():
    before, whole = arithmetic._state(), B.fp32_precision
    yield
    B.fp32_precision = whole
    arithmetic._set(*before)


@pytest.mark.parametrize("start", STARTS)
def test_both_switches_are_set_through_both_interfaces(start):
    STARTS[start]()
    for mode, wanted in (("fp32", FP32), ("tf32", TF32), ("fp32", FP32)):
        arithmetic.use(mode)
        assert switches() == wanted
        assert B.mkldnn.matmul.fp32_precision == B.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("start", STARTS)
def test_a_block_gives_back_what_it_found(start):
    STARTS[start]()
    before = arithmetic._state()
    with arithmetic.within("fp32"):
        assert switches() == FP32
        with arithmetic.within("tf32"), arithmetic.within("tf32"):
            assert switches() == TF32
        assert switches() == FP32
    assert arithmetic._state() == before
    with pytest.raises(ZeroDivisionError), arithmetic.within("tf32"):
        raise ZeroDivisionError
    assert arithmetic._state() == before


@pytest.mark.parametrize("start", STARTS)
def test_blocks_of_threads_that_overlap_end_in_any_order(start):
    STARTS[start]()
    before = arithmetic._state()
    inside, go = threading.Event(), threading.Event()

    def first():
        with arithmetic.within("fp32"):
            inside.set()
            go.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(5)
    with arithmetic.within("fp32"):
        go.set()
        thread.join()
        assert switches() == FP32, "the block that ended first took the arithmetic of the other"
    assert arithmetic._state() == before


def test_blocks_of_two_modes_leave_nothing_behind():
    start = arithmetic._state()
    first, second = arithmetic.within("fp32"), arithmetic.within("tf32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == TF32
    second.__exit__(None, None, None)
    assert arithmetic._state() == start


def test_compiled_code_asks_for_the_switches_and_gets_an_answer():
    """Dynamo and Inductor read both interfaces, and one of them raises where they disagree."""
    arithmetic.use("tf32")
    assert torch._C._get_cublas_allow_tf32() is True
    compiled = torch.compile(lambda x: x @ x + 1, backend="eager")
    assert torch.equal(compiled(torch.eye(2)), torch.eye(2) + 1)


def test_nothing_else_sets_the_switches():
    """But the script of an export, which runs without this package."""
    package = Path(arithmetic.__file__).parent
    setting = re.compile(r"allow_tf32[^\n]* = |set_float32_matmul_precision\(|fp32_precision = ")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if setting.search(path.read_text())}
    assert found == {"arithmetic.py", "export/standalone.py"}


class Network(nn.Module):
    """Notes in what arithmetic it is asked to compute."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, images):
        self.seen.append(switches())
        return {"pool": torch.zeros(len(images), 1)}

    def encode(self, images):
        self.forward(images)
        return torch.zeros(len(images), 1, 1, 1)


def by_an_extractor(network):
    Extractor("name", ExtractorSpec("", "", "", None), network)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def by_prepare(network):
    networks = object.__new__(FeatureNetworks)
    networks.latents, networks.encoders = network, [network.encode]
    networks._values(torch.zeros(1, 3, 8, 8))


def by_a_representation(network):
    subject = object.__new__(Subject)
    subject.device, subject._clean = torch.device("cpu"), lambda images, ids, seed: network.encode(images)
    block = Block(0, torch.zeros(1, 3, 8, 8), torch.zeros(1).long(), torch.zeros(1).long())
    subject.measure(block, Asked((), (), 0, 0, False, False, False), lambda: None)


def by_an_evaluation(network):
    from repa_scale import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_evaluate", lambda args: network(torch.zeros(1)))
        evaluate.main(["samples.npz"])


def by_a_server(network):
    from repa_scale.serving import server

    def opens(*_):
        network(torch.zeros(1))
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="enough"):
        patch.setattr(server, "open_pipeline", opens)
        server.main(["folder", "--port", "0"])


@pytest.mark.parametrize("start", ["torch's own", "the older interface", "the whole of torch"])
@pytest.mark.parametrize(
    "compute",
    [by_an_extractor, by_prepare, by_a_representation, by_an_evaluation, by_a_server],
    ids=lambda f: f.__name__,
)
def test_what_is_called_fp32_is_float32(compute, start):
    STARTS[start]()
    compute(network := Network())
    assert network.seen and set(network.seen) == {FP32}


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", FP32), ("bf16", TF32), ("fp16", TF32)])
def test_a_run_in_fp32_is_float32_in_its_convolutions_too(precision, wanted):
    from repa_scale.trainer import Trainer

    config = Config()
    config.train.precision = precision
    with pytest.raises(AttributeError):  # of ranks; the arithmetic comes before anything is computed
        Trainer(config, None, None, None, None, {}, {})
    assert switches() == wanted


# What was stored says what it was computed in.


def stored(arithmetic="", kind="tokens"):
    return Stored(kind, "effnet-lite0", "package", "0" * 16, "bf16", (4, 8), arithmetic)


def recipe(*arithmetics, weights="0" * 16):
    kinds = ("tokens", "moments")[: len(arithmetics)]
    found = [replace(stored(*pair), weights_sha256=weights) for pair in zip(arithmetics, kinds, strict=True)]
    return Recipe(32, features=tuple(found))


def test_a_set_names_its_arithmetic_and_sets_of_earlier_releases_still_load():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [tokens_arithmetic(dtype, cpu) for dtype in ("bf16", "fp16", "int8")] == ["fp32"] * 3
    assert [tokens_arithmetic(dtype, gpu) for dtype in ("bf16", "fp16", "int8")] == ["bf16", "fp16", "bf16"]
    assert (arithmetic.name(gpu, "bf16"), arithmetic.name(cpu, "fp32")) == ("cuda bf16", "")
    assert stored("cuda bf16").as_dict()["arithmetic"] == "cuda bf16"
    of_earlier = stored().as_dict()
    assert set(of_earlier) == {"kind", "network", "weights", "weights_sha256", "dtype", "shape"}
    assert stored_features({"recipe": {"features": [of_earlier]}}) == [stored()]
    for one in (stored(), stored("cuda bf16")):
        assert Stored.from_dict(one.as_dict()) == one


def test_a_set_begun_on_a_gpu_is_not_gone_on_with_on_a_cpu(tmp_path):
    job = {"source": "s", "recipe": recipe("cuda bf16", "cuda fp32").as_dict()}
    _claim(tmp_path / "out", job)
    _claim(tmp_path / "out", job)
    with pytest.raises(DataError) as found:
        _claim(tmp_path / "out", {**job, "recipe": recipe("", "").as_dict()})
    text = str(found.value)
    assert "tokens of effnet-lite0 by cuda bf16 there, by cpu fp32 (or not recorded) here; moments of" in text
    assert "see --device" in text and "\n" not in text
    assert why_another(job, {**job, "source": "t"}) == "other images or another recipe"
    assert why_another(job, {**job, "recipe": recipe("cuda bf16").as_dict()}) == "other images or another recipe"
    assert _same_recipe(job["recipe"], recipe("", "", weights=""))  # a whole set is what it is, wherever one asks


class Group:
    rank, world_size, is_main = 0, 2, True

    def __init__(self, theirs):
        self.theirs = theirs

    def gather_objects(self, value):
        return [value, self.theirs]


def test_ranks_on_two_kinds_of_device_do_not_share_a_set():
    ours = recipe("cuda bf16")
    _check_ranks(ours, Group(ours.as_dict()))
    with pytest.raises(
        ConfigError, match=r"effnet-lite0 by cuda bf16 on rank 0, by cpu fp32 .* on rank 1\); start all"
    ):
        _check_ranks(ours, Group(recipe("").as_dict()))


def test_statistics_of_a_gpu_and_of_a_cpu_have_two_names(tmp_path):
    evaluation = object.__new__(OnlineEvaluation)
    evaluation.config = Config()
    evaluation.dataset = type("Set", (), {"path": tmp_path, "fingerprint": "f"})
    extractor = Extractor("name", ExtractorSpec("", "", "", None), Network())
    names = []
    for device in ("cpu", "cuda"):
        evaluation.ranks = Ranks(0, 0, 1, torch.device(device))
        names.append(evaluation._files(extractor)[0].name)
    assert names[0] != names[1]
    from repa_scale.statistics_file import statistics_name

    count = evaluation.config.evaluate.reference_count
    assert names[0] == statistics_name("name", "f", extractor.fingerprint, count)  # as earlier releases wrote it
