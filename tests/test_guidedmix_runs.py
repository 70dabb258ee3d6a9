"""Whole runs of guidedmix.py: that the work happened, a step by hand, what each flag changes, that processes and restarts change nothing, and its errors."""

import copy
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import guidedmix  # noqa: E402
import rml  # noqa: E402
from helpers import (
    all_masks_are,
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
    two_processes,
    untimed,
)  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [
    "--labels",
    "4",
    "--iterations",
    "4",
    "--batch-size",
    "2",
    "--crop",
    "33",
    "65",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--eval-every",
    "100",
    "--warmup",
    "0",
    "--classifier",
    "--pairs",
    "similar",
    "--omega",
    "1.5",
    "--dec-weight",
    "1",
    "--labeled-decoupling",
    "hard",
    "--stop-gradient",
    "--lambda-cap",
    ".5",
]
TERMS = {"loss_labeled", "loss_cla", "loss_dec", "loss_usup"}


def start(*argv):
    """guidedmix.py in this process, on few streets."""
    run_on_few_streets(guidedmix, *SHORT, *argv)


def same_bits(a, b):
    return same_checkpoint(a, b, ("models", "optimizer", "scaler", "step", "stage", "iteration"))


def same_end(folder, whole):
    """The same weights, log and numbers, and nothing is left over."""
    assert (
        same_bits(folder, whole)
        and untimed(folder) == untimed(whole)
        and result_of(folder) == result_of(whole)
    )
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == {
        str(p.relative_to(whole)) for p in whole.rglob("*")
    }
    return True


# ---- that the work happened ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run from beginning to end that nothing disturbs: its folder, and the network before."""
    folder, saved, save = tmp_path_factory.mktemp("whole") / "run", [], common.Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.Run,
            "save",
            lambda run, headline, networks, **state: (
                saved.append(copy.deepcopy(networks["student"].state_dict()))
                or save(run, headline, networks, **state)
            ),
        )
        start("--out", folder)
    return folder, saved[0]


@pytest.fixture
def whole(run):
    return run[0]


def test_the_work_happened(run):
    folder, before = run
    log, after = [r for r in records(folder) if "lr" in r], last(folder)
    assert [(r["step"], r["iteration"]) for r in log] == [(t, t) for t in range(1, 5)]
    assert terms(folder) == TERMS and len(losses(folder)) == 4 * 4
    assert np.isfinite(list(losses(folder).values())).all() and min(losses(folder).values()) > 0
    rate = guidedmix.PAPER["streets"]["lr"]
    assert [r["lr"] for r in log] == pytest.approx([rate * (1 - t / 4) ** 0.9 for t in range(4)])
    assert [r["omega"] for r in log] == pytest.approx(
        [1.5 * math.exp(-5)] + 3 * [1.5]
    )  # 10 % of 4 iterations are less than one
    assert all(0 < r["lambda"] < 0.5 for r in log) and len({r["lambda"] for r in log}) == 4
    assert all(0 < r["pseudo_miou"] < 100 and 0 < r["direct_miou"] < 100 for r in log) and any(
        r["pseudo_miou"] != r["direct_miou"] for r in log
    )
    student = after["models"]["student"]
    assert (
        list(after["models"]) == ["student"] == list(after["networks"])
        and after["headline"] == "student"
    )
    assert student.keys() == before.keys() and not any(
        torch.equal(student[key], before[key]) for key in before
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
    }
    assert (
        list(result["miou"]) == ["student"]
        and result["headline"] == "student"
        and result["method"] == "guidedmix"
        and result["network"] == "guidedmix"
    )
    assert (
        result["iterations"] == 4
        and result["labels"] == 4
        and result["paper"] is None
        and len(result["per_class"]) == 10
    )
    assert result["miou"]["student"] == pytest.approx(
        np.mean([x for x in result["per_class"].values() if x is not None])
    )
    (val,) = [r["val"] for r in records(whole) if "val" in r]
    assert val == result["miou"]
    assert {p.name for p in (whole / "pictures").iterdir()} == {
        "val_000004.png",
        "batch_000004.png",
        "losses.png",
    }
    for picture in (whole / "pictures").iterdir():
        assert min(Image.open(picture).size) > 100


