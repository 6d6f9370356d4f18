"""The plan as a table for people."""

from __future__ import annotations

from typing import Any

BOUND = {
    "matrix": "matrix products",
    "elementwise": "element-wise work (train.compile=true shortens it)",
    "frozen": "the frozen networks (store their features: repa-scale prepare --moments --tokens)",
    "communication": "communication between the ranks (a larger batch hides it)",
    "host": "the host's Python (a larger micro batch hides it)",
    "data": "decoding (more data.workers, stored features, or DALI)",
}


def page(plan: dict[str, Any]) -> str:
    """The lines of a plan (values.py)."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_step(plan), "", *_rest(plan), "", *_advice(plan)])


def _head(plan: dict[str, Any]) -> list[str]:
    cluster, model, settings = plan["cluster"], plan["model"], plan["settings"]
    encoders = ", ".join(model["encoders"]) or "none that runs"
    return [
        f"{model['name']}, {model['parameters']:,} parameters, {model['tokens']} tokens; encoder: {encoders}; "
        f"data.source={settings['source']}",
        f"{cluster['nodes']} x {cluster['gpus']} {cluster['gpu']}, network {cluster['network']:g} Gbit/s a GPU; "
        f"ZeRO stage {settings['zero_stage']}, batch {settings['global_batch']} = {cluster['ranks']} ranks x "
        f"{settings['micro_batch']} x {settings['accumulation']}, {settings['precision']}"
        f"{', compiled' if settings['compile'] else ''}"
        f"{', checkpointed' if settings['activation_checkpointing'] else ''}",
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    values = plan["memory"]
    rows = [
        *((f"  {name}", size) for name, size in values["state_bytes"].items()),
        ("  gathered weights", values["gathered_bytes"]),
        ("  gradient bucket", values["bucket_bytes"]),
        ("  activations", values["activation_bytes"]),
        ("  frozen networks", values["frozen_weight_bytes"]),
        ("  while they run", values["frozen_work_bytes"]),
        ("  CUDA, NCCL", values["runtime_bytes"]),
    ]
    end = "fits" if values["fits"] else "DOES NOT FIT"
    return [
        "memory of a rank",
        *(f"{name:<20}{size / 1e9:9.2f} GB" for name, size in rows),
        f"{'  peak':<20}{values['peak_bytes'] / 1e9:9.2f} GB of {values['gpu_bytes'] / 1e9:g}: {end}",
    ]


def _step(plan: dict[str, Any]) -> list[str]:
    values = plan["step"]
    rows = ("matrix", "elementwise", "frozen", "communication", "host", "data", "optimizer")
    return [
        "a step",
        *(f"  {name:<18}{values[f'{name}_seconds'] * 1e3:9.1f} ms" for name in rows),
        f"{'  together':<20}{values['seconds'] * 1e3:9.1f} ms, bound by {BOUND[values['bound_by']]}",
        f"  {values['images_per_second']:,.0f} images/s, {values['images_per_second_a_gpu']:,.0f} a GPU, "
        f"the backbone at {values['share_of_peak']:.0%} of the peak",
    ]


def _rest(plan: dict[str, Any]) -> list[str]:
    run, save, data = plan["run"], plan["checkpoint"], plan["data"]
    cost = f", cost {run['cost']:,.0f}" if run["cost"] is not None else ""
    return [
        f"run         {run['steps']:,} steps ({run['epochs']:.1f} epochs): {run['days']:.2f} days, "
        f"{run['gpu_hours']:,.0f} GPU-hours{cost}",
        f"checkpoint  {save['bytes'] / 1e9:.1f} GB, {save['bytes_a_rank'] / 1e9:.2f} a rank; written in "
        f"{save['write_seconds']:.1f} s, training waits {save['waits_seconds']:.2f} s; {save['saves']} saves, "
        f"{save['kept_bytes'] / 1e12:.2f} TB stay",
        f"data        {data['bytes_an_image'] / 1e3:.0f} KB an image, {data['set_bytes'] / 1e9:,.0f} GB; a node reads "
        f"{data['bytes_per_second_a_node'] / 1e6:,.0f} MB/s and needs {data['cores_a_node']:.1f} cores for "
        f"{data['images_per_second_a_node']:,.0f} images/s (workers: {data['workers_a_node']})",
    ]


def _advice(plan: dict[str, Any]) -> list[str]:
    advice = plan["advice"]
    words = f"ZeRO stage {advice['zero_stage']}, train.micro_batch={advice['micro_batch']}"
    if advice["activation_checkpointing"]:
        words += ", train.activation_checkpointing=true"
    if not advice["fits"]:
        return [
            f"advice      nothing fits; the least is {words} ({advice['peak_bytes'] / 1e9:.0f} GB): take more ranks"
        ]
    return [
        f"advice      {words}: {advice['step_seconds'] * 1e3:.0f} ms, {advice['peak_bytes'] / 1e9:.1f} GB, "
        f"bound by {BOUND[advice['bound_by']].partition(' (')[0]}",
        "times are counts over the rates of data sheets, and none was measured on a GPU: docs/plan.md",
    ]
