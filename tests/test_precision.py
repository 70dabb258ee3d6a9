"""bf16 and fp16: what stays in float32, the loss scale, and how far bf16 is from fp32.

That losses, softmax, distances, covariances and EMA stay in float32 on a GPU is a part of the runs
in test_cuda.py; here it is seen that they would fail otherwise."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import dars
import guidedmix
import mkd
import rml
import three_stage
from fake_cuda import gpus, run
from fast_bf16 import fast_bf16
from helpers import losses, run_on_few_streets, same_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer"),
]

# Two steps of each kind, and the optimizers of a step.
RUNS = {
    rml: ("--stage0-iterations 2 --iterations 2 --stages 1", 2),
    three_stage: ("--stage1-iterations 2 --iterations 2 --stages 2", 1),
    mkd: ("--iterations 4 --warmup 2", 1),
    dars: (
        "--iterations 2 --round0-iterations 2 --rounds 1 --alpha .5 --beta-min 0 --beta-max 0",
        1,
    ),
    guidedmix: ("--iterations 4 --warmup 2", 1),
}
SCRIPTS = pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)


def go(script, out, *more):
    """A run on few streets, without pictures."""
    argv, _ = RUNS[script]
    usual = "--labels 3 --batch-size 2 --log-every 1 --eval-every 1000"
    with fast_bf16(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "panel", lambda run, name, columns, rows=None: None)
        patch.setattr(common.Run, "_draw_predictions", lambda run, networks: None)
        run_on_few_streets(script, "--out", out, *argv.split(), *usual.split(), *more)


class Scaler(torch.amp.GradScaler):
    """Writes down what it is asked."""

    def __init__(self, device, enabled):
        super().__init__(device, enabled=enabled)
        asked.append(("made", device, enabled))

    def scale(self, loss):
        assert loss.dtype == torch.float32 and loss.dim() == 0
        asked.append("scale")
        return super().scale(loss)

    def step(self, optimizer):
        asked.append(("step", id(optimizer)))
        return super().step(optimizer)

    def update(self):
        asked.append("update")
        super().update()


def test_fast_bf16_is_bf16(seeded):
    x = torch.randn(2, 16, 9, 7)
    conv = torch.nn.Conv2d(16, 8, 3, padding=2, dilation=2)
    with torch.autocast("cpu", torch.bfloat16):
        slow = conv(x)
        with fast_bf16():
            fast = conv(x)
    assert slow.dtype == fast.dtype == torch.bfloat16
    assert torch.allclose(slow.float(), fast.float(), rtol=2**-7)
    assert (slow == fast).float().mean() > 0.99
    with fast_bf16():
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2))


asked = []  # of the scalers of the last run


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    asked.clear()


@SCRIPTS
def test_precision_on_a_cpu(script, tmp_path, recorded):
    """In each step all losses are scaled, then each optimizer steps once, then comes one update.

    In bf16 every loss term of every step is finite, and the first ones are nearly those of fp32."""
    go(script, tmp_path / "fp32")
    _, count = RUNS[script]
    made = {call for call in asked if call[0] == "made"}
    assert made == {("made", "cpu", False)}
    calls = [call for call in asked if call[0] != "made"]
    length = 2 * count + 1
    assert len(calls) == 4 * length
    for i in range(0, len(calls), length):
        step = calls[i : i + length]
        assert step[:count] == ["scale"] * count
        assert len({call for call in step[count:-1] if call[0] == "step"}) == count
        assert step[-1] == "update"

    go(script, tmp_path / "bf16", "--precision", "bf16")
    exact = losses(tmp_path / "fp32")
    rough = losses(tmp_path / "bf16")
    assert exact.keys() == rough.keys() and len(exact) >= 6
    assert all(map(math.isfinite, rough.values()))
    assert exact != rough
    first = min(exact)[:2]
    for key in exact:
        if key[:2] == first:
            assert rough[key] == pytest.approx(exact[key], rel=0.02)


def test_a_loss_scale_changes_nothing(tmp_path, monkeypatch):
    """A scale is a power of two, so with it each weight is the same, bit for bit."""
    go(rml, tmp_path / "without")
    real = torch.amp.GradScaler
    enabled = lambda device, enabled: real(device, enabled=True, init_scale=16.0)  # noqa: E731
    monkeypatch.setattr(torch.amp, "GradScaler", enabled)
    go(rml, tmp_path / "with")
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert same_checkpoint(tmp_path / "without", tmp_path / "with", ["models"])


def test_gradients_that_are_not_finite_do_not_reach_the_weights(tmp_path, monkeypatch):
    """A scale of infinity makes them so in every step."""
    real = torch.amp.GradScaler
    endless = lambda device, enabled: real(device, enabled=True, init_scale=math.inf)  # noqa: E731
    monkeypatch.setattr(torch.amp, "GradScaler", endless)
    before = {}
    enter = common.Run.restore

    def remember(run, keep):
        weights = keep["student_1"].named_parameters()
        before.update({name: value.clone() for name, value in weights})
        return enter(run, keep)

    monkeypatch.setattr(common.Run, "restore", remember)
    go(rml, tmp_path, "--supervised", "--weight-decay", "0")
    after = common.load_torch(tmp_path / "last.pt")["models"]["student_1"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_fp16_on_a_gpu(tmp_path, monkeypatch, recorded):
    """Both optimizers of rml.py under one loss scale, and nothing but networks in fp16."""
    for name in ("step", "update"):  # they need gradients
        monkeypatch.setattr(torch.amp.GradScaler.__base__, name, lambda *args: None)
    argv = "--stage0-iterations 0 --iterations 2 --stages 1 --precision fp16"
    with gpus() as seen:
        run(rml, tmp_path, *argv.split())
    assert seen.losses == {torch.float32} and not seen.rough
    assert ("made", "cuda", True) in asked and asked.count("update") == 2


def test_bf16_outside_of_networks_is_seen(tmp_path, monkeypatch):
    """A loss of logits that were not made float32."""

    def cross_entropy(logits, label):
        return F.cross_entropy(logits.bfloat16(), label, ignore_index=common.IGNORE).float()

    monkeypatch.setattr(dars, "cross_entropy", cross_entropy)
    argv = "--supervised --rounds 0 --round0-iterations 1 --round0-batch-size 2 --base-size 0"
    with gpus() as seen:
        run(dars, tmp_path, *argv.split())
    assert any("log_softmax" in name for name in seen.rough)