def network_of(state):
    network = guidedmix.make_network(state["networks"]["student"])
    network.load_state_dict(state["models"]["student"])
    return network


def answer(network, id):
    """What the network says of a whole picture."""
    with torch.no_grad():
        logits = network.eval()(
            torch.from_numpy(common.draw_street(id)[0].transpose(2, 0, 1)[None] / np.float32(255))
        )
    return (
        F.interpolate(logits, (64, 128), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    )


def test_the_numbers_are_those_of_the_weights(whole):
    data, network, table = FewStreets(), network_of(last(whole)), np.zeros((10, 10))
    for id in data.val:
        label = data.label(id)
        np.add.at(table, (label[label != 255], answer(network, id)[label != 255]), 1)
    hit = np.diag(table)
    union = table.sum(0) + table.sum(1) - hit
    assert result_of(whole)["miou"]["student"] == pytest.approx(
        100 * np.mean(hit[union > 0] / union[union > 0]), abs=0.02
    )


def test_evaluate_and_predict(main, whole, tmp_path, capsys):
    main("--evaluate", "--checkpoint", whole / "last.pt")
    words = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")
    ).split()
    assert float(words[1]) == round(result_of(whole)["miou"]["student"], 2)
    Image.fromarray(common.draw_street("train_0000")[0]).save(tmp_path / "street.png")
    main("--predict", "street.png", "--checkpoint", whole, "--out", "out")
    assert (
        np.asarray(Image.open("out/street.png")) == answer(network_of(last(whole)), "train_0000")
    ).mean() > 0.999


def test_several_scales_and_flip_are_the_mean_of_the_probabilities(main, whole, capsys):
    main("--evaluate", "--checkpoint", whole, "--scales", ".5", "1", "1.5", "--flip")
    miou = float(
        next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")
        ).split()[1]
    )
    data, network, table = FewStreets(), network_of(last(whole)).eval(), np.zeros((10, 10))
    for id in data.val:
        image, total = (
            torch.from_numpy(data.image(id).transpose(2, 0, 1)[None] / np.float32(255)),
            0,
        )
        for size in ((32, 64), (64, 128), (96, 192)):
            x = F.interpolate(image, size, mode="bilinear", align_corners=False)
            with torch.no_grad():
                parts = network(x), network(x.flip(-1))
            parts = [
                F.interpolate(part, (64, 128), mode="bilinear", align_corners=False).softmax(1)
                for part in parts
            ]
            total = total + parts[0] + parts[1].flip(-1)
        label = data.label(id)
        np.add.at(table, (label, total.argmax(1)[0].numpy()), 1)
    hit = np.diag(table)
    union = table.sum(0) + table.sum(1) - hit
    assert miou == pytest.approx(100 * np.mean(hit[union > 0] / union[union > 0]), abs=0.02)


def test_another_scripts_evaluate_names_the_script(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match="guidedmix.py"):
        run_on_few_streets(rml, "--evaluate", "--checkpoint", whole)


def test_nothing_learns_from_masks_of_unlabeled_pictures(main, whole, tmp_path, monkeypatch):
    unlabeled = strict((whole / "args.json").read_text())["unlabeled"]
    all_masks_are(9, unlabeled, monkeypatch)
    main("--out", "run")
    folder = tmp_path / "run"
    assert len(unlabeled) == 4 and same_bits(folder, whole) and losses(folder) == losses(whole)
    assert all(
        a["pseudo_miou"] != b["pseudo_miou"]
        for a, b in zip(records(folder), records(whole))
        if "lr" in a
    )  # the log did see other masks


