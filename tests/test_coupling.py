"""tests/figure_rml.py: total variation against a loop, digits, learners, pictures, and errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import figure_rml
import rml
from helpers import run_on_few_streets, strict

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = "coupling --iterations 4 --stage0-iterations 3 --log-every 2 --seeds 2 --ema-decay .5"
SHORT = [*SHORT.split(), "--out", "run"]


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(..) in tmp_path, with few drawn digits."""
    monkeypatch.chdir(tmp_path)
    draw = figure_rml.draw_digits
    monkeypatch.setattr(figure_rml, "draw_digits", lambda seed, n: draw(seed, n // 100))
    return lambda *argv: figure_rml.main(list(map(str, argv)))


def test_total_variation():
    p, q = torch.rand(5, 4).softmax(1), torch.rand(5, 4).softmax(1)
    rows = [sum(abs(float(p[i, k]) - float(q[i, k])) for k in range(4)) / 2 for i in range(5)]
    assert float(figure_rml.total_variation(p, q)) == pytest.approx(sum(rows) / 5, rel=1e-5)
    one = torch.eye(4)[torch.tensor([0, 1])]
    assert figure_rml.total_variation(one, one) == 0
    assert figure_rml.total_variation(one, one.flip(0)) == 1


def test_drawn_digits_are_seeded_varied_and_legible():
    images, labels = figure_rml.draw_digits("train", 1500)
    again = figure_rml.draw_digits("train", 10)
    assert images.shape == (1500, 28, 28)
    assert images.dtype == np.uint8
    assert (again[0] == images[:10]).all()
    assert (again[1] == labels[:10]).all()
    assert set(labels) == set(range(10))
    assert min(np.bincount(labels)) > 100
    assert not (figure_rml.draw_digits("held out", 10)[0] == images[:10]).all()
    x, y = torch.from_numpy(images).flatten(1).float() / 255, torch.from_numpy(labels)
    torch.manual_seed(0)
    network = figure_rml.make_mlp(0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[:1200]), y[:1200]).backward()
        optimizer.step()
    assert (network(x[1200:]).argmax(1) == y[1200:]).float().mean() > 0.8


def test_the_mlp_has_three_layers_and_dropout_between():
    assert (
        sum(p.numel() for p in figure_rml.make_mlp(0.5).parameters())
        == 785 * 256 + 257 * 256 + 257 * 10
    )
    network, x = figure_rml.make_mlp(0.5), torch.rand(3, 784)
    assert torch.equal(network.eval()(x), network(x))
    assert not torch.equal(network.train()(x), network(x))


def test_a_run_writes_curves_log_and_numbers(main, tmp_path, capsys):
    main(*SHORT)
    text, result = capsys.readouterr().out, strict((tmp_path / "run/result.json").read_text())
    records = [strict(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "log.jsonl",
        "result.json",
        "coupling_teachers.png",
        "coupling_students.png",
    }
    assert [(r["seed"], r["mode"], r["iteration"]) for r in records] == [
        (s, m, t) for s in (0, 1) for m in figure_rml.COUPLING for t in (0, 2, 4)
    ]
    assert result["labels"] == 2
    assert result["iterations"] == [0, 2, 4]
    assert result["seeds"] == [0, 1]
    assert result["dataset"] == "drawn digits"
    for key in ("tv_teachers", "tv_students"):
        assert all(np.array(result[key][mode]).shape == (2, 3) for mode in figure_rml.COUPLING)
        assert all(0 < r[key] < 1 for r in records)
        for s in (0, 1):  # all modes begin with the same two learners, seeds with others
            assert len({r[key] for r in records if r["seed"] == s and r["iteration"] == 0}) == 1
        assert result[key]["direct"][0][0] != result[key]["direct"][1][0]
        assert result[key]["indirect, model noise"][0][2] not in (
            result[key]["indirect"][0][2],
            result[key]["direct"][0][2],
        )
    assert result["tv_teachers"]["direct"] == result["tv_students"]["direct"]
    assert result["tv_teachers"]["indirect"] != result["tv_students"]["indirect"]
    assert "total variation in percent between the two teachers" in text
    assert "seeds 0, 1" in text
    assert min(Image.open(tmp_path / "run/coupling_teachers.png").size) > 300
    main(*SHORT[:-1], "again")
    again = strict((tmp_path / "again/result.json").read_text())
    assert all(
        again[key] == result[key] for key in ("tv_teachers", "tv_students", "accuracy_teachers")
    )


def test_which_networks_teach_and_which_have_noise(main, monkeypatch):
    """Direct: students teach; indirect: mean teachers. Dropout is on in the third mode alone."""
    seen, make = [], figure_rml.make_mlp

    def watched(dropout):
        network = make(dropout)
        network.register_forward_pre_hook(
            lambda module, x: seen.append(
                (
                    module.training,
                    torch.is_grad_enabled(),
                    next(module.parameters()).requires_grad,
                    len(x[0]),
                )
            )
        )
        return network

    monkeypatch.setattr(figure_rml, "make_mlp", watched)
    main(*SHORT, "--seeds", 1, "--log-every", 100, "--batch-size", 7)
    learning = [(training, size) for training, grad, _, size in seen if grad and size == 14]
    assert learning == [(mode == 2, 14) for mode in range(3) for _ in range(5) for _ in range(2)]
    teaching = [
        requires_grad for training, grad, requires_grad, size in seen if not grad and size == 7
    ]
    assert teaching == [True] * 10 + [False] * 20


def test_mnist_is_read_as_torchvision_has_it(main, tmp_path):
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 120), ("t10k", 30)):
        images = np.random.RandomState(n).randint(0, 256, (n, 28, 28)).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([2051, n, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, n], ">i4").tobytes() + (np.arange(n) % 10).astype(np.uint8).tobytes()
        )
    main(*SHORT, "--data-root", "data")
    result = strict((tmp_path / "run/result.json").read_text())
    assert result["dataset"] == "mnist"
    assert result["labels"] == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data-root", "nowhere"], ["nowhere", "--download", "drawn digits"]),
        (["--seeds", "0"], ["--seeds 0"]),
        (["--labels", "0"], ["--labels 0"]),
        (["--download"], ["--download", "--data-root DIR"]),
        (["--labels", "1/1"], ["--labels 1/1", "all 120 digits"]),
        (["--dropout", "2"], ["--dropout 2:"]),
        (["--ema-decay", "-1"], ["--ema-decay -1:"]),
        (["--lr", "0"], ["--lr 0: must be above 0"]),
        (["--iterations", "-1"], ["--iterations -1"]),
    ],
)
def test_an_error_names_what_is_wrong(main, argv, words):
    with pytest.raises(common.UserError) as caught:
        main(*SHORT, *argv)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_finished_run_is_kept(main, tmp_path):
    main(*SHORT)
    with pytest.raises(common.UserError, match="finished run"):
        main(*SHORT)
    main(*SHORT, "--overwrite")


