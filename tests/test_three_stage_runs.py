"""Whole runs of three_stage.py.

The work happened; what each flag changes; processes and restarts change nothing; errors."""

import copy
import json
import os
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import three_stage  # noqa: E402
from helpers import (
    at_pixels,
    equal,
    FewStreets,
    last,
    losses,
    records,
    result_of,
    run_on_few_streets,
    same_checkpoint,
    strict,
    terms,
    untimed,
)  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [
    "--labels",
    "4",
    "--stage1-iterations",
    "4",
    "--iterations",
    "4",
    "--batch-size",
    "2",
    "--labeled-batch-size",
    "1",
    "--stage1-batch-size",
    "3",
    "--crop",
    "32",
    "64",
    "--ema-decay",
    ".5",
    ".6",
    ".7",
    ".8",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--eval-every",
    "100",
]


def start(*argv):
    """three_stage.py in this process, on few streets."""
    run_on_few_streets(three_stage, *SHORT, *argv)


def pseudo_masks(folder):
    return {
        str(path.relative_to(folder / "pseudo_labels")): path.read_bytes()
        for path in sorted(folder.glob("pseudo_labels/**/*.png"))
    }


def same_bits(a, b):
    return same_checkpoint(
        a,
        b,
        ("models", "branch", "optimizer", "results", "pseudo_miou", "step", "stage", "iteration"),
    )


def same_end(folder, whole):
    """The same weights, log, pseudo-masks and numbers, and nothing is left over."""
    assert (
        same_bits(folder, whole)
        and untimed(folder) == untimed(whole)
        and result_of(folder) == result_of(whole)
    )
    assert pseudo_masks(folder) == pseudo_masks(whole)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == {
        str(p.relative_to(whole)) for p in whole.rglob("*")
    }
    return True


# ---- that the work happened ----------------------------------------------------------------------


