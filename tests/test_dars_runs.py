"""Whole runs of dars.py: the work happens, nothing is lost, processes and restarts change nothing,
and its errors."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dars  # noqa: E402
import figure_dars  # noqa: E402
from helpers import (
    FewStreets,
    equal,
    records,
    result_of,
    run_on_few_streets,
    same_checkpoint,
    strict,
    untimed,
)  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = (
    "--labels 4 --round0-iterations 40 --iterations 4 --batch-size 2 --round0-batch-size 4 "
    "--crop 32 64 --base-size 64 --log-every 1 --save-every 2 --eval-every 100"
).split()
ONCE = ["--save-every", "100"]  # at the end of each round alone: for runs that nothing disturbs
# AdamW divides by gradients near zero, and many large steps amplify (tenfold in ten of lr .05):
# both make rounding visible.
TWO = "--optimizer sgd --lr 0.005 --round0-iterations 20 --scale 0.75 1.25".split() + ONCE


BRIEF = [*ONCE, "--round0-iterations", "3", "--iterations", "2", "--rounds", "1", "--out", "run"]


def start(*argv):
    """dars.py in this process, on few streets."""
    run_on_few_streets(dars, *SHORT, *argv)


def pseudo_labels(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "pseudo_labels").rglob("*.png"))
    }


def same_bits(
    a, b, keys=("models", "optimizer", "results", "reports", "step", "stage", "iteration")
):
    return same_checkpoint(a, b, keys)


def same_end(folder, whole):
    """The same weights, log, pseudo-labels and numbers."""
    assert same_bits(folder, whole)
    assert untimed(folder) == untimed(whole)
    assert pseudo_labels(folder) == pseudo_labels(whole)
    assert result_of(folder) == result_of(whole)
    assert {p.name for p in folder.iterdir()} == {
        p.name for p in whole.iterdir()
    }  # nothing is left over
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        p.name for p in (whole / "pictures").iterdir()
    }
    return True


# ---- that the work happened ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start("--out", folder, *ONCE)
    return folder


def test_the_work_happened(whole):
    log = records(whole)
    assert [(r["stage"], r["iteration"]) for r in log if "lr" in r] == [
        (0, t) for t in range(1, 41)
    ] + [(k, t) for k in (1, 2) for t in range(1, 5)]
    names = {"loss_labeled", "loss_labeled_aux", "loss_pseudo", "loss_pseudo_aux"}
    for k in range(3):
        of_round = [r for r in log if r["stage"] == k]
        assert {key for r in of_round for key in r if key.startswith("loss")} == {
            n for n in names if k or "pseudo" not in n
        }
        for name in names if k else names - {"loss_pseudo", "loss_pseudo_aux"}:
            values = [r[name] for r in of_round if name in r]
            assert np.isfinite(values).all() and max(values) > 0
        rates = [r["lr"] for r in of_round if "lr" in r]
        n = len(rates)
        assert rates == pytest.approx(
            [0.003 * ((1 - t / n) / (k + 1)) ** 0.9 for t in range(n)]
        )  # one polynomial through all rounds
        assert all(
            ("pseudo_coverage" in r) == ("pseudo_miou" in r) == ("d_kl" in r) == bool(k)
            for r in of_round
            if "lr" in r
        )
    state = torch.load(whole / "last.pt", weights_only=True)
    assert list(state["models"]) == ["student", "teacher"] and (
        state["stage"],
        state["iteration"],
        state["step"],
    ) == (2, 4, 48)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(common.rng(0, "network", 0).randint(2**31)))
        begin = common.make_network(state["networks"]["student"]).state_dict()
    student, teacher = state["models"].values()
    assert all(
        not torch.equal(begin[key], student[key])
        and not torch.equal(begin[key], teacher[key])
        and not torch.equal(student[key], teacher[key])
        for key in begin
    )


def test_result_and_log_are_complete(whole):
    for line in (whole / "log.jsonl").read_text().splitlines():
        strict(line)
    result = strict((whole / "result.json").read_text())
    assert set(result) >= set(
        "method dataset labels seed network miou headline per_class paper iterations seconds "
        "peak_memory_mb device torch commit rounds tail_classes tail_miou".split()
    )
    networks = ["round_0", "round_1", "student"]
    assert list(result["miou"]) == list(result["tail_miou"]) == networks
    assert result["headline"] == "student" and result["method"] == "dars"
    assert result["iterations"] == 48 and result["labels"] == 4 and result["paper"] is None
    evaluated = [r for r in records(whole) if "val" in r]  # at the end of each round
    assert [r["val"]["student"] for r in evaluated] == list(result["miou"].values())
    assert [r["tail_miou"] for r in evaluated] == list(result["tail_miou"].values())
    assert all(("tail_miou" in r) == ("val" in r) for r in records(whole))
    assert len(result["per_class"]) == 10 and len(result["tail_classes"]) == 7
    assert [r["round"] for r in result["rounds"]] == [1, 2]
    alphas = [r["alpha"] for r in result["rounds"]]
    assert alphas == list(dars.PAPER["streets"]["alpha"])
    for r in result["rounds"]:
        assert r["pixels"] == 4 * 64 * 128
        for name in ("share", "labeled_share", "predicted_share"):
            assert len(r[name]) == 10 and sum(r[name]) == pytest.approx(1)
        assert (
            set(r["expected"]) == set(dars.METHODS)
            and r["expected"]["st"]["coverage"] >= r["alpha"] - 1e-3
        )
        # Rounded up once for each picture and class.
        assert 0 < r["coverage"] <= r["alpha"] + 10 * 4 / r["pixels"]
        assert r["share"] == pytest.approx(r["expected"]["dars"]["share"], abs=0.005)
        assert r["d_kl"] is None or np.isfinite(r["d_kl"])
        assert (r["d_kl"] is None) == any(
            x > 0 and y == 0 for x, y in zip(r["labeled_share"], r["share"])
        )
        # There is something to align and to sample.
        assert sum(x > 0.1 for x in r["predicted_share"]) == 3
        assert any(0 < n < m for n, m in zip(r["wanted"], r["kept"]))


def test_every_unlabeled_picture_has_a_pseudo_label(whole):
    args = json.loads((whole / "args.json").read_text())
    result = json.loads((whole / "result.json").read_text())
    data = common.Streets()
    assert len(args["unlabeled"]) == 4 and not set(args["unlabeled"]) & set(args["labeled"])
    for report in result["rounds"]:
        folder = whole / "pseudo_labels" / f"round_{report['round']}"
        assert {p.name for p in folder.iterdir()} == {f"{id}.png" for id in args["unlabeled"]} | {
            "report.json",
            "made_by.json",
        }
        assert strict((folder / "report.json").read_text()) == report
        counts = np.zeros(256, int)
        for id in args["unlabeled"]:
            picture = Image.open(folder / f"{id}.png")
            palette = np.array(picture.getpalette()).reshape(-1, 3)
            assert (
                picture.mode == "P"
                and picture.size == (128, 64)
                and np.array_equal(palette[:10], data.colors)
                and (palette[255] == 255).all()
            )
            label = np.asarray(picture)
            assert label.dtype == np.uint8 and set(np.unique(label)) <= {*range(10), 255}
            counts += np.bincount(label.ravel(), minlength=256)
        assert (
            counts[:10].sum() / report["pixels"] == pytest.approx(report["coverage"])
            and counts[255] > 0
        )
        assert report["share"] == pytest.approx((counts[:10] / counts[:10].sum()).tolist())
    assert result["rounds"][1]["coverage"] > result["rounds"][0]["coverage"]
    assert not (whole / "predictions").exists()
    pictures = {p.name for p in (whole / "pictures").iterdir()}
    marks = [f"round_{k}_{n:06d}.png" for k, n in ((0, 40), (1, 4), (2, 4))]
    drawn = {f"{name}_{mark}" for name in ("val", "batch") for mark in marks}
    assert pictures == drawn | {"losses.png"}


def test_the_teacher_of_a_round_is_the_student_at_the_end_of_the_round_before(
    main, whole, tmp_path, capsys
):
    main("--out", "run", "--rounds", "1", *ONCE)  # the same, but for round 2
    folder = tmp_path / "run"
    one, two = (
        torch.load(path / "last.pt", weights_only=True)["models"] for path in (folder, whole)
    )
    assert equal(one["student"], two["teacher"])
    result = json.loads((folder / "result.json").read_text())
    assert (
        list(result["miou"]) == ["round_0", "student"]
        and [r["round"] for r in result["rounds"]] == [1]
        and result["iterations"] == 44
    )
    d_kl = [report["d_kl"] or math.inf for report in result["rounds"]]
    assert f"round 1: D_KL {d_kl[0]:.4f}" in capsys.readouterr().out
    assert result["rounds"] == json.loads((whole / "result.json").read_text())["rounds"][:1]


def test_evaluate_repeats_the_result(main, whole, capsys):
    main("--evaluate", "--checkpoint", whole)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU"))
    assert float(line.split()[1]) == round(
        json.loads((whole / "result.json").read_text())["miou"]["student"], 2
    )


def figures(monkeypatch, *argv):
    monkeypatch.setattr(common, "Streets", FewStreets)
    monkeypatch.setattr(sys, "argv", ["figure_dars.py", *map(str, argv)])
    figure_dars.main()


def test_figures_of_a_run(whole, tmp_path, monkeypatch, capsys):
    figures(monkeypatch, whole, "--out", tmp_path / "figures")
    names = {f"distribution_round_{k}.png" for k in (1, 2)} | {"confidence.png", "figures.json"}
    names |= {"pseudo_labels.png", "accuracy_by_size.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names
    numbers = strict((tmp_path / "figures/figures.json").read_text())
    groups = numbers["groups"].values()
    assert sorted(c for group in groups for c in group["classes"]) == sorted(common.STREETS)
    entries = numbers["accuracy_by_size"]
    assert len(entries) == 30 and any(entry["accuracy"] is not None for entry in entries)
    assert 0 < numbers["miou_without_flip"] < 100
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("D_KL (Table 5)")]
    assert len(rows) == 2 and all(len(row.split()) == 3 + len(dars.METHODS) for row in rows)


def test_the_teacher_predicts_again_what_it_predicted(whole, monkeypatch):
    """Fig. 3 shows the predictions from which the pseudo-labels of the last round come."""
    args, labeled, unlabeled, state = figure_dars.read_run(whole)
    teacher = figure_dars.read_network(state, "teacher", torch.device("cpu"))
    data, device = FewStreets(), torch.device("cpu")
    table, _ = figure_dars.predict_again(teacher, data, unlabeled, args, device)
    report = result_of(whole)["rounds"][-1]
    assert dars.distribution(table.sum(1)).tolist() == report["predicted_share"]
    labels = dars.count_pixels(data, labeled, device)
    for method, numbers in report["expected"].items():
        wanted = dars.align(table, labels, report["alpha"], method)[2]
        assert dars.distribution(wanted).tolist() == numbers["share"]


def test_figures_of_the_baseline_are_those_of_fig_5b_alone(main, tmp_path, monkeypatch, capsys):
    main(*BRIEF, "--supervised")
    figures(monkeypatch, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run/figures").iterdir()}
    assert names == {"accuracy_by_size.png", "figures.json"}


def test_figures_need_a_finished_run_of_dars(whole, tmp_path, monkeypatch):
    with pytest.raises(common.UserError, match="args.json: no such file"):
        figures(monkeypatch, tmp_path)
    shutil.copytree(whole, tmp_path / "run")
    record = json.loads((whole / "args.json").read_text()) | {"method": "rml"}
    (tmp_path / "run/args.json").write_text(json.dumps(record))
    with pytest.raises(common.UserError, match="is a run of rml.py, not of dars.py"):
        figures(monkeypatch, tmp_path / "run")


# ---- every flag does its work --------------------------------------------------------------------

@pytest.mark.parametrize(
    "flags",
    [
        "--pseudo st",
        "--pseudo cbst",
        "--pseudo da",
        "--temperature 1.27 --confidence fine",
        "--supervised",
        "--restart-schedule",
        "--no-flip --base-size 0 --rounds 0",
        "--network deeplabv2 --precision bf16 --workers 1 --optimizer sgd",
    ],
)
def test_ablations(main, tmp_path, flags, capsys):
    main(*BRIEF, *flags.split())
    result, log = strict((tmp_path / "run/result.json").read_text()), records(tmp_path / "run")
    assert all(np.isfinite(v) for r in log for k, v in r.items() if k.startswith("loss"))
    if "--supervised" in flags:
        assert (
            list(result["miou"]) == ["student"]
            and result["iterations"] == 5
            and result["method"] == "dars-supervised"
            and result["rounds"] == []
        )
        assert (
            not any("loss_pseudo" in r for r in log)
            and not (tmp_path / "run/pseudo_labels").exists()
        )
        rates = [r["lr"] for r in log if "lr" in r]
        assert rates == pytest.approx([0.003 * (1 - t / 5) ** 0.9 for t in range(5)])
    elif "--rounds 0" in flags:
        assert result["rounds"] == [] and not (tmp_path / "run/pseudo_labels").exists()
    else:
        (report,) = result["rounds"]
        assert (
            list(result["miou"]) == ["round_0", "student"]
            and max(r["loss_pseudo"] for r in log if "loss_pseudo" in r) > 0
        )
        if "--pseudo" in flags:  # nothing is sampled: all that the thresholds keep
            method = flags.split()[1]
            assert (
                report["coverage"] == report["expected"][method]["coverage"]
                and report["kept"] == report["wanted"]
            )
            assert report["share"] == pytest.approx(report["expected"][method]["share"])
            if method == "st":
                predicted = {
                    t for t, share in zip(report["threshold"], report["predicted_share"]) if share
                }
                assert (
                    len(predicted) == 1 and 0 < predicted.pop() <= 1
                )  # one for all that are predicted, none for others
                assert all(
                    t is None
                    for t, share in zip(report["threshold"], report["predicted_share"])
                    if not share
                )
    if "--network" in flags:
        assert not any("loss_pseudo_aux" in r for r in log)  # DeepLabv2 has no auxiliary head
    first = [r["lr"] for r in log if r["iteration"] == 1 and "lr" in r]
    assert first == pytest.approx(
        [0.003, 0.003 * (1 if "--restart-schedule" in flags else 0.5**0.9)][: len(first)]
    )


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Eight training and two val scenes in CamVid's layout, and a list of four labeled ones.

    Two runs: with all masks, and with those of the list alone."""
    folder = tmp_path_factory.mktemp("camvid")
    for name in ("all", "few"):
        for part, n in (("train", 8), ("val", 2)):
            for i in range(n):
                image, label = common.draw_street(f"{part}_{i:04d}")
                write(folder / name / part / f"{i:03d}.png", image)
                if name == "all" or part == "val" or i < 4:
                    write(folder / name / f"{part}annot" / f"{i:03d}.png", label)
    (folder / "list.txt").write_text("".join(f"{i:03d}\n" for i in range(4)))
    for name in ("all", "few"):
        flags = "--dataset camvid --preset tiny --size 64 128 --round0-iterations 10 --iterations 2"
        places = ["--data-root", folder / name, "--split", folder / "list.txt"]
        places += ["--out", folder / f"run_{name}", "--cache", folder / "cache"]
        start(*flags.split(), *places, *ONCE)
    return folder