# ---- Fig. 4 --------------------------------------------------------------------------------------


def write_log(folder, values, begin=40):
    folder.mkdir()
    rows = [{"step": 10, "stage": 0, "iteration": 10, "loss_labeled_1": 1.0}]
    rows += [
        {
            "step": begin + 10 * (i + 1),
            "stage": 1,
            "iteration": 10 * (i + 1),
            "pseudo_miou_1": x,
            "pseudo_miou_2": x + 2,
        }
        for i, x in enumerate(values)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pseudo_labels_of_runs_as_one_picture(main, tmp_path, capsys, monkeypatch):
    write_log(tmp_path / "mt", [10.0, 20.0, 30.0])
    write_log(tmp_path / "rml", [20.0, 30.0, 50.0, 60.0], begin=400)
    drawn, draw = [], common.draw_curves
    monkeypatch.setattr(common, "draw_curves", lambda *args: drawn.append(args) or draw(*args))
    main("compare", "mt", "rml", "--out", "fig4.png")
    ((_, series, (_, steps)),) = drawn
    assert steps == [10, 20, 30]
    assert {name: curves.tolist() for name, curves in series.items()} == {
        "mt": [[11.0, 21.0, 31.0]],
        "rml": [[21.0, 31.0, 51.0]],
    }
    assert "11.0 at first,   31.0 at last" in capsys.readouterr().out
    assert Image.open("fig4.png").size[0] > 500


def test_compare_a_run_that_was_made(main, tmp_path):
    length = "--iterations 4 --stage0-iterations 2 --stages 1 --batch-size 2 --labels 4"
    often = "--log-every 2 --eval-every 100"
    run_on_few_streets(rml, *length.split(), *often.split(), "--out", "one")
    main("compare", "one")
    assert (tmp_path / "pseudo_miou.png").exists()


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: None, "no readable log.jsonl"),
        (lambda: write_log(Path("run"), []), "no pseudo-labels"),
        (lambda: write_log(Path("run"), [1.0]), "two iterations in common"),
    ],
)
def test_compare_names_what_is_missing(main, make, word):
    make()
    with pytest.raises(common.UserError, match=word):
        main("compare", "run")


def test_compare_more_than_four_runs_or_into_a_folder(main, tmp_path):
    write_log(tmp_path / "run", [1.0, 2.0])
    with pytest.raises(common.UserError, match="5 runs are too many"):
        main("compare", *["run"] * 5)
    (tmp_path / "other").mkdir()
    write_log(tmp_path / "other/run", [1.0, 2.0])
    with pytest.raises(common.UserError, match="of the same name"):
        main("compare", "run", "other/run")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(common.UserError, match="--out pictures: cannot be written"):
        main("compare", "run", "--out", "pictures")


def test_a_folder_that_cannot_be_written_is_reported_first(main, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="file/run: cannot be written"):
        main(*SHORT, "--out", "file/run")


def test_the_commands_of_the_readme_parse():
    readme = (Path(figure_rml.__file__).parent.parent / "README.md").read_text()
    commands = re.findall(r"python tests/figure_rml.py ([^`\n]+)", readme)
    assert {command.split()[0] for command in commands} == {"coupling", "compare"}
    for command in commands:
        figure_rml.get_parser().parse_args(command.split())


def test_curves_are_drawn_where_their_numbers_are():
    """A rising and a constant line, each in its color, at the right heights."""
    picture = np.asarray(
        common.draw_curves(
            "title",
            {"rising": np.array([[0.0, 1.0]]), "constant": np.array([[0.5, 0.5]])},
            ("x", [0, 100]),
        )
    )
    ours = {
        name: np.argwhere((picture == color).all(2))
        for name, color in zip(("rising", "constant"), common.CURVE_COLORS)
    }
    plot = {name: points[points[:, 0] > 60] for name, points in ours.items()}
    assert abs(np.ptp(plot["constant"][:, 0])) <= 4
    assert plot["constant"][:, 0].mean() == pytest.approx(64 + 170, abs=2)
    rising = plot["rising"]
    assert rising[rising[:, 1] < 90][:, 0].mean() > rising[rising[:, 1] > 700][:, 0].mean() + 250