def recorded(folder, *argv):
    """Run, and return the weights of each stage when it starts, and in the checkpoints.

    {(stage, iteration): {"student": weights, "teacher": weights, "branch": weights or {}}}"""
    saved = {}
    start_stage, write = three_stage.start_stage, common.Run._write_checkpoint

    def record(stage, iteration, keep):
        weights = {"branch": {}}
        for name in ("student", "teacher", "branch"):
            if name in keep:
                weights[name] = copy.deepcopy(keep[name].state_dict())
        saved[stage, iteration] = weights

    def starting(args, data, device, stage, before):
        keep = start_stage(args, data, device, stage, before)
        record(stage, 0, keep)
        return keep

    def writing(run, iteration, keep):
        record(run.stage, iteration, keep)
        write(run, iteration, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(three_stage, "start_stage", starting)
        patch.setattr(common.Run, "_write_checkpoint", writing)
        start("--out", folder, *argv)
    return saved


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, recorded(folder)


@pytest.fixture
def whole(run):
    """The folder of a run from beginning to end that nothing disturbs."""
    return run[0]


def test_the_work_happened(run):
    folder, saved = run
    log = [r for r in records(folder) if "lr" in r]
    assert [(r["step"], r["stage"], r["iteration"]) for r in log] == [
        (4 * stage + t - 4, stage, t) for stage in (1, 2, 3) for t in range(1, 5)
    ]
    for stage in (1, 2, 3):
        of_stage = {key: v for key, v in losses(folder).items() if key[0] == stage}
        names = {"loss_labeled"} | ({"loss_consistency", "loss_pseudo"} if stage > 1 else set())
        assert {key[2] for key in of_stage} == names and len(of_stage) == 4 * len(names)
        assert np.isfinite(list(of_stage.values())).all()
        assert all(max(v for key, v in of_stage.items() if key[2] == name) > 0 for name in names)
    assert {r["lr"] for r in log} == {three_stage.PAPER["streets"]["lr"]}  # constant
    assert all(("pseudo_miou" in r) == ("pseudo_coverage" in r) == (r["stage"] > 1) for r in log)
    assert all(0 < r["pseudo_coverage"] <= 1 for r in log if r["stage"] > 1)


def test_every_stage_starts_anew_and_moves_student_teacher_and_branch(run):
    _, saved = run
    assert sorted(saved) == [(stage, t) for stage in (1, 2, 3) for t in (0, 2, 4)]
    for stage in (1, 2, 3):
        begin, end = saved[stage, 0], saved[stage, 4]
        assert equal(begin["student"], begin["teacher"]) and bool(begin["branch"]) == (stage > 1)
        for part in ("student", "teacher", "branch"):
            assert begin[part].keys() == end[part].keys() and not any(
                torch.equal(begin[part][key], end[part][key]) for key in begin[part]
            )
        assert not any(
            torch.equal(end["student"][key], end["teacher"][key]) for key in end["student"]
        )
        for other in range(1, stage):  # neither what was learned before, nor where that began
            for t in (0, 4):
                assert not any(
                    torch.equal(begin["student"][key], saved[other, t]["student"][key])
                    for key in begin["student"]
                    if key.endswith("conv1.weight")
                )
    assert any(key.startswith("conv6.") for key in saved[2, 0]["branch"]) and not any(
        key.startswith("conv6.") for key in saved[3, 0]["branch"]
    )


def test_result_is_complete(whole):
    result = strict((whole / "result.json").read_text())
    assert set(result) >= {
        "method",
        "dataset",
        "labels",
        "seed",
        "network",
        "miou",
        "headline",
        "per_class",
        "paper",
        "iterations",
        "seconds",
        "peak_memory_mb",
        "device",
        "torch",
        "commit",
        "pseudo_miou",
    }
    assert (
        list(result["miou"]) == ["stage_1", "stage_2", "student", "teacher"]
        and result["headline"] == "teacher"
        and result["method"] == "three-stage"
    )
    assert (
        result["iterations"] == 12
        and result["labels"] == 4
        and result["paper"] is None
        and len(result["per_class"]) == 10
    )
    assert result["miou"]["teacher"] == pytest.approx(
        np.mean([x for x in result["per_class"].values() if x is not None])
    )
    val = [r["val"] for r in records(whole) if "val" in r]  # at the end of each stage
    assert [v["teacher"] for v in val] == [
        result["miou"][name] for name in ("stage_1", "stage_2", "teacher")
    ] and val[2]["student"] == result["miou"]["student"]
    assert {p.name for p in (whole / "pictures").iterdir()} == {
        f"{name}_stage_{k}_000004.png" for name in ("val", "batch") for k in (1, 2, 3)
    } | {"stages.png", "losses.png"}
    for picture in (whole / "pictures").iterdir():
        assert min(Image.open(picture).size) > 100
    assert (
        last(whole)["networks"].keys()
        == last(whole)["models"].keys()
        == {"student", "teacher", "stage_2"}
    )  # the branch is thrown away


def label_of(weights, spec, id):
    """What a network says of a whole picture."""
    network = common.make_network(spec).eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        logits = network(
            torch.from_numpy(common.draw_street(id)[0].transpose(2, 0, 1)[None] / np.float32(255))
        )
    return at_pixels(logits, (64, 128), 4).argmax(1)[0].numpy()


def test_every_training_picture_has_the_pseudo_mask_that_the_teacher_of_the_stage_gives(run):
    folder, saved = run
    data, spec, result = FewStreets(), last(folder)["networks"]["teacher"], result_of(folder)
    labeled = json.loads((folder / "args.json").read_text())["labeled"]
    assert {p.name for p in (folder / "pseudo_labels").iterdir()} == {"stage_1", "stage_2"}
    for stage in (1, 2):
        place, table = folder / "pseudo_labels" / f"stage_{stage}", np.zeros((10, 10))
        assert {p.name for p in place.iterdir()} == {f"{id}.png" for id in data.train} | {
            "made_by.json"
        }  # labeled ones too
        for id in data.train:
            picture = Image.open(place / f"{id}.png")
            label = np.asarray(picture)
            assert picture.mode == "P" and label.shape == (64, 128) and label.max() < 10
            assert np.array_equal(np.array(picture.getpalette()).reshape(-1, 3)[:10], data.colors)
            assert (label == label_of(saved[stage, 4]["teacher"], spec, id)).mean() > 0.999 and (
                label != label_of(saved[stage, 4]["student"], spec, id)
            ).any()
            if id not in labeled:
                np.add.at(table, (data.label(id), label), 1)
        hit = np.diag(table)
        union = table.sum(0) + table.sum(1) - hit
        assert result["pseudo_miou"][f"stage_{stage}"] == pytest.approx(
            100 * np.mean(hit[union > 0] / union[union > 0])
        )
        assert {
            r["pseudo_miou"]
            for r in records(folder)
            if r["stage"] == stage + 1 and "pseudo_miou" in r
        } == {result["pseudo_miou"][f"stage_{stage}"]}


def test_evaluate_and_predict(main, whole, tmp_path, capsys):
    main("--evaluate", "--checkpoint", whole / "last.pt")
    words = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")
    ).split()
    assert [float(x) for x in words[1:]] == [
        round(result_of(whole)["miou"][name], 2) for name in ("student", "teacher", "stage_2")
    ]
    Image.fromarray(common.draw_street("train_0000")[0]).save(tmp_path / "street.png")
    main("--predict", "street.png", "--checkpoint", whole, "--out", "out")
    state = last(whole)
    expected = label_of(state["models"]["teacher"], state["networks"]["teacher"], "train_0000")
    assert (np.asarray(Image.open("out/street.png")) == expected).mean() > 0.999


