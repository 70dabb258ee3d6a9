"""Tests that need a GPU (`pytest -m cuda`, a part of tests/gpu_day.sh), and one of gpu_day.sh.

With GPU_DAY_ON_CPU=1 they run on a CPU, to test them: then both sides of each are the same."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import dars
import guidedmix
import mkd
import rml
import three_stage
from fast_bf16 import fast_bf16
from helpers import losses, run_on_few_streets

ON_CPU = os.environ.get("GPU_DAY_ON_CPU") == "1"
needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() and not ON_CPU, reason="there is no GPU"),
]
# Two steps of each kind without random noise in the networks, whose draws differ between devices.
RUNS = {
    rml: "--stage0-iterations 2 --iterations 2 --stages 1 --labels 3 --dropout 0 --drop-path 0",
    three_stage: "--stage1-iterations 2 --iterations 2 --stages 2 --labels 3",
    mkd: "--iterations 4 --warmup 2 --labels 3 --cutmix",
    dars: "--iterations 2 --round0-iterations 2 --rounds 1 --alpha .5 --beta-min 0 --beta-max 0 "
    "--labels 3",
    guidedmix: "--iterations 4 --warmup 2 --labels 3",
}
EVERY = "--optimizer sgd --lr 1e-3 --log-every 1 --eval-every 1000 --save-every 1"


def cuda(*values):
    return [pytest.param(value, marks=needs_gpu, id=value.__name__) for value in values]


def go(script, out, *more, gpu=True):
    """A run on the GPU, or on the CPU as if there was no GPU."""
    argv = RUNS[script].split() + EVERY.split()
    with pytest.MonkeyPatch.context() as patch:
        if not gpu:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.nn.Dropout2d, "forward", lambda dropout, x: x)
        patch.setattr(common.Run, "panel", lambda run, name, columns, rows=None: None)
        with fast_bf16():  # on a CPU
            run_on_few_streets(script, "--out", out, "--precision", "fp32", *argv, *more)


def assert_close(one, two, rel):
    assert one.keys() == two.keys() and len(one) >= 4
    assert all(map(math.isfinite, one.values()))
    for key in one:
        assert one[key] == pytest.approx(two[key], rel=rel, abs=rel), key


@pytest.mark.parametrize("script", cuda(*RUNS))
def test_steps_are_those_of_the_cpu(script, tmp_path):
    go(script, tmp_path / "gpu")
    go(script, tmp_path / "cpu", gpu=False)
    assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), 1e-3)


@pytest.mark.parametrize("script", cuda(*RUNS))
def test_bf16_is_close(script, tmp_path):
    go(script, tmp_path / "fp32")
    go(script, tmp_path / "bf16", "--precision", "bf16")
    assert_close(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), 0.05)


@pytest.mark.parametrize("script", cuda(*RUNS))
def test_resumes(script, tmp_path, monkeypatch):
    """After a kill in the last stage the losses are those of a run without one."""
    go(script, tmp_path / "whole")
    step = common.Run.step

    def killed(run, *args, **kwargs):
        if run.steps == 3:
            raise KeyboardInterrupt
        step(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            go(script, tmp_path / "killed")
    assert len(losses(tmp_path / "killed")) < len(losses(tmp_path / "whole"))
    go(script, tmp_path / "killed")
    assert_close(losses(tmp_path / "killed"), losses(tmp_path / "whole"), 1e-3)


def test_the_day_on_a_cpu(tmp_path):
    """All parts of gpu_day.sh with one script; none fails."""
    script = Path(__file__).parent / "gpu_day.sh"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = [script, "--cpu", "--scripts", "guidedmix", "--out", tmp_path]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "FAILED" not in report
    for part in ("device", "pytest -m cuda", "step of guidedmix.py", "waiting in", "torchrun"):
        assert part in report
    assert "1 passed" in report
