"""Whole runs of rml.py: the work happens, and restarts and processes do not change the result."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import rml
from helpers import losses, records, same_checkpoint

ROOT = Path(__file__).parent.parent
SHORT = "--dataset camvid --labels 4 --size 64 96 --crop 48 64 --preset tiny --iterations 9 "
SHORT += "--stage0-iterations 7 --log-every 1 --eval-every 100 --save-every 2 --batch-size 2"
SHORT = SHORT.split()
KEYS = ("models", "optimizer_1", "optimizer_2", "prototypes", "step", "stage", "iteration")
QUIET = ["--dropout", "0", "--drop-path", "0"]  # model noise depends on the process, by design


@pytest.fixture(scope="session")
def camvid(tmp_path_factory):
    """Twelve training and three val scenes in CamVid's layout."""
    root = tmp_path_factory.mktemp("camvid")
    for part, n in (("train", 12), ("val", 3)):
        for kind in ("", "annot"):
            (root / (part + kind)).mkdir()
        for i in range(n):
            image, label = common.draw_street(f"{part}_{i:04d}")
            Image.fromarray(image).save(root / part / f"{i:03d}.png")
            Image.fromarray(label).save(root / f"{part}annot" / f"{i:03d}.png")
        (root / f"{part}.txt").write_text(
            "".join(f"{part}/{i:03d}.png {part}annot/{i:03d}.png\n" for i in range(n))
        )
    return root


def command(camvid, out, *more, torchrun=()):
    head = [sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else [])]
    return [
        *head,
        str(ROOT / "rml.py"),
        *SHORT,
        "--data-root",
        str(camvid),
        "--out",
        str(out),
        *more,
    ]