def test_nothing_learns_from_masks_of_unlabeled_pictures(main, whole, tmp_path, monkeypatch):
    unlabeled = strict((whole / "args.json").read_text())["unlabeled"]
    real = FewStreets.label
    monkeypatch.setattr(
        FewStreets,
        "label",
        lambda data, id, full_size=False: (
            np.full((64, 128), 9, np.uint8) if id in unlabeled else real(data, id)
        ),
        raising=False,
    )
    main("--out", "run")
    assert (
        len(unlabeled) == 4
        and equal(last(tmp_path / "run")["models"], last(whole)["models"])
        and pseudo_masks(tmp_path / "run") == pseudo_masks(whole)
    )
    assert (
        result_of(tmp_path / "run")["pseudo_miou"] != result_of(whole)["pseudo_miou"]
    )  # the log did see other masks


def test_the_pretrained_weights_are_told_and_every_stage_starts_from_them(
    main, whole, tmp_path, capsys
):
    saved, pretrained = (
        recorded(tmp_path / "run", "--weights", whole / "last.pt"),
        last(whole)["models"]["teacher"],
    )
    for stage in (1, 2, 3):
        assert all(
            torch.equal(value, pretrained[key])
            for key, value in saved[stage, 0]["student"].items()
            if key.startswith("backbone.")
        )
    assert capsys.readouterr().out.count(f"weights   {whole / 'last.pt'}: ") == 1


def test_the_papers_number_stands_beside_its_setting_whatever_the_weights(
    main, whole, tmp_path, monkeypatch, capsys
):
    """Weights are part of the table's key: Tables III and IV differ in nothing else."""
    brief = ["--iterations", "1", "--stage1-iterations", "1"]
    args = vars(common.parse_args(three_stage.get_parser(), three_stage.PAPER, SHORT + brief))
    row = {
        name: tuple(args[name]) if isinstance(args[name], list) else args[name]
        for name in three_stage.PAPER["streets"]
    }
    monkeypatch.setitem(three_stage.PAPER, "streets", row)  # so that this is the paper's setting
    monkeypatch.setattr(
        three_stage,
        "PAPER_MIOU",
        {"streets": {4: 11.0}, f"streets --weights {whole / 'last.pt'}": {4: 22.0}},
    )
    for number, flags in (
        (11, []),
        (22, ["--weights", whole / "last.pt"]),
        (None, ["--lambda1", "1"]),
        (None, ["--supervised"]),
    ):
        main(*brief, "--out", "run", "--overwrite", *flags)
        assert result_of(tmp_path / "run")["paper"] == number, flags


# ---- every flag does its work --------------------------------------------------------------------

ONCE = [
    "--save-every",
    "100",
    "--out",
    "run",
]  # at the end of each stage alone: for runs that nothing disturbs


@pytest.fixture
def variant(main, whole, tmp_path):
    """variant("--flag", ..): a run with it. Stage 1 is the same as without, later ones are not."""

    def go(*flags, same=1):
        main(*ONCE, *flags)
        ours, theirs = losses(tmp_path / "run"), losses(whole)
        assert np.isfinite(list(ours.values())).all()
        assert {key: v for key, v in ours.items() if key[0] <= same} == {
            key: v for key, v in theirs.items() if key[0] <= same
        }
        assert not {v for key, v in ours.items() if key[0] > same and key[1] > 1} & set(
            theirs.values()
        )
        return tmp_path / "run"

    return go


