"""cli.py: verbs, help, exit codes."""

import os
import subprocess
import sys

import pytest

from repa_scale.cli import VERBS, main


def test_help_lists_every_verb_and_imports_no_torch(tmp_path):
    script = "import sys; from repa_scale.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"  {verb}" in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_shows_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"repa-scale {verb} " in text and "example" in text.lower()


def test_the_module_is_the_same_program(tmp_path):
    run = [sys.executable, "-m", "repa_scale", "--version"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("repa-scale 0.")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["'trian' is not a verb", "'train'"]),
        (["train", "train.stepz=3"], ["train.stepz", "'train.steps'"]),
        (["train", "--cfg", "job", "experiment=demo_rep"], ["'demo_repa'"]),
        (["train", "experiment=demo_repa", "train.precision=fp8"], ["train.precision=fp8"]),
        (["train", "experiment=demo_repa", "data.path=/absent", "train.device=cpu"], ["/absent"]),
    ],
)
def test_bad_input_is_one_line_and_code_64(argv, parts, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    run = [sys.executable, "-m", "repa_scale", *argv]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 64, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 1 and errors[0].startswith("repa-scale: error: "), done.stderr
    assert all(part in errors[0] for part in parts), errors
    assert not os.listdir(tmp_path)


def test_no_verb_is_bad_input_with_the_help(capsys):
    assert main([]) == 64
    assert "usage: repa-scale VERB" in capsys.readouterr().out


def test_an_interrupt_is_130(monkeypatch):
    import repa_scale.train

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(repa_scale.train, "main", interrupted)
    assert main(["train"]) == 130