def test_without_any_known_labeled_pixel_its_loss_is_zero_and_the_rest_goes_on(
    main, whole, tmp_path, monkeypatch
):
    all_masks_are(255, strict((whole / "args.json").read_text())["labeled"], monkeypatch)
    main("--out", "run")
    assert (
        all(
            (value == 0) == (key[2] == "loss_labeled")
            for key, value in losses(tmp_path / "run").items()
        )
        and terms(tmp_path / "run") == TERMS
    )


# ---- a step by hand --------------------------------------------------------------------------------------------------


def sample(x, size):
    return F.interpolate(x[:, None].float(), size, mode="nearest-exact")[:, 0].bool()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--decoupling hard --labeled-decoupling soft --dec-weight 3",
        "--pairs random",
        "--masks logits",
        "--masks probabilities",
        "--no-stop-gradient",
        "--distance places --scale .4 .6",
        "--no-classifier --omega 0",
        "--dec-weight 0",
    ],
)
def test_the_first_step_by_hand(main, tmp_path, monkeypatch, flags):
    """Losses and the weights after a step of SGD, from the paper's formulas, picture by picture; omega's ramp-up is at .25."""
    monkeypatch.setattr(guidedmix, "ramp_up", lambda t: 0.25)
    argv = [
        *SHORT,
        "--iterations",
        "1",
        "--ramp",
        "0",
        "--batch-size",
        "3",
        "--optimizer",
        "sgd",
        "--lr",
        ".05",
        *flags.split(),
    ]
    main(*argv, "--out", "run")
    folder = tmp_path / "run"
    names, args = (
        strict((folder / "args.json").read_text()),
        common.parse_args(guidedmix.get_parser(), guidedmix.PAPER, argv),
    )
    data, B = FewStreets(), 3
    network = common.build_network(
        args,
        data,
        torch.device("cpu"),
        make=guidedmix.make_network,
        mitrans=True,
        present=10 * args.classifier,
    ).train()
    weights = copy.deepcopy(network.state_dict())
    parts = [
        [
            common.Stream(data, names[kind], kind, args, labeled=kind == "labeled")[p]
            for p in range(B)
        ]
        for kind in ("labeled", "unlabeled")
    ]
    x_l, x_u = ([part["image"].float() / 255 for part in kind] for kind in parts)
    encoded = [network.encode(torch.stack(kind))[0] for kind in (x_l, x_u)]
    look = lambda x: network(x[None])[0]
    size = (17, 33)

    m_l, m_u = [look(x) for x in x_l], [look(x) for x in x_u]
    losses_by_hand, valid_pixels = {}, sum(int((part["label"] != 255).sum()) for part in parts[0])
    losses_by_hand["loss_labeled"] = (
        sum(
            F.cross_entropy(
                F.interpolate(m[None], (33, 65), mode="bilinear", align_corners=True),
                part["label"][None].long(),
                ignore_index=255,
                reduction="sum",
            )
            for m, part in zip(m_l, parts[0])
        )
        / valid_pixels
    )
    if args.classifier:
        p = [network.presence(v.mean((1, 2))).sigmoid() for v in encoded[0]]
        losses_by_hand["loss_cla"] = -sum(
            (p[b][k] if k in parts[0][b]["label"] else 1 - p[b][k]).log()
            for b in range(B)
            for k in range(10)
        ) / (B * 10)
    if args.masks == "probabilities":
        m_l, m_u = [m.softmax(0) for m in m_l], [m.softmax(0) for m in m_u]
    of_blend = lambda x: look(x).softmax(0) if args.masks == "probabilities" else look(x)
    compared = lambda m: m.softmax(0) if args.masks == "softmax" else m
    target = lambda m: m.detach() if args.stop_gradient else m

    def distance(a, b):
        return float(
            ((a - b) if args.distance == "places" else a.mean((1, 2)) - b.mean((1, 2)))
            .detach()
            .square()
            .sum()
            .sqrt()
        )

    lam, lam_l = (
        guidedmix.sample_lambda(1.0, 0.5, common.rng(0, name, 0))
        for name in ("lambda", "lambda labeled")
    )
    terms_by_hand = {"loss_usup": [], "loss_dec": []}
    counts = {"loss_usup": 0, "loss_dec": 0}
    for i in range(B):
        if args.pairs == "similar":
            j = min(range(B), key=lambda j: distance(encoded[1][i], encoded[0][j]))
            k = min(
                (k for k in range(B) if k != i),
                key=lambda k: distance(encoded[0][i], encoded[0][k]),
            )
        else:
            j = common.rng(0, "pair", i).randint(B)
            k = (i + 1 + common.rng(0, "pair labeled", i).randint(B - 1)) % B
            assert k != i
        m_mix = of_blend(lam * x_l[j] + (1 - lam) * x_u[i])
        m_dec = m_mix - (lam if args.decoupling == "soft" else 1) * m_l[j]
        valid = sample(parts[1][i]["valid"][None], size)[0]
        terms_by_hand["loss_usup"].append(
            ((compared(target(m_dec)) - compared(m_u[i])).square().sum(0) * valid).sum()
        )
        counts["loss_usup"] += int(valid.sum())
        m_mix = of_blend(lam_l * x_l[i] + (1 - lam_l) * x_l[k])
        m_dec = m_mix - (lam_l if args.labeled_decoupling == "soft" else 1) * target(m_l[i])
        valid = sample(parts[0][k]["valid"][None], size)[0]
        terms_by_hand["loss_dec"].append(
            ((compared(m_dec) - compared(target(m_l[k]))).square().sum(0) * valid).sum()
        )
        counts["loss_dec"] += int(valid.sum())
    for name, used in (("loss_usup", args.omega), ("loss_dec", args.dec_weight)):
        if used:
            losses_by_hand[name] = sum(terms_by_hand[name]) / counts[name]
    if ".4" in flags:
        assert counts["loss_usup"] < B * 17 * 33  # padding counts for nothing
    found = {name: value for (_, _, name), value in losses(folder).items()}
    assert found.keys() == losses_by_hand.keys()
    for name, value in found.items():
        assert value == pytest.approx(losses_by_hand[name].item(), rel=1e-4), name

    weight = {
        "loss_labeled": 1,
        "loss_cla": 1,
        "loss_dec": args.dec_weight,
        "loss_usup": args.omega * 0.25,
    }
    sum(weight[name] * value for name, value in losses_by_hand.items()).backward()
    for name, p in network.named_parameters():
        expected = weights[name] - 0.05 * (p.grad + args.weight_decay * weights[name])
        torch.testing.assert_close(
            last(folder)["models"]["student"][name], expected, atol=2e-6, rtol=1e-4
        )