@pytest.mark.parametrize(
    "flags, left",
    [
        ("--no-consistency", {"loss_labeled", "loss_pseudo"}),
        ("--no-pseudo-masks", {"loss_labeled", "loss_consistency"}),
        ("--no-consistency --no-pseudo-masks", {"loss_labeled"}),
    ],
)
def test_table_v_without_cr_or_t2(variant, flags, left):
    folder = variant(*flags.split())
    assert terms(folder) == left and ("branch" in last(folder)) == ("loss_pseudo" in left)
    masks = 16 if "loss_pseudo" in left else 0  # none is made for nothing
    assert len(pseudo_masks(folder)) == masks and (folder / "pictures/stages.png").exists()


def test_table_v_without_sa(variant, monkeypatch):
    views, real = [], three_stage.warp
    monkeypatch.setattr(three_stage, "warp", lambda *a: views.append(1) or real(*a))
    monkeypatch.setattr(three_stage, "cutout", lambda image, side, r: views.append(1))
    variant("--no-strong")
    assert not views
    start(*ONCE, "--overwrite")
    assert len(views) >= 16


@pytest.mark.parametrize("kind", ["g-hat", "g-tilde"])
def test_table_v_without_n2(variant, kind):
    folder = variant("--branch", kind, same=1 if kind == "g-tilde" else 2)
    assert any(key.startswith("conv6.") for key in last(folder)["branch"]) == (kind == "g-hat")


def test_table_vi_without_ema_the_teacher_is_the_student(variant):
    folder = variant("--no-ema")
    models, miou = last(folder)["models"], result_of(folder)["miou"]
    assert equal(models["teacher"], models["student"]) and miou["teacher"] == miou["student"]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages(main, whole, tmp_path, stages):
    main(*ONCE, "--stages", stages)
    folder, common_part = tmp_path / "run", min(stages, 3)
    result = result_of(folder)
    assert result["iterations"] == 4 * stages and list(result["miou"]) == [
        f"stage_{k}" for k in range(1, stages)
    ] + ["student", "teacher"]
    assert (
        {name.split("/")[0] for name in pseudo_masks(folder)}
        == set(result["pseudo_miou"])
        == {f"stage_{k}" for k in range(1, stages)}
    )
    first = [
        {key: v for key, v in losses(x).items() if key[0] <= common_part} for x in (folder, whole)
    ]
    assert first[0] == first[1]  # the same stages as of a run with three
    if stages == 4:
        fourth = {key[2]: v for key, v in losses(folder).items() if key[0] == 4}
        assert (
            set(fourth) == {"loss_labeled", "loss_consistency", "loss_pseudo"}
            and min(fourth.values()) > 0
        )
        assert not any(
            key.startswith("conv6.") for key in last(folder)["branch"]
        )  # g-tilde, as in stage 3


def test_pseudo_masks_of_the_student(main, tmp_path):
    folder = tmp_path / "run"
    end = recorded(folder, "--pseudo-masks-of", "student", "--stages", "2")[1, 4]
    spec = last(folder)["networks"]["student"]
    for id in FewStreets().train:
        label = np.asarray(Image.open(folder / f"pseudo_labels/stage_1/{id}.png"))
        assert (label == label_of(end["student"], spec, id)).mean() > 0.999 and (
            label != label_of(end["teacher"], spec, id)
        ).any()


def test_a_backbone_with_hardly_any_learning_rate_stays(main, tmp_path):
    saved = recorded(tmp_path / "run", "--lr", "1e-11", "--head-lr", "2e8")
    for stage in (1, 2, 3):
        for key, value in saved[stage, 4]["student"].items():
            moved = (value - saved[stage, 0]["student"][key]).abs().max()
            assert (moved < 1e-8) == key.startswith("backbone.")
        assert not any(
            torch.equal(value, saved[stage, 0]["branch"][key])
            for key, value in saved[stage, 4]["branch"].items()
        )


