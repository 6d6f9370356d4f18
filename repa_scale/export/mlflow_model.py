"""The program inside an MLflow model ("models from code"): run where the model is loaded, and imported nowhere else.

It needs torch, numpy, Pillow and mlflow. The sampler and the noise are the trainer's own files, which lie beside it.
"""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from PIL import Image
from torch import Tensor

from repa_scale import arithmetic, rng
from repa_scale.errors import UserError
from repa_scale.sampling import sample

MOST_ROWS = 256
MOST_STEPS = 1000
BATCH = 32


class ImageModel(mlflow.pyfunc.PythonModel):
    """Rows of class_label, seed, steps and guidance -> rows of png_base64."""

    def load_context(self, context: Any) -> None:
        from torch.export.passes import move_to_device_pass

        folder = Path(context.artifacts["programs"])
        self.facts = json.loads((folder / "model.json").read_text())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.step, self.decode = (
            move_to_device_pass(torch.export.load(folder / f"{name}.pt2"), str(self.device)).module()
            for name in ("denoiser", "decoder")
        )

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        rows = self._rows(pd.DataFrame(model_input))
        given = {**self.facts["sampler"], **{key: value for key, value in (params or {}).items() if value is not None}}
        images: list[str] = [""] * len(rows)
        groups: dict[tuple[int, float], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row["steps"], row["guidance"]), []).append(i)
        for (steps, guidance), members in groups.items():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                with arithmetic.within("fp32"):  # as the programs were compared
                    drawn = self._draw([rows[i] for i in part], steps, guidance, given)
                for i, image in zip(part, drawn, strict=True):
                    images[i] = image
        return pd.DataFrame({"png_base64": images})

    @torch.no_grad()
    def _draw(self, rows: list[dict[str, Any]], steps: int, guidance: float, given: dict[str, Any]) -> list[str]:
        labels = torch.tensor([row["class_label"] for row in rows], device=self.device)
        try:
            latents = sample(
                # The sampler guides by itself; a guidance of 1 asks the program for the velocity alone.
                lambda x, t, labels: self.step(x, t, labels, torch.ones_like(t)),
                self._normal(rows, "sample noise", 0),
                labels,
                self.facts["num_classes"],
                sampler=given["sampler"],
                steps=steps,
                guidance=guidance,
                interval=(float(given["interval"][0]), float(given["interval"][1])),
                path=self.facts["path"],
                step_noise=lambda i: self._normal(rows, "sampler noise", i),
            )
        except (UserError, IndexError) as error:
            raise _refused(str(error)) from None
        pixels = ((self.decode(latents.float()) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [_png(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def _normal(self, rows: list[dict[str, Any]], purpose: str, step: int) -> Tensor:
        """Each row's own noise, that of the first sample of its seed: (N, C, h, w) float32."""
        first, shape = torch.zeros(1, dtype=torch.int64, device=self.device), tuple(self.facts["latent_shape"])
        return torch.cat([rng.normal(row["seed"], purpose, step, first, shape) for row in rows])

    def _rows(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """The rows, checked, with what was left out filled in."""
        if not 1 <= len(table) <= MOST_ROWS:
            raise _refused(f"{len(table)} rows; 1 to {MOST_ROWS} are allowed in a request")
        classes, rows = self.facts["num_classes"], []
        for number, given in enumerate(table.to_dict("records")):
            row = {**self.facts["sampler"], "seed": 0}
            row |= {key: value for key, value in given.items() if not _absent(value)}
            label, seed, steps = (row.get(key) for key in ("class_label", "seed", "steps"))
            guidance = float(given["guidance"]) if given.get("guidance") is not None else float(row["guidance"])
            if not _whole(label) or not 0 <= label <= classes:
                raise _refused(f"row {number}: class_label={label} must be 0 to {classes - 1}, or {classes} for none")
            if not _whole(seed):
                raise _refused(f"row {number}: seed={seed} must be a whole number")
            if not _whole(steps) or not 1 <= steps <= MOST_STEPS:
                raise _refused(f"row {number}: steps={steps} must be 1 to {MOST_STEPS}")
            if not 0 <= guidance <= 1000:  # NaN too
                raise _refused(f"row {number}: guidance={guidance} must be 0 to 1000")
            rows.append(
                {"class_label": int(label), "seed": int(seed), "steps": int(steps), "guidance": guidance},
            )
        return rows


def _absent(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return float(value).is_integer()


def _refused(text: str) -> MlflowException:
    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)  # a server answers 400


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


mlflow.models.set_model(ImageModel())