def test_masks_of_unlabeled_pictures_are_not_needed_and_nothing_learns_from_them(camvid):
    one, two = camvid / "run_all", camvid / "run_few"
    assert (two / "result.json").exists() and same_bits(
        one, two, ("models", "optimizer", "results")
    )
    assert pseudo_labels(one) == pseudo_labels(two) and len(pseudo_labels(one)) == 8
    assert records(one)[-2]["pseudo_miou"] > 0  # the log did see the masks


def test_without_masks_the_log_is_json_too(camvid):
    for line in (camvid / "run_few/log.jsonl").read_text().splitlines() + [
        (camvid / "run_few/result.json").read_text()
    ]:
        strict(line)


def test_a_class_that_no_labeled_picture_has_is_named_and_survived(main, tmp_path, capsys):
    main("--labels", "1", "--round0-iterations", "10", "--iterations", "2", "--out", "run", *ONCE)
    labeled = json.loads((tmp_path / "run/args.json").read_text())["labeled"]
    present = set(np.unique(common.Streets().label(labeled[0])).tolist())
    lacking = [name for j, name in enumerate(common.STREETS) if j not in present]
    warnings = capsys.readouterr().err
    assert lacking and "round 1: no pseudo-label has " in warnings
    assert all(name in warnings.split("no pseudo-label has ")[1] for name in lacking)
    result = strict((tmp_path / "run/result.json").read_text())
    for report in result["rounds"]:
        for j, name in enumerate(common.STREETS):
            if name in lacking:
                assert (
                    report["share"][j] == 0
                    and report["kept"][j] == 0
                    and report["threshold"][j] is None
                )