def test_supervised_has_as_many_steps(main, whole, tmp_path):
    main(*ONCE, "--supervised")
    folder = tmp_path / "run"
    result = result_of(folder)
    assert (
        result["method"] == "three-stage-supervised"
        and result["iterations"] == 12
        and list(result["miou"]) == ["student", "teacher"]
    )
    assert (
        terms(folder) == {"loss_labeled"}
        and len(losses(folder)) == 12
        and not (folder / "pseudo_labels").exists()
    )
    first = {key: v for key, v in losses(folder).items() if key[1] <= 2}
    assert first == {
        key: v for key, v in losses(whole).items() if key[0] == 1 and key[1] <= 2
    }  # stage 1, but longer


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16 --optimizer sgd --workers 1",
        "--scale .3 .6 --aspp-branches 2 --batch-size 3 --labeled-batch-size 2",
    ],
)
def test_other_settings(main, tmp_path, flags):
    main(*ONCE, *flags.split())
    assert (
        terms(tmp_path / "run") == {"loss_labeled", "loss_consistency", "loss_pseudo"}
        and min(losses(tmp_path / "run").values()) > 0
    )


# ---- nothing is lost -----------------------------------------------------------------------------


def nth(n):
    """True at the n-th call."""
    calls = []
    return lambda *_, **__: calls.append(1) or len(calls) == n


def at(stage, iteration):
    """True at this iteration of this stage."""
    return lambda run, number, *_, **__: (run.stage, number) == (stage, iteration)


def test_interrupted_at_many_points_and_resumed_ends_with_the_same_bits(
    main, kill, whole, tmp_path, capsys
):
    folder = tmp_path / "run"
    kill(common.Run, "step", at(1, 3))
    kill(common, "write_pseudo_label", nth(4))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("pseudo_labels/stage_1/*.png")}
    assert len(kept) == 3
    kill(three_stage, "train", nth(1))  # all pseudo-masks are there, but stage 2 has not begun
    assert len(pseudo_masks(folder)) == 8 and all(
        path.stat().st_mtime_ns == then for path, then in kept.items()
    )  # those were not made again
    kill(common.Run, "step", at(2, 1))
    kill(common.Run, "step", at(2, 3))
    kill(common, "write_pseudo_label", nth(1))
    kill(common.Run, "step", at(3, 0))
    kill(common.Run, "step", at(3, 2))
    kill(three_stage, "show_stages", nth(1))
    main("--out", "run")
    assert "resumed after iteration 12 of 12" in capsys.readouterr().out
    assert same_end(folder, whole)


