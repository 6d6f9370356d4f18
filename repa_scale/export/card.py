"""model_card.md: what was trained on what, how good it was measured to be, what it is for, and whose licences count."""

from __future__ import annotations

from repa_scale import evaluations
from repa_scale.evaluations import Evaluation
from repa_scale.export import Options
from repa_scale.sizes import latent_spec
from repa_scale.trained import Source

# By the beginning of an encoder's name (sizes.ENCODERS), as their publishers state them.
ENCODER_LICENCES = {
    "dinov2-": "Apache 2.0",
    "dinov3-": "DINOv3 License (Meta; its terms bind those who pass models on)",
    "dino-": "Apache 2.0",
    "mae-": "CC BY-NC 4.0 (not for commercial use)",
    "mocov3-": "CC BY-NC 4.0 (not for commercial use)",
    "clip-": "MIT",
    "siglip2-": "Apache 2.0",
    "ijepa-": "CC BY-NC 4.0 (not for commercial use)",
    "effnet-": "Apache 2.0",
}
VAE_LICENCES = {"sd-vae-ft-mse": "MIT", "sd-vae-ft-ema": "MIT", "taesd": "MIT"}
CARD = "model_card.md"
UNKNOWN = "not known: ask its publisher"


def model_card(source: Source, options: Options, use: str) -> str:
    """The card as Markdown.

    Args:
        use: the section on how this form is used.
    """
    config, facts = source.config, source.facts
    imported = facts.get("imported")
    kind = "imported" if imported else "REPA" if config.method == "repa" else config.method
    lines = [
        f"# {config.model.name}, {config.data.image_size} px, {kind}, step {_known(facts['step'])}",
        "",
        "A class-conditional diffusion transformer (SiT) that predicts the velocity from data (t = 0) to noise (t = 1)"
        f" on the {config.interpolant.path} path"
        + (", converted from a public checkpoint." if imported else ", trained with `repa_scale`."),
        "",
        "## Use",
        "",
        use.strip(),
        "",
        "## Data",
        "",
        *_table(
            ("images", f"{config.data.image_size} x {config.data.image_size} pixels"),
            ("classes", f"{config.model.num_classes}; the label {config.model.num_classes} stands for none"),
            ("fingerprint of the data set", _known(facts.get("data_fingerprint"))),
            ("samples seen", _known(facts["samples"])),
        ),
        "",
        "## Method",
        "",
        *_table(
            ("model", config.model.name),
            ("weights", "exponential moving average" if facts["weights"] == "ema" else "as the optimiser left them"),
            ("latent space", config.latents.name),
            *_terms(source),
            ("optimiser steps", _known(facts["step"])),
            *(_imported(imported) if imported else [("global batch", str(config.train.global_batch))]),
            ("precision of training", "not recorded" if imported else config.train.precision),
            ("precision of this file", options.dtype),
            ("commit of the training code", _known(facts.get("git_commit"))),
            ("MLflow run", _known(facts.get("mlflow_run_id"))),
            ("identity of the run", _known(facts["identity_hash"])),
        ),
        "",
        "## Measured quality",
        "",
        *_metrics(source),
        "",
        "## Intended use and limits",
        "",
        "Research on generative models, and images of the classes above. It knows nothing but its training images and "
        "repeats their biases; small parts such as faces, hands and letters are often wrong, and single training "
        "images may be recalled. Not for images of real persons that could deceive, nor for decisions about people.",
        "",
        "## Licences",
        "",
        *_licences(source, options),
        "",
    ]
    return "\n".join(lines)


def _table(*rows: tuple[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _known(value: object) -> str:
    return "not recorded" if value in (None, "", "none") else str(value)


def _imported(told: dict) -> list[tuple[str, str]]:
    settings = ", ".join(f"{key} {value}" for key, value in told["args"].items())
    return [
        ("imported from", f"{told['file']}, sha256 {told['sha256']}, {told['convention']} convention"),
        ("what that file says of its training", settings or "nothing"),
    ]


def _terms(source: Source) -> list[tuple[str, str]]:
    if source.facts.get("imported"):
        return []
    if source.config.method == "baseline":
        return [("alignment", "none (baseline)")]
    return [
        (
            f"alignment `{name}`",
            f"{term.encoder} at depth {term.depth}, weight {term.weight}, projector {term.projector}"
            + ("" if term.weights == "hub" else f" (encoder weights: {_name(term.weights)})"),
        )
        for name, term in source.config.alignment.items()
    ]


def _name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _metrics(source: Source) -> list[str]:
    found: list[Evaluation] = evaluations.read(source.run) if source.run else []
    found = [evaluation for evaluation in found if evaluation.step == source.facts["step"]]
    if not found:
        return ["Not measured at this step."]
    lines = ["| metric | value | samples | 95 % interval | how it was measured |", "|---|---|---|---|---|"]
    for e in found:
        interval = "" if e.low is None or e.high is None else f"{e.low:.4g} to {e.high:.4g}"
        how = ", ".join(f"{key} {value}" for key, value in e.protocol.items())
        lines.append(f"| {e.metric} | {e.value:.6g} | {e.count} | {interval} | {how.replace('|', '/')} |")
    return lines


def _licences(source: Source, options: Options) -> list[str]:
    lines = ["- The weights: whoever trained them decides; the images of the data set have terms of their own."]
    if imported := source.facts.get("imported"):
        encoders = [str(imported["args"]["enc_type"])] if "enc_type" in imported["args"] else []
    else:
        encoders = [] if source.config.method == "baseline" else [t.encoder for t in source.config.alignment.values()]
    for encoder in dict.fromkeys(encoders):
        licence = next((text for start, text in ENCODER_LICENCES.items() if encoder.startswith(start)), UNKNOWN)
        lines.append(f"- Target encoder {encoder} (used in training alone): {licence}.")
    name = source.config.latents.name
    if options.vae:
        lines.append(f"- VAE {_name(options.vae)}: {VAE_LICENCES.get(_name(options.vae), UNKNOWN)}.")
    elif latent_spec(name).kind != "identity":
        lines.append(f"- VAE {latent_spec(name).source}: {VAE_LICENCES.get(name, UNKNOWN)}.")
    else:
        lines.append("- No VAE: the model works on pixels.")
    return lines
