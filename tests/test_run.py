"""The run folder: stages, records, checkpoints, warnings; and the table over several runs."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
import dars
import guidedmix
import mkd
import results_table
import rml
from helpers import last, records, run_on_few_streets

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(tmp_path, stages, *argv):
    argv = ["--out", str(tmp_path / "run"), *argv]
    args = common.parse_args(rml.get_parser(), rml.PAPER, argv)
    data = common.Streets()
    labeled, unlabeled = data.train[:2], data.train[2:4]
    return common.Run("rml", args, data, labeled, unlabeled, CPU, stages, "student")


def one_stage(tmp_path, *argv):
    return make_run(tmp_path, {0: 100}, *argv)


def two_stages(tmp_path):
    return make_run(
        tmp_path, {0: 3, 1: 4}, "--log-every", "2", "--eval-every", "9", "--save-every", "3"
    )


def things(value):
    """What a script keeps: a network, an optimizer and a plain dict, all of one value."""
    student = nn.Linear(1, 1)
    student.spec = {"network": "deeplabv2", "backbone": "tiny"}
    nn.init.constant_(student.weight, value)
    optimizer = torch.optim.SGD(student.parameters(), lr=value)
    return {
        "student": student,
        "optimizer": optimizer,
        "results": {"stage_0": torch.tensor([value])},
    }


def step(run, iteration, loss=1.0, **options):
    run.step(iteration, {"loss_labeled": torch.tensor(loss)}, **options)


# ---- stages and checkpoints ----------------------------------------------------------------------


def test_a_run_goes_on_in_its_stage(tmp_path):
    run = two_stages(tmp_path)
    assert run.enter(0) and run.restore(things(1.0)) == 0
    assert last(run.folder)["iteration"] == 0  # the first checkpoint
    for iteration in range(3):
        step(run, iteration)
        run.save(iteration, things(2.0))
    assert run.last and run.mark == "stage_0_000003"
    assert run.enter(1) and run.restore(things(2.0)) == 0
    step(run, 0)
    run.save(0, things(9.0))  # not due
    assert last(run.folder)["stage"] == 0 and last(run.folder)["iteration"] == 3
    for iteration in (1, 2, 3):
        step(run, iteration)
        if iteration == 2:
            run.save(iteration, things(3.0))

    run = two_stages(tmp_path)  # resumed after iteration 3 of stage 1
    keep = things(0.0)
    assert not run.enter(0)
    assert run.enter(1) and run.restore(keep) == 3
    assert run.steps == 6 and keep["student"].weight.item() == 3
    assert keep["optimizer"].param_groups[0]["lr"] == 3 and keep["results"]["stage_0"].item() == 3
    assert [record["step"] for record in records(run.folder)] == [2, 3, 5]  # 7 comes again


def test_a_stage_that_was_not_saved_yet_begins_again(tmp_path):
    run = two_stages(tmp_path)
    run.enter(0)
    run.restore(things(1.0))
    for iteration in range(3):
        step(run, iteration)
        run.save(iteration, things(2.0))
    run.enter(1)
    run.restore(things(2.0))
    step(run, 0)

    run = two_stages(tmp_path)
    keep = things(0.0)
    assert run.enter(0) and run.restore(keep) == 3 and keep["student"].weight.item() == 2
    assert run.enter(1) and run.restore(keep) == 0


def test_evaluations_are_due_at_their_intervals_and_at_the_end(tmp_path):
    run = make_run(tmp_path, {0: 5}, "--eval-every", "2")
    due = []
    for iteration in range(5):
        step(run, iteration)
        due.append(run.due())
    assert due == [False, True, False, True, True] and run.mark == "000005"


@pytest.mark.parametrize("script", [rml, mkd, dars, guidedmix])
def test_a_baseline_of_no_iterations_is_evaluated(script, tmp_path):
    """No step, so no log: the report is that of the networks at their start."""
    stages = {rml: "stage0-iterations", dars: "round0-iterations"}
    flags = ["--iterations", "0", "--labels", "4", "--batch-size", "2", "--supervised"]
    if script in stages:
        flags += [f"--{stages[script]}", "0"]
    run_on_few_streets(script, *flags, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["iterations"] == 0 and result["miou"][result["headline"]] >= 0


# ---- records -------------------------------------------------------------------------------------


def test_a_record_has_means_since_the_last_one(tmp_path):
    run = one_stage(tmp_path, "--log-every", "2")
    for iteration, loss in enumerate((1.0, 3.0, 10.0, 20.0)):
        step(run, iteration, loss, lr=0.5)
    first, second = records(run.folder)
    assert first["loss_labeled"] == 2 and second["loss_labeled"] == 15 and first["lr"] == 0.5


def test_pseudo_labels_are_compared_and_their_coverage_counted(tmp_path):
    run = one_stage(tmp_path, "--log-every", "1")
    truth = torch.tensor([[[0, 0, 1, 255]]])
    known = torch.tensor([[[0, 1, 1, 0]]])
    half = torch.tensor([[[0, 255, 1, 255]]])
    step(run, 0, pseudo_labels={"pseudo_miou_1": known, "pseudo_miou_2": half}, truth=truth)
    step(run, 1, pseudo_labels={"pseudo_miou_1": known})
    first, second = records(run.folder)
    assert first["pseudo_miou_1"] == 50
    assert first["pseudo_miou_2"] == 100  # of the known pixels
    assert first["pseudo_coverage"] == 0.75 and second["pseudo_coverage"] == 1
    assert "pseudo_miou_1" not in second


def test_numbers_of_the_script_win_and_nan_is_null(tmp_path):
    run = one_stage(tmp_path, "--log-every", "1")
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    step(run, 0, pseudo_labels={"pseudo_miou": label}, pseudo_coverage=0.25, d_kl=float("nan"))
    (record,) = records(run.folder)
    assert record["pseudo_coverage"] == 0.25 and record["d_kl"] is None


def test_a_panel_has_no_column_without_a_known_pixel(tmp_path, monkeypatch):
    drawn = []

    def draw(columns, names, colors):
        drawn.append(list(columns))
        return common.Image.new("L", (1, 1))

    run = one_stage(tmp_path)
    monkeypatch.setattr(common, "draw_panel", draw)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    unknown = torch.full((1, 4, 4), 255)
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    run.panel("a", {"picture": image, "truth (not used)": unknown, "prediction": unknown})
    run.panel("b", {"picture": image, "truth (not used)": label})
    assert drawn == [["picture", "prediction"], ["picture", "truth (not used)"]]


# ---- warnings ------------------------------------------------------------------------------------


def confusion(hits=()):
    """Ten classes of 100 pixels each; hits: {class: right ones}, else 50."""
    table = torch.zeros(10, 10, dtype=torch.int64)
    for k in range(10):
        right = dict(hits).get(k, 50)
        table[k, 0] += 100 - right
        table[k, k] += right
    return table


class Evaluations:
    """A run whose evaluations are given by hand."""

    def __init__(self, tmp_path, monkeypatch, capsys):
        self.run = one_stage(tmp_path, "--log-every", "1000", "--eval-every", "1000")
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        capsys.readouterr()

    def __call__(self, *labels, steps=None, **tables):
        """The warnings of an evaluation after these pseudo-labels, each its own step."""
        for label in labels:
            step(self.run, 0, pseudo_labels={"pseudo_miou": label})
        self.run.steps = steps or self.run.steps
        self.monkeypatch.setattr(common, "evaluate", lambda *_: tables or {"a": confusion()})
        self.monkeypatch.setattr(self.run, "_draw_predictions", lambda networks: None)
        self.run.evaluate({})
        lines = self.capsys.readouterr().err.splitlines()
        return [line for line in lines if line.startswith("warning: after")]


@pytest.fixture
def evaluation(tmp_path, monkeypatch, capsys):
    return Evaluations(tmp_path, monkeypatch, capsys)


STRIPES = torch.arange(10).repeat_interleave(8).repeat(1, 32, 1)  # (1, 32, 80), all classes
ROAD = torch.zeros(2, 64, 64, dtype=torch.int64)


def without(*classes):
    label = STRIPES.clone()
    for k in classes:
        label[label == k] = 255
    return label


def test_a_good_run_has_no_warning(evaluation):
    for steps in (30, 60, 90, 100):
        assert evaluation(STRIPES, STRIPES, steps=steps) == []


def test_a_class_that_no_pseudo_label_holds(evaluation):
    for expected in (0, 1, 0, 0):  # at the second evaluation, and once
        found = evaluation(without(8, 9))
        assert len(found) == expected and all("pole, sign" in text for text in found)


def test_a_class_that_is_lost_later_has_its_own_warning(evaluation):
    for lost, expected in ((9, 0), (9, 1), (5, 0), (5, 1)):
        assert len(evaluation(without(9, lost))) == expected


def test_pseudo_labels_are_counted_beyond_what_float_can_count(evaluation):
    counts = evaluation.run.label_counts
    counts[0] = 2**25
    counts[3] = 2**17
    step(evaluation.run, 0, pseudo_labels={"pseudo_miou": ROAD[:1]})
    assert counts[0] == 2**25 + 256
    assert any("collapse" in text for text in evaluation())


def test_pseudo_labels_of_one_class(evaluation):
    (text,) = [text for text in evaluation(ROAD) if "collapse" in text]
    assert "100.0 % of the pseudo-labels are road, of val only 10 %" in text


def test_much_of_one_class_is_fine_where_val_has_much_of_it_too(evaluation):
    road = confusion() * torch.tensor([9900] + 9 * [1])[:, None]
    assert not any("collapse" in text for text in evaluation(ROAD, a=road))


def test_no_pixel_over_the_threshold(evaluation):
    (text,) = evaluation(torch.full((2, 64, 64), 255))
    assert "no pixel of the pseudo-labels is over the threshold" in text


def test_a_class_at_zero_for_a_long_time(evaluation):
    said = []
    for steps in (10, 20, 30, 60, 70):
        hits = {9: 0} if steps < 60 else {9: 0, 8: 0}
        said.append(evaluation(steps=steps, a=confusion(hits), b=confusion(hits | {8: 5})))
    assert [len(texts) for texts in said] == [0, 0, 0, 1, 0]
    assert "sign" in said[3][0] and "pole" not in said[3][0]


def test_waiting_for_pictures(tmp_path, capsys):
    """A loader that takes longer than the step: the log has the share; one warning."""
    run = one_stage(tmp_path, "--log-every", "4")
    for iteration in range(8):
        if iteration % 4 == 3:
            run.interval -= 20  # as if these iterations had taken so many seconds
            common.WAITED[0] = 15.0
        step(run, iteration)
    waiting = [record["waiting"] for record in records(run.folder)]
    assert waiting == pytest.approx([0.75, 0.75], abs=0.01) and common.WAITED[0] == 0
    (text,) = [line for line in capsys.readouterr().err.splitlines() if "--workers" in line]
    assert "75 % of the time is spent waiting for pictures" in text


def test_batches_measure_the_waiting(monkeypatch):
    class Slow(common.Streets):
        def image(self, id):
            common.time.sleep(0.02)
            return super().image(id)

    args = SimpleNamespace(seed=0, crop=(64, 128), scale=(1.0, 1.0), batch_size=2, workers=0)
    monkeypatch.setattr(common, "WAITED", [0.0])
    data = Slow()
    list(common.batches(common.Stream(data, data.train[:4], "a", args), args, CPU, 0, 3))
    assert 0.12 <= common.WAITED[0] < 2


def test_a_whole_run_warns_by_itself(tmp_path, capsys):
    """With a threshold of 1 nothing is known, and a class is never predicted."""
    flags = "--labels 4 --batch-size 2 --stages 1 --stage0-iterations 4 --iterations 4"
    flags += " --eval-every 2 --threshold 1"
    run_on_few_streets(rml, *flags.split(), "--out", tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if line.startswith("warning: after")]
    assert any("over the threshold" in text for text in found)
    assert any("IoU 0 in every network" in text for text in found)
    assert len(found) == len(set(found))


# ---- tests/results_table.py ----------------------------------------------------------------------


def finished(folder, method, seed, miou, changed=(), arguments={}, **result):
    folder.mkdir(parents=True)
    arguments = {"changed": list(changed), **arguments}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments}))
    usual = {"dataset": "streets", "labels": 8, "paper": None, "headline": "b"}
    result = usual | {"method": method, "seed": seed, "miou": {"a": 1.0, "b": miou}} | result
    (folder / "result.json").write_text(json.dumps(result))


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1 and set("".join(cells[1])) == {"-"}
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def table(text):
    return {(row["method"], row["setting"]): row for row in rows(text)}


def test_the_table_over_runs(tmp_path, capsys):
    one = dict(changed=["stages"], arguments={"stages": 1})
    for seed, miou in ((0, 30.0), (1, 34.0), (2, 38.0)):
        finished(tmp_path / f"rml{seed}", "rml", seed, miou, paper=63.97)
        finished(tmp_path / f"deep/one{seed}", "rml", seed, miou + 1, **one)
    for seed, miou in ((0, 25.0), (1, 27.0)):
        finished(tmp_path / f"sup{seed}", "rml-supervised", seed, miou)
    finished(tmp_path / "sup one", "rml-supervised", 0, 20.0, **one)
    finished(tmp_path / "other", "dars", 0, 50.0, labels=16)
    (tmp_path / "begun").mkdir()  # a run that was stopped
    (tmp_path / "begun/args.json").write_text(json.dumps({"arguments": {"changed": []}}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/args.json").write_text("{")
    results_table.results(tmp_path)
    said = capsys.readouterr()
    found = table(said.out)
    ours = found["rml", ""]
    assert ours["seeds"] == "0 1 2" and ours["mIoU"] == "34.00" and ours["std"] == "4.00"
    assert ours["paper"] == "63.97" and ours["supervised"] == "26.00"
    assert ours["gain"] == "+6.00 (seeds 0 1)"
    assert found["rml", "stages 1"]["supervised"] == "20.00"  # the baseline of its own setting
    assert found["rml", "stages 1"]["gain"] == "+11.00 (seeds 0)"
    baseline = found["rml, supervised", ""]
    assert baseline["mIoU"] == "26.00" and baseline["std"] == "1.41" and baseline["gain"] == ""
    other = found["dars", ""]
    assert other["std"] == other["gain"] == "" and other["labels"] == "16"
    assert "unfinished" in said.out and "begun" in said.out and "broken" in said.err


def test_presets_and_folders_have_their_own_rows(tmp_path, capsys):
    for i, (preset, root, miou, method) in enumerate(
        [
            ("cpu", "cats", 30.0, "rml"),
            ("gpu", "roads", 70.0, "rml"),
            ("cpu", "cats", 20.0, "rml-supervised"),
        ]
    ):
        arguments = {"table_preset": preset, "data_root": root}
        folder = tmp_path / str(i)
        finished(folder, method, 0, miou, arguments=arguments, dataset="folder")
    results_table.results(tmp_path)
    found = table(capsys.readouterr().out)
    assert found["rml", "preset cpu, data-root cats"]["gain"] == "+10.00"
    assert found["rml", "preset gpu, data-root roads"]["gain"] == ""


def test_of_two_runs_with_one_seed_the_newest_counts(tmp_path, capsys):
    finished(tmp_path / "a", "rml", 0, 30.0)
    finished(tmp_path / "b", "rml", 0, 40.0)
    os.utime(tmp_path / "b/args.json", (1, 1))
    results_table.results(tmp_path)
    said = capsys.readouterr()
    assert rows(said.out)[0]["mIoU"] == "30.00" and "another run of rml with seed 0" in said.err


def test_real_runs_are_in_the_table(tmp_path, capsys):
    flags = "--labels 4 --batch-size 2 --stages 1 --stage0-iterations 2 --iterations 2".split()
    for i, more in enumerate(([], ["--supervised"])):
        run_on_few_streets(rml, *flags, *more, "--out", tmp_path / f"runs/{i}")
    capsys.readouterr()
    results_table.results(tmp_path / "runs")
    supervised, ours = rows(capsys.readouterr().out)
    assert supervised["method"] == "rml, supervised" and ours["dataset"] == "streets"
    assert ours["gain"] and "stages 1" in ours["setting"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "results_table.py runs/"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "holds no finished run"),
    ],
)
def test_results_that_cannot_be(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["results_table.py", *argv])
    with pytest.raises(common.UserError, match=words):
        results_table.main()


def test_curves_with_gaps_are_drawn():
    series = {
        "a": np.array([[1.0, np.nan, 3.0]]),
        "b": np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]),
    }
    picture = np.asarray(common.draw_curves("losses", series, ("iteration", [1, 2, 3])))
    for color in common.CURVE_COLORS[:2]:
        assert (picture == color).all(2).sum() > 100