def launch(tmp_path, *args, **options):
    """Start a run in the folder tmp_path, with one thread: two cores serve two processes."""
    return subprocess.Popen(
        command(*args, **options),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def run(tmp_path, *args, **options):
    return finish(launch(tmp_path, *args, **options))


def same_bits(a, b):
    """Two checkpoints are equal, bit for bit: weights, optimizer states, prototypes, place."""
    return same_checkpoint(a, b, KEYS)


@pytest.fixture(scope="session")
def whole(camvid, tmp_path_factory):
    """A run from beginning to end that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", run(folder, camvid, folder / "run")


def test_the_work_happened(whole, camvid):
    folder, output = whole
    log = records(folder)
    assert {record["stage"] for record in log} == {0, 1, 2}
    terms = {key for record in log for key in record if key.startswith("loss")}
    labeled = {f"loss_labeled_{j}" for j in "12"}
    assert terms == labeled | {f"loss_pseudo_{j}_from_{i}" for j in "12" for i in "12"}
    for term in terms:
        values = [record[term] for record in log if term in record]
        assert all(np.isfinite(values))
        assert max(values) > 0
    rates = [record["lr"] for record in log if record["stage"] == 1 and "lr" in record]
    lr = rml.PAPER["camvid-tiny"]["lr"]
    assert rates == pytest.approx([lr * (1 - t / 9) ** 0.9 for t in range(9)])
    for record in log:
        if "pseudo_miou_1" in record:
            assert record["stage"] > 0
            assert 0 < record["pseudo_miou_1"] <= 100
            assert record["pseudo_coverage"] == 1


def test_every_network_learned(whole):
    state = torch.load(whole[0] / "last.pt", weights_only=True)
    names = ["student_1", "student_2", "teacher_1", "teacher_2"]
    assert list(state["models"]) == names
    with torch.random.fork_rng(devices=[]):
        common.seed_torch(0, "network", 0)
        start = common.make_network(state["networks"]["student_1"]).state_dict()
    for name in ("student_1", "teacher_1"):  # every parameter moved from its start
        for key, value in state["models"][name].items():
            assert not torch.equal(start[key], value)
    for key in start:  # four different networks
        values = [state["models"][name][key] for name in names]
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_run_folder_is_complete(whole):
    folder, output = whole
    result = json.loads((folder / "result.json").read_text())
    expected = "method dataset labels seed network miou headline per_class paper iterations seconds"
    assert set(result) >= {*expected.split(), "peak_memory_mb", "device", "torch", "commit"}
    assert result["headline"] == "teacher_1"
    assert list(result["miou"]) == ["student_1", "student_2", "teacher_1", "teacher_2"]
    assert result["iterations"] == 7 + 2 * 9
    assert result["labels"] == 4
    assert len(result["per_class"]) == 11
    assert 0 < result["miou"]["teacher_1"] < 100
    last = [record for record in records(folder) if "val" in record][-1]
    assert last["val"] == result["miou"]  # the last one, not the best
    args = json.loads((folder / "args.json").read_text())
    assert (len(args["labeled"]), len(args["unlabeled"])) == (4, 8)
    assert len(args["split_sha256"]) == 64
    assert args["arguments"]["ema_decay"] == 0.99
    assert args["versions"]["torch"] == torch.__version__
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert {f"{name}_stage_2_000009.png" for name in ("pseudo", "strong", "val")} <= pictures
    assert not (folder / "soft_labels").exists()
    assert f"{result['miou']['teacher_1']:.2f} mIoU (teacher_1" in output
    assert "result.json" in output


def test_evaluate_repeats_the_result(whole, camvid, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "rml.py",
            *SHORT,
            "--data-root",
            str(camvid),
            "--evaluate",
            "--checkpoint",
            str(folder / "last.pt"),
            "--cache",
            str(tmp_path),
        ],
    )
    rml.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU"))
    assert [float(x) for x in line.split()[1:]] == [
        round(x, 2) for x in json.loads((folder / "result.json").read_text())["miou"].values()
    ]


def test_predict_a_picture_and_a_folder(whole, camvid, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(common.draw_street("a")[0]).resize((203, 101)).save(photos / "wide.jpg")
    Image.fromarray(common.draw_street("b")[0]).convert("L").save(photos / "gray.png")
    (photos / "broken.png").write_text("no picture")
    out = tmp_path / "out"
    argv = ["rml.py", "--checkpoint", str(folder / "last.pt"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv + ["--predict", str(photos)])
    with pytest.raises(SystemExit) as end:  # named at the end; the others are done
        rml.main()
    assert end.value.code == 1
    assert "broken.png" in capsys.readouterr().err
    index = Image.open(out / "wide.png")
    assert index.mode == "P"
    assert index.size == (203, 101)
    assert np.asarray(index).max() < 11
    assert Image.open(out / "wide_overlay.png").size == (203, 101)
    assert (out / "gray.png").exists()
    first = np.asarray(index)
    monkeypatch.setattr(sys, "argv", argv + ["--predict", str(photos / "wide.jpg")])
    rml.main()
    assert np.array_equal(np.asarray(Image.open(out / "wide.png")), first)


# ---- every flag does its work --------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--mutual", "none", "--threshold", ".3"],
        ["--mutual", "mean-teacher"],
        ["--mutual", "direct"],
        ["--mutual", "direct", "--rectify"],
        ["--mutual", "peer"],
        ["--no-rectify"],
        ["--no-cutmix"],
        ["--no-photometric"],
        ["--no-cutmix", "--no-photometric", *QUIET],
        ["--linear-drop-path"],
        ["--head", "plain"],
        ["--aspp-branches", "2"],
        ["--optimizer", "sgd"],
        ["--precision", "bf16"],
        ["--workers", "1"],
        ["--scale", ".5", "1.5"],
        ["--threshold", ".9"],
        ["--supervised"],
    ],
    ids=" ".join,
)
def test_ablations(flags, camvid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "rml.py",
            *SHORT,
            "--data-root",
            str(camvid),
            "--out",
            "run",
            "--iterations",
            "2",
            "--stage0-iterations",
            "2",
            "--stages",
            "1",
            *flags,
        ],
    )
    rml.main()
    result, log = json.loads(Path("run/result.json").read_text()), records(Path("run"))
    assert all(
        np.isfinite(value) for r in log for key, value in r.items() if key.startswith("loss")
    )
    assert result["headline"] == (
        "student_1" if "--supervised" in flags or {"none", "direct"} & set(flags) else "teacher_1"
    )
    if "--supervised" in flags:
        assert result["iterations"] == 4
        assert list(result["miou"]) == ["student_1", "teacher_1"]
        assert not any("loss_pseudo_1_from_1" in r for r in log)
    if "--threshold" in flags:
        assert min(r["pseudo_coverage"] for r in log if "pseudo_coverage" in r) < 1


def test_a_masks_content_never_reaches_the_training_of_unlabeled_pictures(
    camvid, tmp_path, monkeypatch
):
    """All masks of unlabeled pictures are replaced: every weight stays the same."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for name in ("true", "false"):
        root = tmp_path / f"data_{name}"
        shutil.copytree(camvid, root)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "rml.py",
                *SHORT,
                "--data-root",
                str(root),
                "--out",
                name,
                "--iterations",
                "2",
                "--stage0-iterations",
                "2",
            ],
        )
        if name == "false":
            for id in json.loads(Path("true/args.json").read_text())["unlabeled"]:
                mask = root / "trainannot" / f"{id.split('/')[1]}.png"
                Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
        rml.main()
        folders.append(Path(name))
    assert same_bits(*folders)
    assert (
        records(folders[0])[-2]["pseudo_miou_1"] != records(folders[1])[-2]["pseudo_miou_1"]
    )  # the log did see other masks


