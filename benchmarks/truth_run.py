"""One training run of `truth` in a process of its own: the real trainer, with a configuration that needs no Hydra.

    python -m benchmarks.truth_run RUN --data SET --encoder FILE --precision fp32 --stage 3 --steps 30 --device cuda

Ends with the exit code of the run.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from benchmarks.truth_data import CLASSES, SIZE
from repa_scale import sizes
from repa_scale.config import Config, TermConfig

MODEL, ENCODER = "SiT-Truth/4", "dinov2-vit-s"
GRID = (SIZE // 4, SIZE // 4)  # tokens
sizes.BACKBONES["SiT-Truth"] = sizes.SiTSize(4, 64, 2)  # small enough that its checkpoint is easily carried


def main(argv: list[str] | None = None) -> None:
    from repa_scale.processes import end_process

    args = parse(argv)
    config = configuration(args)
    from repa_scale import frozen, train
    from repa_scale.compose import Origin
    from repa_scale.trainer import Trainer

    # As on a GPU, whatever the device: a bf16 encoder moves the alignment loss more than all the rest of bf16.
    frozen.encoder_dtype = lambda precision, _device: frozen.DTYPES[precision]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.stop_after:
        ask_to_stop(Trainer, args.stop_after)
    try:
        code = train.run(config, Origin())
    except Exception:
        logging.exception("the run failed")
        code = 70
    end_process(int(code))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--data", type=Path, required=True, help="made by truth_data.make_set")
    parser.add_argument("--encoder", type=Path, required=True, help="made by truth_data.make_encoder")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stop-after", type=int, default=0, metavar="STEP", help="create RUN/stop in this step")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    return parser.parse_args(argv)


def configuration(args: argparse.Namespace) -> Config:
    """The run's configuration; every key that it does not name has its default."""
    from repa_scale.compose import complete

    config = Config()
    config.run.dir = str(args.run)
    config.model.name, config.model.num_classes = MODEL, CLASSES
    config.data.path, config.data.image_size, config.data.decoder = str(args.data), SIZE, "pillow"
    config.latents.name = "identity"
    config.alignment = {"repa": TermConfig(ENCODER, weights=str(args.encoder), depth=2, projector_dim=256)}
    config.optimizer.learning_rate, config.ema.decay = 1e-3, 0.9
    train = config.train
    train.steps, train.global_batch, train.log_every = args.steps, 16, 1
    train.precision, train.device, train.deterministic = args.precision, args.device, args.deterministic
    train.checkpoint_every = train.sample_every = 1_000_000  # at the end alone
    config.sample.count, config.sample.batch, config.sample.steps, config.sample.guidance = 16, 16, 10, 1.5
    config.tracking.uri = "none"
    config.deepspeed.config = str(_stage_file(args.run, args.stage))
    return complete(config)


def _stage_file(run: Path, stage: int) -> Path:
    """The packaged DeepSpeed configuration with another ZeRO stage."""
    from repa_scale.deepspeed_config import packaged_file

    values = json.loads(packaged_file().read_text())
    values["zero_optimization"]["stage"] = stage
    file = run.with_name(f"{run.name}.deepspeed.json")
    file.write_text(json.dumps(values))
    return file


def ask_to_stop(trainer: type, step: int) -> None:
    """Have RUN/stop created while `step` runs, as a user would."""
    record = trainer.record

    def asking(self, number, *rest):
        if number == step:
            (self.run.path / "stop").touch()
        return record(self, number, *rest)

    trainer.record = asking


if __name__ == "__main__":
    main()