# ---- every flag does its work ----------------------------------------------------------------------------------------

ONCE = ["--save-every", "100", "--out", "run"]  # at the end alone: for runs that nothing disturbs


@pytest.fixture
def variant(main, whole, tmp_path):
    """variant("--flag ..", "loss_dec", ..): a run with it. In the first iteration the terms so named changed and the others did not; later all did."""

    def go(flags, *changed):
        main(*ONCE, *flags.split())
        ours, theirs = losses(tmp_path / "run"), losses(whole)
        assert np.isfinite(list(ours.values())).all()
        for (_, iteration, name), value in ours.items():
            assert (value != theirs[1, iteration, name]) == (iteration > 1 or name in changed), (
                iteration,
                name,
            )
        return tmp_path / "run"

    return go


@pytest.mark.parametrize(
    "flags, changed",
    [
        ("--lambda-cap .1", ["loss_dec", "loss_usup"]),
        ("--alpha .3", ["loss_dec", "loss_usup"]),
        ("--decoupling hard", ["loss_usup"]),
        ("--labeled-decoupling soft", ["loss_dec"]),
        ("--masks logits", ["loss_dec", "loss_usup"]),
        ("--masks probabilities", ["loss_dec", "loss_usup"]),
        ("--no-stop-gradient", []),
        ("--dec-weight 5", []),
        ("--omega 50", []),
        ("--pairs random", ["loss_usup"]),
    ],
)
def test_a_flag_changes_its_terms(variant, flags, changed):
    assert terms(variant(flags, *changed)) == TERMS


