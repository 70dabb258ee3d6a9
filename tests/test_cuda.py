"""The steps of all scripts on GPUs that are fake: no mixed devices, and no waiting for the GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import dars
import guidedmix
import mkd
import rml
import three_stage
from fake_cuda import FakeCuda, Mixed, Sync, black_sample, gpus, run
from helpers import FewStreets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Modules look at the address of their parameters, and fake ones have none.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer"),
]

# Few steps of each kind on the paper's Cityscapes row. Stages, and how many steps have no log.
RUNS = {
    rml: ("--stage0-iterations 2 --iterations 2 --stages 1", {0: 2, 1: 2}),
    three_stage: ("--iterations 2 --stages 2", {1: 2, 2: 2}),
    mkd: ("--iterations 3 --warmup 1 --batch-size 4", {1: 3}),
    dars: (
        "--iterations 2 --round0-iterations 2 --rounds 1 --batch-size 4 --base-size 600",
        {0: 2, 1: 2},
    ),
    guidedmix: ("--iterations 3 --warmup 1 --batch-size 4", {1: 3}),
}


@pytest.fixture
def cuda():
    with FakeCuda(allow_non_fake_inputs=True) as mode:
        yield mode


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x[0].tolist(),
    "mask as an index": lambda x: x[x > 0],
    "tensors through a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "bincount": lambda x: x.long().flatten().bincount(minlength=3),
    "equal": lambda x: torch.equal(x, x),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.ones(2).to(x.device),
    "copy_ from the CPU": lambda x: x.copy_(torch.ones(2, 2)),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
}
DOES_NOT_WAIT = {
    "to the CPU": lambda x: x.to("cpu", non_blocking=True),
    "from the CPU": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "a number through a mask": lambda x: x.masked_fill_(x > 0, 1.0),
    "a number through an index": lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    "an index": lambda x: x[x.long().argmax(0)],
    "where": lambda x: x.where(x > 0, 255),
    "a number of the CPU": lambda x: x + torch.tensor(1.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_for_the_gpu_is_seen(cuda, name):
    x = torch.zeros(2, 2, device="cuda")
    WAITS[name](x)
    cuda.strict = True
    with pytest.raises(Sync):
        WAITS[name](x)


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_what_does_not_wait_for_the_gpu(cuda, name):
    x = torch.zeros(2, 2, device="cuda")
    cuda.strict = True
    DOES_NOT_WAIT[name](x)


MIXES = {
    "add": lambda x, y: x + y,
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "matmul": lambda x, y: x @ y,
    "foreach": lambda x, y: torch._foreach_lerp_([x], [y], 0.5),
    "scatter": lambda x, y: x.scatter_add_(0, y.long(), x),
    "linear": lambda x, y: F.linear(x, y),
    "index": lambda x, y: x[y.long()],
}


@pytest.mark.parametrize("name", MIXES)
def test_mixed_devices_are_seen(cuda, name):
    with pytest.raises(Mixed):
        MIXES[name](torch.zeros(2, 2, device="cuda"), torch.ones(2, 2))


@pytest.mark.parametrize("options", [{}, {"labeled": False}, {"soft_labels": {"folder": True}}])
def test_black_samples_are_like_those_of_a_stream(options, monkeypatch):
    data = FewStreets()
    soft = np.zeros((len(data.names), 16, 32), np.float16)
    monkeypatch.setattr(common, "read_soft_label", lambda *args: soft)
    args = common.parse_args(rml.get_parser(), rml.PAPER, ["--crop", "48", "40"])
    stream = common.Stream(data, data.train, "labeled", args, **options)
    real, black = stream[3], black_sample(stream, 3)
    assert real.keys() == black.keys()
    for key in real.keys() - {"position"}:
        assert (real[key].dtype, real[key].shape) == (black[key].dtype, black[key].shape)
    assert real["position"] == black["position"] == 3


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_paper_row_on_gpus(script, tmp_path, monkeypatch):
    """Two processes, one after the other, ask the same of each other, with tensors on their GPU.

    No step mixes devices, none waits for the GPU before its log, and outside of the passes of
    networks nothing is computed in bf16, which is the default on a GPU."""
    argv, steps = RUNS[script]
    asked = []
    make = dars.make_pseudo_labels

    def keep_report(folder, *args):
        report = folder / "report.json"
        text = report.read_text() if report.exists() else None
        make(folder, *args)
        if text:
            report.write_text(text)  # rank 0 wrote it

    monkeypatch.setattr(dars, "make_pseudo_labels", keep_report)
    for rank in range(2):
        with gpus(processes=2, rank=rank) as seen:
            run(script, tmp_path, *argv.split())
        assert seen.steps == steps
        assert seen.quiet >= 1
        assert seen.losses == {torch.float32} and not seen.rough
        asked.append(seen.collectives)
        (tmp_path / "last.pt").unlink()
    assert asked[0] == asked[1]
    norms = {type(module) for student in seen.students for module in student.modules()}
    synchronized = script.PAPER["cityscapes"]["batch_norm"] == "sync"
    assert (torch.nn.SyncBatchNorm in norms) == synchronized
    assert ("sync_batch_norm" in {entry[0] for entry in asked[0]}) == synchronized


def test_buffers_are_averaged_on_gpus(tmp_path):
    """With batch norm in training each step ends with a message of all running statistics."""
    argv = "--supervised --iterations 2 --batch-size 4 --batch-norm train"
    with gpus(processes=2) as seen:
        run(guidedmix, tmp_path, *argv.split())
    (student,) = seen.students
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    length = sum(2 * norm.num_features for norm in norms)
    message = ("all_reduce", torch.float32, (length,))
    assert norms and seen.collectives.count(message) == 2


# Flags that take other lines of a step than the paper's row.
VARIANTS = [
    (rml, "--stage0-iterations 0 --iterations 2 --stages 1 --soft --interpolate logits "
     "--threshold .5 --network deeplabv2,setr"),
    (rml, "--stage0-iterations 0 --iterations 2 --stages 1 --mutual none --no-cutmix"),
    (three_stage, "--iterations 2 --stages 2 --branch g-tilde --no-consistency"),
    (mkd, "--iterations 2 --batch-size 2 --features full --features-of-teachers "
     "--labeled-consistency --weak-photometric --unlabeled-class teacher --no-cutmix"),
    (dars, "--iterations 2 --round0-iterations 0 --rounds 1 --batch-size 2 --base-size 0 "
     "--confidence fine --network deeplabv2 --batch-norm frozen"),
    (guidedmix, "--iterations 2 --warmup 0 --batch-size 2 --pairs similar --distance places "
     "--classifier --masks softmax --decoupling hard --usup-target none"),
]  # fmt: skip


@pytest.mark.parametrize("script, argv", VARIANTS, ids=lambda value: str(value)[-30:])
def test_other_settings_on_a_gpu(script, argv, tmp_path):
    with gpus() as seen:
        run(script, tmp_path, *argv.split())
    assert seen.quiet >= 1
    assert seen.losses == {torch.float32} and not seen.rough


def test_rml_resumes_on_a_gpu(tmp_path, monkeypatch):
    """What the checkpoint holds, prototypes and statistics too, is on the GPU again."""
    argv = "--stage0-iterations 0 --iterations 3 --stages 1 --save-every 1"
    save = common.Run.save

    def killed(run, iteration, keep):
        save(run, iteration, keep)
        if run.stage == 1 and iteration == 0:
            raise KeyboardInterrupt

    with gpus() as seen:
        monkeypatch.setattr(common.Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rml, tmp_path, *argv.split())
        assert seen.steps == {1: 1}
    monkeypatch.setattr(common.Run, "save", save)
    with gpus() as seen:
        run(rml, tmp_path, *argv.split())
        assert seen.steps == {1: 2}


OPERATIONS = [(f"rml {i}", operation, True) for i, operation in enumerate(rml.PHOTOMETRIC)]
for title, operation in three_stage.PHOTOMETRIC.items():
    OPERATIONS.append((f"three_stage {title}", operation, True))
for i, operation in enumerate([*mkd.OPERATIONS, common.distort]):
    OPERATIONS.append((f"mkd {i}", operation, False))


@pytest.mark.parametrize("name, operation, level", OPERATIONS, ids=lambda value: str(value))
def test_operations_do_not_wait_for_the_gpu(cuda, name, operation, level):
    image = torch.zeros(3, 32, 48, dtype=torch.uint8, device="cuda")
    cuda.strict = True
    for value in range(1, 10):
        result = operation(image, value if level else common.rng(0, name, value))
        assert result.device.type == "cuda"
        assert (result.shape, result.dtype) == (image.shape, torch.uint8)


def test_geometry_does_not_wait_for_the_gpu(cuda):
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(2, 1, 64, 96, dtype=torch.uint8, device="cuda")
    cuda.strict = True
    inside = [[0, 64, 0, 96], [0, 60, 4, 96]]
    for seed in range(8):
        generators = [common.rng(seed, i) for i in range(2)]
        strong = three_stage.strong_view(images, labels, inside, generators, 8)
        assert [view.device.type for view in strong] == ["cuda", "cuda"]


def test_predict_on_a_gpu(tmp_path):
    """A checkpoint and a picture of the CPU; the results are files."""
    folder = tmp_path / "run"
    out = tmp_path / "predictions"
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((200, 300, 3), np.uint8)).save(picture)
    with gpus():
        argv = "--stage0-iterations 1 --iterations 0 --supervised".split()
        run(rml, folder, *argv)
        use = f"--checkpoint {folder} --predict {picture}"
        for flags in ("", "--flip --scales .5 1", "--base-size 300 --crop 96 128"):
            run(rml, out, *use.split(), *flags.split())
            assert np.array(Image.open(out / "picture.png")).shape == (200, 300)


def test_processes_with_gpus_meet_over_nccl(monkeypatch):
    called = []
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, **_: iter([(store, 1, 4)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **kw: called.append((args, kw)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    device = torch.device("cuda", 1)
    common.join_processes(device)
    common.join_processes(torch.device("cpu"))
    (nccl, gpu), (gloo, cpu) = called
    assert (nccl, gloo) == (("nccl",), ("gloo",))
    assert (gpu["device_id"], cpu["device_id"]) == (device, None)
    assert (gpu["rank"], gpu["world_size"]) == (1, 4)