# ---- nothing is lost -----------------------------------------------------------------------------


def kill_when(process, condition):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_at_any_point_and_resumed_ends_with_the_same_bits(whole, camvid, tmp_path):
    """kill -9 in stage 0, while soft labels are written, in stages 1 and 2; then go on."""
    folder = tmp_path / "run"

    def logged(n):
        return lambda: (
            (folder / "log.jsonl").exists()
            and len((folder / "log.jsonl").read_text().splitlines()) >= n
        )

    kill_when(launch(tmp_path, camvid, folder), logged(4))
    assert not (folder / "result.json").exists()
    kill_when(
        launch(tmp_path, camvid, folder),
        lambda: len(list(folder.glob("soft_labels/stage_1*/**/*.npy"))) >= 5,
    )
    for point in (12, 23):
        process = launch(tmp_path, camvid, folder)
        kill_when(process, logged(point))
    output = run(tmp_path, camvid, folder)
    assert re.search(r"resumed after iteration \d+ of 25", output)
    assert same_bits(folder, whole[0])
    assert (
        json.loads((folder / "result.json").read_text())["miou"]
        == json.loads((whole[0] / "result.json").read_text())["miou"]
    )
    drop = (
        "seconds",
        "images_per_second",
        "waiting",
    )  # the log is the same too: no line twice, none lost
    assert [{k: v for k, v in r.items() if k not in drop} for r in records(folder)] == [
        {k: v for k, v in r.items() if k not in drop} for r in records(whole[0])
    ]


def test_two_processes_give_one_processs_losses(camvid, tmp_path):
    """With SGD: AdamW divides by gradients near zero, which makes rounding visible."""
    flags = [*QUIET, "--optimizer", "sgd", "--stage0-lr", ".02", "--lr", ".01"]
    run(tmp_path, camvid, tmp_path / "one", *flags)
    run(tmp_path, camvid, tmp_path / "two", *flags, torchrun=["--standalone", "--nproc_per_node=2"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one) == 7 * 2 + 18 * 6
    for key in one:  # all of stage 0, and stage 1 until a pseudo-label on the edge flips
        assert one[key] == pytest.approx(
            two[key], abs=1e-5 if key[0] == 0 or key[:2] <= (1, 2) else 1e-2
        ), key
    first, last = one[1, 1, "loss_pseudo_1_from_2"], one[2, 9, "loss_pseudo_1_from_2"]
    assert abs(first - last) > 0.01  # the losses did move
    results = [
        json.loads((tmp_path / name / "result.json").read_text())["miou"] for name in ("one", "two")
    ]
    assert results[0] == pytest.approx(
        results[1], abs=0.1
    )  # each val picture counted once: a pixel on the edge may differ


def test_one_of_two_processes_is_killed_and_the_run_ends_by_itself(camvid, tmp_path):
    reference, folder = tmp_path / "reference", tmp_path / "run"
    run(tmp_path, camvid, reference, torchrun=["--standalone", "--nproc_per_node=2"])
    process = launch(
        tmp_path,
        camvid,
        folder,
        torchrun=["--standalone", "--nproc_per_node=2", "--max-restarts=2"],
    )
    deadline = time.time() + 120
    while (
        not (folder / "log.jsonl").exists()
        or len((folder / "log.jsonl").read_text().splitlines()) < 12
    ):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_worker(pid, folder)]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    assert "resumed after iteration" in finish(process)
    assert same_bits(folder, reference)


def is_worker(pid, folder):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(folder).encode() in words and b"torch.distributed.run" not in words


def test_two_agents_on_one_host_act_as_two_machines(camvid, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agents = [
        launch(
            tmp_path,
            camvid,
            tmp_path / "two_machines",
            torchrun=[
                "--nnodes=2",
                "--nproc_per_node=1",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                "--rdzv_id=test",
                "--local_addr=127.0.0.1",
            ],
        )
        for _ in range(2)
    ]
    for agent in agents:
        finish(agent)
    run(tmp_path, camvid, tmp_path / "one_machine", torchrun=["--standalone", "--nproc_per_node=2"])
    assert same_bits(tmp_path / "two_machines", tmp_path / "one_machine")
    results = [
        json.loads((tmp_path / name / "result.json").read_text())
        for name in ("two_machines", "one_machine")
    ]
    for result in results:
        for key in ("seconds", "peak_memory_mb", "commit"):
            result.pop(key)
    assert results[0] == results[1]