@pytest.mark.parametrize(
    "flags, gone",
    [("--omega 0", "loss_usup"), ("--dec-weight 0", "loss_dec"), ("--no-classifier", "loss_cla")],
)
def test_a_term_that_is_left_out(variant, flags, gone):
    folder = variant(flags)
    assert terms(folder) == TERMS - {gone} and (
        "presence.weight" in last(folder)["models"]["student"]
    ) == (gone != "loss_cla")
    assert all(("pseudo_miou" in r) == (gone != "loss_usup") for r in records(folder) if "lr" in r)


def test_a_term_that_is_left_out_costs_no_pass(main, monkeypatch):
    passes, forward = [], guidedmix.WithEncoder.forward
    monkeypatch.setattr(
        guidedmix.WithEncoder,
        "forward",
        lambda self, image: (
            passes.append((len(image), torch.is_grad_enabled())) or forward(self, image)
        ),
    )
    for flags, expected in (
        ([], [(4, True), (2, False), (2, True)]),
        (["--omega", 0], [(2, True), (2, True)]),
        (["--dec-weight", 0], [(4, True), (2, False)]),
        (["--no-stop-gradient"], [(4, True), (2, True), (2, True)]),
        (["--supervised"], [(2, True)]),
    ):
        passes.clear()
        main(*ONCE, "--overwrite", "--iterations", 1, *flags)
        assert passes == expected, flags


def test_without_mitrans(main, whole, tmp_path):
    main(*ONCE, "--no-mitrans")
    names = last(tmp_path / "run")["models"]["student"].keys()
    assert (
        names == {name for name in last(whole)["models"]["student"] if "non_local" not in name}
        and terms(tmp_path / "run") == TERMS
    )
    main("--evaluate", "--checkpoint", "run")


def test_distances_place_by_place(main, whole, tmp_path, monkeypatch):
    asked, real = [], guidedmix.distances
    monkeypatch.setattr(
        guidedmix, "distances", lambda a, b: asked.append((a.shape, b.shape)) or real(a, b)
    )
    main(*ONCE, "--distance", "places")
    assert asked == 4 * [((4, 64 * 5 * 9), (2, 64 * 5 * 9))]
    main(*ONCE, "--overwrite", "--pairs", "random")
    assert len(asked) == 4


def test_rotation(main, whole, tmp_path):
    main(*ONCE, "--rotation", 10)
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    assert all(ours[key] != theirs[key] for key in theirs)


def test_warmup_is_on_labels_alone_then_omega_rises(main, tmp_path):
    main(*ONCE, "--iterations", 8, "--warmup", 0.25, "--ramp", 0.5, "--log-every", 3)
    start(*ONCE[:2], "--iterations", 8, "--supervised", "--log-every", 2, "--out", "supervised")
    folder = tmp_path / "run"
    assert {(key[1], key[2]) for key in losses(folder)} == {
        (2, name) for name in ("loss_labeled", "loss_cla")
    } | {(t, name) for t in (3, 6, 8) for name in TERMS}
    assert [r.get("omega") for r in records(folder) if "lr" in r] == [None] + [
        pytest.approx(1.5 * math.exp(-5 * (1 - t / 4) ** 2)) for t in (0, 3, 4)
    ]
    assert losses(tmp_path / "supervised")[1, 2, "loss_labeled"] == pytest.approx(
        losses(folder)[1, 2, "loss_labeled"], rel=0.1
    )  # the classifier moves the encoder a little