@pytest.mark.parametrize(
    "flags", (["--round0-iterations", "0"], ["--iterations", "0"]), ids=" ".join
)
def test_a_round_may_have_no_iterations(main, flags, tmp_path, capsys):
    """As when a trained network comes by --weights."""
    main(*BRIEF, *flags)
    assert (tmp_path / "run/result.json").exists()


# ---- nothing is lost -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(main, patch, target, name, condition, *argv):
    """Run until target.name(..) is called for which condition(*its arguments) is true."""
    real = getattr(target, name)

    def fatal(*args, **kwargs):
        if condition(*args):  # as if the process ended here
            raise Killed
        return real(*args, **kwargs)

    with patch.context() as inner:
        inner.setattr(target, name, fatal)
        with pytest.raises(Killed):
            main(*argv)


def nth(n):
    """True at the n-th call."""
    calls = []
    return lambda *_: calls.append(1) or len(calls) == n


def at(stage, iteration):
    """A condition on the arguments of Run.step()."""
    return lambda run, i, *rest: (run.stage, i) == (stage, iteration)


def test_interrupted_at_many_points_and_resumed_ends_with_the_same_bits(
    main, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"

    def kill(*point):
        killed_at(main, monkeypatch, *point, "--out", "run")
        assert not (folder / "result.json").exists()

    kill(common.Run, "step", at(0, 5))
    kill(dars, "predict_picture", nth(3))  # in the pass of predictions
    drafts = sorted((folder / "predictions/round_1").glob("*.npz"))
    before = [path.stat().st_mtime_ns for path in drafts]
    assert len(drafts) == 2
    kill(common, "write_pseudo_label", nth(3))  # in the pass of selection
    after = [path.stat().st_mtime_ns for path in drafts]
    assert after == before  # what was predicted is not predicted again
    assert len(pseudo_labels(folder)) == 2
    # All pseudo-labels are there, but not their report.
    kill(common, "write_atomically", lambda path, _: path.name == "report.json")
    kill(common.Run, "step", at(1, 3))
    kill(dars, "predict_picture", nth(1))  # of round 2
    kill(common, "write_pseudo_label", nth(4))
    kill(common.Run, "step", at(2, 0))
    kill(common.Run, "step", at(2, 2))
    kill(common.Run, "finish", nth(1))
    main("--out", "run")
    assert "resumed after iteration 48 of 48" in capsys.readouterr().out
    assert same_end(folder, whole)


def test_a_lost_pseudo_label_is_made_again_and_a_broken_one_is_named(
    main, error, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    killed_at(main, monkeypatch, common.Run, "step", at(1, 3), "--out", "run")
    files = sorted((folder / "pseudo_labels/round_1").glob("*.png"))
    files[1].write_bytes(files[1].read_bytes()[:100])
    message = error("--out", "run")
    assert files[1].name in message and "delete it" in message and "download" not in message
    Image.new("P", (100, 64)).save(files[1])
    message = error("--out", "run")
    assert f"{files[1].name}: is 100x64, its picture 128x64" in message and "delete it" in message
    files[1].unlink()  # that is the advice
    main("--out", "run")
    assert same_end(folder, whole)


def test_a_new_run_makes_its_own_pseudo_labels(main, tmp_path, monkeypatch, capsys):
    killed_at(main, monkeypatch, common.Run, "step", at(1, 1), *BRIEF)
    (tmp_path / "run/last.pt").unlink()
    main(*BRIEF, "--seed", "1", "--split-seed", "0")
    main(*BRIEF, "--seed", "1", "--split-seed", "0", "--out", "clean")
    assert pseudo_labels(tmp_path / "run") == pseudo_labels(tmp_path / "clean")


def test_predictions_are_removed_after_a_kill_in_their_removal(main, tmp_path, monkeypatch, capsys):
    killed_at(
        main,
        monkeypatch,
        dars.shutil,
        "rmtree",
        lambda path, **_: Path(path).name == "predictions",
        *BRIEF,
    )
    main(*BRIEF)
    assert not (tmp_path / "run/predictions").exists()


def test_half_written_files_of_a_killed_process_are_removed(main, tmp_path, monkeypatch, capsys):
    killed_at(main, monkeypatch, common, "write_pseudo_label", nth(2), *BRIEF)
    (tmp_path / "run/pseudo_labels/round_1/train_0000.png.12345.tmp").write_bytes(b"half")
    main(*BRIEF)
    assert not list((tmp_path / "run").rglob("*.tmp"))


# ---- processes -----------------------------------------------------------------------------------


def launch(folder, code, *argv, **env):
    """A process that runs code, in which t is this file.

    Dropout, whose noise depends on the process, is off where code says so."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_dars_runs as t\n{code}", *SHORT, *map(str, argv)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        | env,
    )


def test_kill_9_while_pseudo_labels_are_made(main, whole, tmp_path, capsys):
    """During the selection, which is slowed down."""
    code = (
        "import time\n"
        "real = t.common.write_pseudo_label\n"
        "t.common.write_pseudo_label = lambda *a: (real(*a), time.sleep(.5))\n"
        "t.common.Streets = t.FewStreets\n"
        "t.torch.set_num_threads(1)\n"
        "t.dars.main()"
    )
    folder = tmp_path / "run"
    process = launch(tmp_path, code, "--out", "run", *ONCE)
    deadline = time.time() + 120
    while len(list(folder.glob("pseudo_labels/round_1/*.png"))) < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (folder / "predictions/round_1").exists()
    assert not (folder / "pseudo_labels/round_1/report.json").exists()
    main("--out", "run")
    assert same_end(folder, whole)


def no_dropout():
    torch.nn.Dropout2d.forward = lambda self, x: x


def pseudo_labels_alone(folder):
    """make_pseudo_labels() by a given network, on five streets; the report."""
    torch.manual_seed(0)
    spec = dict(network="pspnet", backbone="tiny", head="plain", aspp_branches=4, classes=10)
    network = common.make_network(spec | dict(batch_norm="frozen", style="torchvision"))
    torch.nn.init.normal_(network.last.weight, 0, 5)  # several classes, sure of some pixels
    argv = ["--crop", "32", "64", "--base-size", "64"]
    args = common.parse_args(dars.get_parser(), dars.PAPER, argv)
    data, device = common.Streets(), torch.device("cpu")
    run = SimpleNamespace(folder=Path(folder), device=device, claim=lambda _: None)
    run.write_json = partial(common.Run.write_json, run)
    made = run.folder / "pseudo_labels/round_1"
    labels = dars.count_pixels(data, data.train[:3], device)
    dars.make_pseudo_labels(made, network.eval(), data, data.train[3:8], labels, 0.5, 1, run, args)
    return json.loads((made / "report.json").read_text())


def test_two_processes_make_the_pseudo_labels_of_one_and_give_its_losses(
    main, tmp_path, monkeypatch, capsys
):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = (
        "t.no_dropout()\n"
        "t.common.Streets = t.FewStreets\n"
        "t.torch.set_num_threads(1)\n"
        "def both():\n"
        "    t.dars.main()\n"
        "    t.pseudo_labels_alone('alone_two')\n"
        "t.common.run_main(both)"
    )
    processes = [
        launch(
            tmp_path,
            code,
            *TWO,
            "--out",
            "two",
            RANK=str(r),
            LOCAL_RANK=str(r),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for r in range(2)
    ]
    monkeypatch.setattr(torch.nn.Dropout2d, "forward", lambda self, x: x)
    main(*TWO, "--out", "one")
    alone = pseudo_labels_alone("alone_one")
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    # The same network: the very same files, and the same report.
    assert (
        pseudo_labels(tmp_path / "alone_one") == pseudo_labels(tmp_path / "alone_two")
        and len(pseudo_labels(tmp_path / "alone_one")) == 5
    )
    assert (
        json.loads((tmp_path / "alone_two/pseudo_labels/round_1/report.json").read_text()) == alone
    )
    assert sum(x > 0 for x in alone["predicted_share"]) > 2 and any(
        a > b for a, b in zip(alone["kept"], alone["wanted"])
    )
    # Whole runs: weights differ by rounding, so that some pixels differ.
    one, two = (result_of(tmp_path / name) for name in ("one", "two"))
    assert one["miou"] == pytest.approx(two["miou"], abs=0.5) and len(two["rounds"]) == 2
    losses = [
        {
            (r["stage"], r["iteration"], key): v
            for r in records(tmp_path / name)
            for key, v in r.items()
            if key.startswith("loss")
        }
        for name in ("one", "two")
    ]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 20 * 2 + 2 * 4 * 4
    for key, value in losses[0].items():
        assert value == pytest.approx(losses[1][key], abs=5e-5 if key[0] == 0 else 0.02), key
    for a, b in zip(one["rounds"], two["rounds"]):
        assert (
            a["pixels"] == b["pixels"]
            and a["share"] == pytest.approx(b["share"], abs=0.01)
            and a["coverage"] == pytest.approx(b["coverage"], abs=0.01)
        )
    pixels = [
        np.array(
            [
                np.asarray(Image.open(tmp_path / name / "pseudo_labels/round_1" / p.name))
                for p in sorted((tmp_path / "one/pseudo_labels/round_1").glob("*.png"))
            ]
        )
        for name in ("one", "two")
    ]
    assert (pixels[0] == pixels[1]).mean() > 0.95


def test_pseudo_labels_of_another_run_are_refused(main, tmp_path, whole, monkeypatch):
    """A folder that somebody copied into an unfinished run."""
    killed_at(main, monkeypatch, common, "write_pseudo_label", nth(3), *ONCE, "--out", "run")
    folder = tmp_path / "run/pseudo_labels/round_1"
    shutil.copytree(whole / "pseudo_labels/round_1", folder, dirs_exist_ok=True)
    (folder / "made_by.json").write_text(json.dumps({"run": 64 * "0"}))
    with pytest.raises(
        common.UserError, match="round_1: holds pseudo-labels of another run; remove this folder"
    ):
        main(*ONCE, "--out", "run")
    shutil.rmtree(folder)  # that is the advice
    main(*ONCE, "--out", "run")
    assert pseudo_labels(tmp_path / "run") == pseudo_labels(whole)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        "--alpha 0 .5",
        "--alpha .5 1.5",
        "--alpha -0.2 .5",
        "--alpha nan .5",
        "--beta-min 1 0",
        "--beta-min -1 0",
        "--beta-max -0.1 0",
        "--rounds -1",
        "--temperature 0",
        "--temperature -1",
        "--head-lr 0",
        "--round0-batch-size 0",
        "--round0-iterations -1",
        "--epochs -1",
        "--scale 0 1",
        "--base-size -5",
    ],
)
def test_a_value_out_of_range_is_an_error_before_the_training(error, argv, tmp_path):
    message = error(*BRIEF[:-2], *argv.split())
    assert argv.split()[0] in message and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["alpha", "beta-min", "beta-max"])
def test_too_few_values_for_the_rounds(error, name):
    message = error(f"--{name}", ".5")
    assert f"--{name} has 1 values" in message and "--rounds 2" in message
    assert "--rounds 3" in error("--rounds", "3")  # the table has two


def test_an_unknown_preset(error):
    assert "--preset deep" in error("--preset", "deep")
    message = error("--dataset", "cityscapes", "--data-root", "x", "--preset", "361")
    assert "--preset 361" in message and "713" in message and "deeplabv2" in message


def test_a_batch_of_round_0_that_processes_cannot_share(error, monkeypatch):
    monkeypatch.setattr(dars, "world_size", lambda: 2)
    message = error("--round0-batch-size", "3")
    assert "--round0-batch-size 3" in message and "2 processes" in message


def test_an_unfinished_run_of_another_configuration_names_the_argument(
    error, main, tmp_path, monkeypatch, capsys
):
    killed_at(main, monkeypatch, dars, "predict_picture", nth(2), *BRIEF)
    for flags, name in (
        (["--alpha", ".4"], "alpha"),
        (["--pseudo", "st"], "pseudo"),
        (["--temperature", "2"], "temperature"),
    ):
        message = error(*BRIEF, *flags)
        assert f"{name} = " in message and "--overwrite" in message
    # This begins anew, without the drafts and pseudo-labels of before.
    main(*BRIEF, "--pseudo", "st", "--overwrite")
    main(*BRIEF, "--pseudo", "st", "--out", "clean")
    assert pseudo_labels(tmp_path / "run") == pseudo_labels(tmp_path / "clean")
    assert same_bits(tmp_path / "run", tmp_path / "clean")


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", ["pseudo-label", "draft", "report.json"])
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    error, main, file, tmp_path, monkeypatch, capsys
):
    real = common.write_atomically

    def full(path, write):
        where = {
            "pseudo-label": "pseudo_labels",
            "draft": "predictions",
            "report.json": "report.json",
        }[file]
        return (
            no_space()
            if where in Path(path).parts and (file != "pseudo-label" or Path(path).suffix == ".png")
            else real(path, write)
        )

    with monkeypatch.context() as patch:
        patch.setattr(common, "write_atomically", full)
        message = error(*BRIEF)
        assert (
            "run/" in message
            and "No space left" in message
            and "the same command goes on" in message
        )
        assert {"pseudo-label": ".png", "draft": ".npz", "report.json": "report.json"}[
            file
        ] in message
    main(*BRIEF)
    assert (tmp_path / "run/result.json").exists()


def test_two_pictures_never_share_a_pseudo_label():
    assert (
        common.pseudo_label_path("x", "a/b_c")
        == Path("x/a/b_c.png")
        != common.pseudo_label_path("x", "a_b/c")
    )


# ---- the optimizer of a round --------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
def test_the_optimizer_is_carried_from_round_to_round(fresh, monkeypatch, tmp_path):
    """As in the authors' code: AdamW counts the steps of all rounds; with the flag of the last."""
    monkeypatch.chdir(tmp_path)
    flags = ["--fresh-optimizer"] if fresh else []
    argv = "--rounds 1 --labels 2 --iterations 3 --round0-iterations 4 --out run".split()
    run_on_few_streets(dars, *argv, *flags)
    state = torch.load("run/last.pt", weights_only=True)["optimizer"]["state"]
    steps = {int(entry["step"]) for entry in state.values()}
    assert steps == {3 if fresh else 7}


def test_a_pass_for_each_half_gives_the_losses_of_one_where_nothing_depends_on_the_batch(
    monkeypatch, tmp_path, capsys
):
    """A step of round 1 passes 2 + 2 pictures, or 4 at once; the tiny network has group norm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Dropout2d, "forward", lambda self, x: x)
    sizes, real = [], common.PSPNet.forward

    def forward(self, image, aux=False):
        if aux:
            sizes.append(len(image))
        return real(self, image, aux)

    monkeypatch.setattr(common.PSPNet, "forward", forward)
    losses = {}
    for name, flags in {"one": [], "two": ["--two-passes"]}.items():
        sizes.clear()
        start("--rounds", "1", "--iterations", "2", "--out", name, *flags)
        assert sizes[40:] == ([2] * 4 if flags else [4] * 2)
        log = records(tmp_path / name)
        losses[name] = [v for r in log if r["stage"] for k, v in r.items() if "loss" in k]
    assert len(losses["one"]) == 2 * 4
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-3, abs=1e-4)


def test_photometric_reaches_both_streams_and_the_baseline(monkeypatch, tmp_path):
    """Each picture of a step goes through distort() with the flag, and none without it."""
    count = [0]

    def counted(image, generator):
        count[0] += 1
        return image

    monkeypatch.setattr(common, "distort", counted)
    short = "--labels 4 --round0-iterations 2 --iterations 3 --rounds 1 --alpha .5 --beta-min 0"
    words = f"{short} --beta-max 0 --batch-size 2 --round0-batch-size 3 --workers 0".split()
    cases = {"": 0, "--photometric": 2 * 3 + 3 * 4, "--photometric --supervised": 5 * 3}
    for flags, pictures in cases.items():
        count[0] = 0
        run_on_few_streets(dars, *words, *flags.split(), "--out", tmp_path / f"run{flags}")
        assert count[0] == pictures, flags