def launch(folder, code, *argv, **env):
    """A process of its own that runs code, in which t is this file."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import test_three_stage_runs as t\n"
            "t.common.Streets = t.FewStreets\n"
            f"t.torch.set_num_threads(1)\n{code}",
            *SHORT,
            *argv,
        ],
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


def test_kill_9_while_pseudo_masks_are_made(main, whole, tmp_path):
    """They are slowed down, so that it is met."""
    code = (
        "import time\n"
        "write = t.common.write_pseudo_label\n"
        "t.common.write_pseudo_label = lambda *args: (write(*args), time.sleep(.5))\n"
        "t.three_stage.main()"
    )
    folder, process, deadline = (
        tmp_path / "run",
        launch(tmp_path, code, "--out", "run"),
        time.time() + 120,
    )
    while len(pseudo_masks(folder)) < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(pseudo_masks(folder)) < 8
    main("--out", "run")
    assert same_end(folder, whole)


@pytest.mark.parametrize("damage", ["lost", "cut off"])
@pytest.mark.parametrize(
    "point",
    [lambda: (common, "write_pseudo_label", nth(6)), lambda: (common.Run, "step", at(2, 1))],
    ids=["while they are made", "in the next stage"],
)
def test_a_lost_pseudo_mask_is_made_again_and_a_broken_one_is_named(
    main, kill, error, whole, tmp_path, point, damage
):
    folder = tmp_path / "run"
    kill(*point())
    path = sorted(folder.glob("pseudo_labels/stage_1/*.png"))[2]
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:100])
        message = error("--out", "run")
        assert path.name in message and "delete it, then the same command" in message
    path.unlink()  # that is the advice
    main("--out", "run")
    assert same_end(folder, whole)


def refused(monkeypatch, capsys, *argv):
    """What a user sees: one line on stderr, and exit status 2."""
    monkeypatch.setattr(common, "Streets", FewStreets)
    monkeypatch.setattr(sys, "argv", ["three_stage.py", *SHORT, *argv])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        common.run_main(three_stage.main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1 and text.startswith("error: ")
    return text


def test_pseudo_masks_of_another_run_are_refused(main, kill, whole, tmp_path, monkeypatch, capsys):
    kill(common, "write_pseudo_label", nth(3))
    folder = tmp_path / "run/pseudo_labels/stage_1"
    mark, before = folder / "made_by.json", pseudo_masks(tmp_path / "run")
    for text in (
        json.dumps({"run": 64 * "0"}),
        "{",
        None,
    ):  # another run's, none that can be read, none at all
        mark.write_text(text) if text else mark.unlink()
        capsys.readouterr()
        assert (
            "run/pseudo_labels/stage_1: holds pseudo-labels of another run; remove this folder"
            in refused(monkeypatch, capsys, "--out", "run")
        )
        assert pseudo_masks(tmp_path / "run") == before and len(before) == 2
    shutil.rmtree(folder)  # that is the advice
    main("--out", "run")
    assert same_end(tmp_path / "run", whole)


def test_a_new_run_makes_its_own_pseudo_masks(main, kill, tmp_path):
    kill(common.Run, "step", at(2, 1))
    Path("run/last.pt").unlink()
    main(*ONCE, "--seed", "1", "--stages", "2")
    main(*ONCE, "--seed", "1", "--stages", "2", "--out", "clean")
    assert pseudo_masks(tmp_path / "run") == pseudo_masks(tmp_path / "clean")


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--lambda1 1", "lambda1"),
        ("--no-ema", "ema"),
        ("--branch g-tilde", "branch"),
        ("--stages 2", "stages"),
        ("--cutout 4", "cutout"),
        ("--labeled-batch-size 2", "labeled_batch_size"),
        ("--pseudo-masks-of student", "pseudo_masks_of"),
    ],
)
def test_an_unfinished_run_of_another_configuration_names_the_argument(
    error, whole, tmp_path, flags, name
):
    (tmp_path / "run").mkdir()
    for file in ("args.json", "last.pt"):
        (tmp_path / "run" / file).write_bytes((whole / file).read_bytes())
    message = error("--out", "run", *flags.split())
    assert f"with {name} = " in message and "--overwrite" in message


# ---- processes -----------------------------------------------------------------------------------


def test_two_processes_give_one_processs_losses(main, tmp_path):
    """With SGD: AdamW divides by gradients near zero, which makes rounding visible.

    One labeled picture a step: one of two processes has none."""
    flags = [
        *ONCE[:2],
        "--labeled-batch-size",
        "1",
        "--stage1-batch-size",
        "1",
        "--optimizer",
        "sgd",
        "--lr",
        "0.005",
    ]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        launch(
            tmp_path,
            "t.common.run_main(t.three_stage.main)",
            *flags,
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
    main(*flags, "--out", "one")
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    one, two = tmp_path / "one", tmp_path / "two"
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and len(ours) == 4 + 2 * 3 * 4
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-5 if key[0] == 1 else 1e-3), (
            key
        )  # until a label on the edge flips
    assert pseudo_masks(one).keys() == pseudo_masks(two).keys() and len(pseudo_masks(one)) == 16
    models = [last(folder)["models"] for folder in (one, two)]
    for network in ("student", "teacher"):
        assert all(
            torch.allclose(value, models[1][network][key], atol=1e-4)
            for key, value in models[0][network].items()
        )
    assert result_of(one)["miou"] == pytest.approx(result_of(two)["miou"], abs=0.1)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        "--head bottleneck",
        "--ema-decay 2 .9 .9 .9",
        "--ema-decay .9 .9 .9 -0.1",
        "--labeled-batch-size 0",
        "--stage1-batch-size 0",
        "--stages 0",
        "--iterations 0",
        "--stage1-iterations 0",
        "--lambda1 -1",
        "--lambda2 nan",
        "--head-lr 0",
        "--cutout 0",
    ],
)
def test_a_wrong_value_is_named_before_the_training(error, argv, tmp_path):
    flag, *values = argv.split()
    message = error(flag, *values)
    assert any(
        f"{flag} {word}" in message for value in values for word in (value, value + ".0")
    ) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, word",
    [
        ("--branch own", "g-hat"),
        ("--pseudo-masks-of f", "student"),
        ("--ema-decay .9", "--ema-decay"),
        ("--dataset voc", "vocaug"),
    ],
)
def test_an_unknown_choice_is_refused_with_exit_status_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert word in refused(monkeypatch, capsys, *argv.split())