def test_supervised_is_the_same_network_with_the_same_weak_views_and_steps(main, whole, tmp_path):
    main(*ONCE, "--supervised")
    folder = tmp_path / "run"
    result = result_of(folder)
    assert (
        result["method"] == "guidedmix-supervised"
        and result["iterations"] == 4
        and terms(folder) == {"loss_labeled"}
        and len(losses(folder)) == 4
    )
    assert last(folder)["models"]["student"].keys() == {
        name for name in last(whole)["models"]["student"] if "presence" not in name
    }
    assert losses(folder)[1, 1, "loss_labeled"] == pytest.approx(
        losses(whole)[1, 1, "loss_labeled"], rel=1e-5
    )
    assert [r["lr"] for r in records(folder) if "lr" in r] == [
        r["lr"] for r in records(whole) if "lr" in r
    ]
    assert (folder / "pictures/batch_000004.png").exists()


def test_without_the_methods_terms_it_is_the_baseline(main, tmp_path):
    flags = [*ONCE[:2], "--optimizer", "sgd", "--lr", ".01"]
    main(*flags, "--supervised", "--out", "supervised")
    main(*flags, "--omega", 0, "--dec-weight", 0, "--no-classifier", "--out", "without")
    ours, theirs = (
        last(tmp_path / name)["models"]["student"] for name in ("without", "supervised")
    )
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16 --workers 1 --optimizer sgd",
        "--scale .3 .6 --batch-size 3 --rotation 10",
        "--pairs random --no-stop-gradient --masks logits --lr 1e-4",
        "--rotation 10 --workers 1",
        "--crop 32 64",
        "--crop 50 61",
    ],
)
def test_other_settings(main, tmp_path, flags):
    main(*ONCE, *flags.split())
    assert (
        terms(tmp_path / "run") == TERMS
        and np.isfinite(list(losses(tmp_path / "run").values())).all()
        and min(losses(tmp_path / "run").values()) > 0
    )


def test_weights_of_another_run(main, whole, tmp_path, capsys):
    main(*ONCE, "--weights", whole / "last.pt", "--iterations", 1)
    assert "missing 0" in capsys.readouterr().out
    assert losses(tmp_path / "run")[1, 1, "loss_labeled"] < losses(whole)[1, 1, "loss_labeled"]


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def at(iteration):
    return lambda run, stage, i, losses: i == iteration


@pytest.mark.parametrize(
    "flags", ["", "--pairs random --no-stop-gradient --warmup .25 --rotation 10"]
)
def test_interrupted_at_many_points_and_resumed_ends_with_the_same_bits(
    main, kill, whole, tmp_path, capsys, flags
):
    flags, folder = flags.split(), tmp_path / "run"
    if flags:
        main(*flags, "--out", "whole")
        whole = tmp_path / "whole"
    kill(common.Run, "watch", at(0), *flags)
    kill(common.Run, "watch", at(1), *flags)
    kill(common.Run, "save", lambda *_, **state: state["iteration"] == 2, *flags)
    kill(common.Run, "watch", at(2), *flags)  # from here on after a checkpoint
    kill(common.Run, "watch", at(3), *flags)
    kill(common, "evaluate", lambda *_: True, *flags)
    kill(common.Run, "save", lambda *_, **state: state["iteration"] == 4, *flags)
    main(*flags, "--out", "run")
    assert "resumed after iteration 2 of 4" in capsys.readouterr().out
    assert same_end(folder, whole)


