"""The form `onnx`: the guided step and the decoder as ONNX graphs, checked by onnxruntime on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repa_scale.errors import ConfigError, UserError, reason, require
from repa_scale.export import Options
from repa_scale.export.step import (
    DECODER_INPUT,
    DECODER_OUTPUT,
    STEP_INPUTS,
    STEP_OUTPUT,
    build_decoder,
    build_step,
    check_decoder,
    check_step,
    shape_facts,
    trace_decoder,
    trace_step,
)
from repa_scale.export.torch_export import worst, write_script
from repa_scale.trained import Source

OPSET = 18
STEP_FILE = "denoiser.onnx"
DECODER_FILE = "decoder.onnx"
ONE_FILE_BYTES = 1 << 30  # more weights than this stand beside the graph (an .onnx file cannot hold 2 GB)


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """denoiser.onnx, decoder.onnx (and .onnx.data beside a large one), sample.py and rng.py.

    Raises:
        ConfigError: a dtype that onnxruntime's CPU kernels do not have.
        UserError: a package is missing, or a graph differs from PyTorch by more than its bound.
    """
    if options.dtype == "bf16":
        raise ConfigError("--dtype bf16: onnxruntime has no bf16 kernels for the CPU; use fp32 or fp16 with --to onnx")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "onnx")
    config = source.config
    step, decoder = build_step(source, options), build_decoder(source, options)
    _convert(trace_step(step, config), folder / STEP_FILE, STEP_INPUTS, STEP_OUTPUT)
    _convert(trace_decoder(decoder, config), folder / DECODER_FILE, (DECODER_INPUT,), DECODER_OUTPUT)
    checks = {
        STEP_FILE: check_step(STEP_FILE, load(folder / STEP_FILE), step, options, config),
        DECODER_FILE: check_decoder(DECODER_FILE, load(folder / DECODER_FILE), decoder, config),
    }
    write_script(folder)
    return {**shape_facts(config), "opset": OPSET, "checks": checks, **worst(checks)}


def load(file: Path) -> Callable[..., Tensor]:
    """A graph as a function of CPU tensors, run by onnxruntime."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds have no common base
        raise UserError(f"onnxruntime does not take {file.name}: {reason(error)}") from error
    names = [item.name for item in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


def _convert(program: ExportedProgram, file: Path, inputs: tuple[str, ...], output: str) -> None:
    import onnx
    from onnx_ir.passes.common import DeduplicateInitializersPass

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            verbose=False,
        )
    if made is None:
        raise UserError(f"torch.onnx gave no graph for {file.name}")
    # Both branches of the guidance transpose the weights that they multiply by: once is enough.
    DeduplicateInitializersPass()(made.model)
    _forget_sources(made.model)
    size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values() if value.const_value)
    made.save(str(file), external_data=size > ONE_FILE_BYTES)
    onnx.checker.check_model(str(file))
    opsets = {item.domain: item.version for item in onnx.load(str(file), load_external_data=False).opset_import}
    if opsets.get("", 0) < OPSET:
        raise UserError(f"torch.onnx wrote {file.name} with opset {opsets}, and {OPSET} is the least")


def _forget_sources(model: Any) -> None:
    """Removes what tells of our source files and their paths: most of a small file."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
    model.metadata_props.clear()