def test_killed_before_the_report(main, kill, whole, tmp_path):
    kill(common.Run, "finish", lambda *_: True)
    main("--out", "run")
    assert same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--lambda-cap .2", "lambda_cap"),
        ("--alpha 2", "alpha"),
        ("--pairs random", "pairs"),
        ("--distance places", "distance"),
        ("--no-classifier", "classifier"),
        ("--no-mitrans", "mitrans"),
        ("--decoupling hard", "decoupling"),
        ("--labeled-decoupling soft", "labeled_decoupling"),
        ("--masks logits", "masks"),
        ("--no-stop-gradient", "stop_gradient"),
        ("--omega 3", "omega"),
        ("--dec-weight 2", "dec_weight"),
        ("--ramp .2", "ramp"),
        ("--rotation 5", "rotation"),
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


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 4 --pairs random --masks logits",
        "--batch-size 4 --distance places --omega 0",
        "--batch-size 2 --scale .4 .9 --rotation 10 --no-stop-gradient --omega 20 --dec-weight 20 --ramp 0",
    ],
)
def test_two_processes_give_one_processs_losses(main, tmp_path, flags):
    """With SGD: AdamW divides by gradients near zero, which makes rounding visible. With a batch of 2 each process has one labeled picture, whose partner is the other's."""
    flags = [*ONCE[:2], "--optimizer", "sgd", "--lr", "0.005", *flags.split()]
    processes = two_processes(guidedmix, tmp_path, *SHORT, *flags, "--out", "two")
    main(*flags, "--out", "one")
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    one, two = tmp_path / "one", tmp_path / "two"
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and len(ours) == 4 * (
        3 if "--omega 0" in " ".join(flags) else 4
    )
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    first, second = last(one)["models"]["student"], last(two)["models"]["student"]
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)
    for a, b in zip(records(one), records(two)):
        assert {k: v for k, v in a.items() if k.endswith("_miou")} == pytest.approx(
            {k: v for k, v in b.items() if k.endswith("_miou")}, abs=0.5
        )
    assert result_of(one)["miou"] == pytest.approx(result_of(two)["miou"], abs=0.1)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        "--lambda-cap 0",
        "--lambda-cap .6",
        "--lambda-cap -1",
        "--lambda-cap nan",
        "--alpha 0",
        "--omega -1",
        "--dec-weight -2",
        "--dec-weight nan",
        "--warmup -1",
        "--warmup 500",
        "--warmup 1",
        "--warmup .9",
        "--warmup nan",
        "--ramp 2",
        "--rotation -3",
        "--rotation 200",
        "--batch-size 1",
        "--batch-size 0",
        "--lr 0",
        "--head bottleneck",
        "--aspp-branches 2",
        "--alpha 1e9",
    ],
)
def test_a_wrong_value_is_named_before_the_training(error, argv, tmp_path):
    flag, value = argv.split()
    message = error(*argv.split(), *["--lambda-cap", ".1"] * (argv == "--alpha 1e9"))
    assert (
        flag in message
        and (value.lstrip("-0") in message or value == "1e9")
        and not list(tmp_path.iterdir())
    )


def test_one_labeled_picture_has_no_partner(error, main, tmp_path):
    message = error("--labels", 1)
    assert "--labels 1:" in message and "--dec-weight 0" in message and not list(tmp_path.iterdir())
    main("--labels", 1, "--dec-weight", 0, "--iterations", 1, "--out", "run")  # as the message says
    assert terms(tmp_path / "run") == TERMS - {"loss_dec"}
    main("--labels", 1, "--supervised", "--iterations", 1, "--out", "supervised")
    for pairs in ("similar", "random"):
        main(
            "--batch-size",
            1,
            "--dec-weight",
            0,
            "--iterations",
            1,
            "--pairs",
            pairs,
            "--out",
            pairs,
        )
        assert result_of(tmp_path / pairs)["iterations"] == 1


def test_fewer_labels_than_a_batch_are_warned_of(main, capsys):
    main("--labels", 2, "--batch-size", 3, "--iterations", 1, "--out", "run")
    assert "2 labeled pictures, --batch-size 3" in capsys.readouterr().err
    main("--labels", 2, "--batch-size", 3, "--iterations", 1, "--supervised", "--out", "supervised")
    assert "labeled pictures" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, word",
    [
        ("--pairs best", "similar"),
        ("--decoupling none", "hard"),
        ("--masks labels", "probabilities"),
        ("--distance far", "places"),
        ("--network pspnet", "guidedmix"),
        ("--preset best", "leave it out"),
    ],
)
def test_an_unknown_choice_is_refused_with_exit_status_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["guidedmix.py", *SHORT, *argv.split()])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        common.run_main(guidedmix.main)
    text = capsys.readouterr().err
    assert (
        end.value.code == 2
        and text.count("\n") == 1
        and text.startswith("error: ")
        and word in text
    )
