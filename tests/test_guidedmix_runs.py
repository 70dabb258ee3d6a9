"""Whole runs of guidedmix.py: a step by hand, each flag, restarts, processes, and errors."""

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

SHORT = "--labels 4 --iterations 4 --batch-size 2 --crop 33 65".split()
SHORT += "--log-every 1 --save-every 2 --eval-every 100 --warmup 0 --classifier".split()
SHORT += "--pairs similar --omega 1.5 --dec-weight 1 --labeled-decoupling hard".split()
SHORT += "--usup-target decoupled --labeled-stop-gradient --lambda-cap .5".split()
TERMS = {"loss_labeled", "loss_cla", "loss_dec", "loss_usup"}


def start(*argv):
    """guidedmix.py in this process, on few streets."""
    run_on_few_streets(guidedmix, *SHORT, *argv)


def same_bits(a, b):
    return same_checkpoint(a, b, ("models", "optimizer", "scaler", "step", "stage", "iteration"))


def same_end(folder, whole):
    """The same weights, log and numbers, and nothing is left over."""
    assert same_bits(folder, whole) and untimed(folder) == untimed(whole)
    assert result_of(folder) == result_of(whole)
    ours, theirs = ({p.relative_to(x) for p in x.rglob("*")} for x in (folder, whole))
    assert ours == theirs
    return True


# ---- that the work happened ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that nothing disturbs: its folder, and the network before."""
    folder, before, restore = tmp_path_factory.mktemp("whole") / "run", {}, common.Run.restore

    def watch(run, keep):
        before.update(copy.deepcopy(keep["student"].state_dict()))
        return restore(run, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "restore", watch)
        start("--out", folder)
    return folder, before


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
    omegas = [1.5 * math.exp(-5), 1.5, 1.5, 1.5]  # 10 % of 4 iterations are less than one
    assert [r["omega"] for r in log] == pytest.approx(omegas)
    assert all(0 < r["lambda"] < 0.5 for r in log) and len({r["lambda"] for r in log}) == 4
    assert all(0 < r["pseudo_miou"] < 100 and 0 < r["direct_miou"] < 100 for r in log)
    assert any(r["pseudo_miou"] != r["direct_miou"] for r in log)
    student = after["models"]["student"]
    assert list(after["models"]) == list(after["networks"]) == [after["headline"]] == ["student"]
    assert student.keys() == before.keys()
    assert not any(torch.equal(student[key], before[key]) for key in before)


def test_result_is_complete(whole):
    result = strict((whole / "result.json").read_text())
    names = "method dataset labels seed network miou headline per_class paper iterations seconds"
    names += " peak_memory_mb device torch commit"
    assert set(result) >= set(names.split())
    assert list(result["miou"]) == ["student"] and result["headline"] == "student"
    assert result["method"] == result["network"] == "guidedmix" and result["paper"] is None
    assert result["iterations"] == result["labels"] == 4 and len(result["per_class"]) == 10
    known = [x for x in result["per_class"].values() if x is not None]
    assert result["miou"]["student"] == pytest.approx(np.mean(known))
    (val,) = [r["val"] for r in records(whole) if "val" in r]
    assert val == result["miou"]
    pictures = list((whole / "pictures").iterdir())
    names = {"val_000004.png", "batch_000004.png", "losses.png"}
    assert {p.name for p in pictures} == names
    assert all(min(Image.open(picture).size) > 100 for picture in pictures)


def network_of(state):
    network = guidedmix.GuidedMixNet(state["networks"]["student"])
    network.load_state_dict(state["models"]["student"])
    return network


def at_pixels(cells, height, width):
    """Cell c on pixel 2 c, and the border continued."""
    cells = F.pad(cells, (0, 1, 0, 1), mode="replicate")
    size = [2 * side - 1 for side in cells.shape[2:]]
    pixels = F.interpolate(cells, size, mode="bilinear", align_corners=True)
    return pixels[..., :height, :width]


def full_size(logits, height=64, width=128):
    pixels = at_pixels(logits, height, width)
    return F.interpolate(pixels, (64, 128), mode="bilinear", align_corners=False)


def answer(network, id):
    """The classes that the network predicts for a whole picture."""
    image = common.to_float(common.to_tensor(common.draw_street(id)[0]))
    with torch.no_grad():
        return full_size(network.eval()(image[None])).argmax(1)[0].numpy()


def miou_of(table):
    hit = np.diag(table)
    union = table.sum(0) + table.sum(1) - hit
    return 100 * np.mean(hit[union > 0] / union[union > 0])


def printed_miou(text):
    line = next(line for line in text.splitlines() if line.startswith("mIoU"))
    return float(line.split()[1])


def test_the_numbers_are_those_of_the_weights(whole):
    data, network, table = FewStreets(), network_of(last(whole)), np.zeros((10, 10))
    for id in data.val:
        label = data.label(id)
        known = label != 255
        np.add.at(table, (label[known], answer(network, id)[known]), 1)
    assert result_of(whole)["miou"]["student"] == pytest.approx(miou_of(table), abs=0.02)


def test_evaluate_and_predict(main, whole, tmp_path, capsys):
    main("--evaluate", "--checkpoint", whole / "last.pt")
    miou = printed_miou(capsys.readouterr().out)
    assert miou == round(result_of(whole)["miou"]["student"], 2)
    Image.fromarray(common.draw_street("train_0000")[0]).save(tmp_path / "street.png")
    main("--predict", "street.png", "--checkpoint", whole, "--out", "out")
    expected = answer(network_of(last(whole)), "train_0000")
    assert (np.asarray(Image.open("out/street.png")) == expected).mean() > 0.999


def test_several_scales_and_flip_are_the_mean_of_the_probabilities(main, whole, capsys):
    main("--evaluate", "--checkpoint", whole, "--scales", ".5", "1", "1.5", "--flip")
    miou = printed_miou(capsys.readouterr().out)
    data, network, table = FewStreets(), network_of(last(whole)).eval(), np.zeros((10, 10))
    for id in data.val:
        image = common.to_float(common.to_tensor(data.image(id)))[None]
        total = 0
        for size in ((32, 64), (64, 128), (96, 192)):
            x = F.interpolate(image, size, mode="bilinear", align_corners=False)
            with torch.no_grad():
                parts = network(x), network(x.flip(-1))
            prob, mirrored = (full_size(part, *size).softmax(1) for part in parts)
            total = total + prob + mirrored.flip(-1)
        np.add.at(table, (data.label(id), total.argmax(1)[0].numpy()), 1)
    assert miou == pytest.approx(miou_of(table), abs=0.02)


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
    for ours, theirs in zip(records(folder), records(whole)):
        if "lr" in ours:
            assert ours["pseudo_miou"] != theirs["pseudo_miou"]  # the log did see other masks


def test_without_known_labeled_pixels_their_loss_is_zero(main, whole, tmp_path, monkeypatch):
    all_masks_are(255, strict((whole / "args.json").read_text())["labeled"], monkeypatch)
    main("--out", "run")
    assert terms(tmp_path / "run") == TERMS
    for (_, _, name), value in losses(tmp_path / "run").items():
        assert (value == 0) == (name == "loss_labeled")


# ---- a step by hand ------------------------------------------------------------------------------

SETTINGS = [
    "",
    "--decoupling hard --labeled-decoupling soft --dec-weight 3",
    "--pairs random",
    "--masks logits",
    "--masks softmax",
    "--usup-target none",
    "--usup-target direct",
    "--no-labeled-stop-gradient",
    "--distance places --scale .4 .6",
    "--pairs random --scale .4 .6 --labeled-decoupling soft",
    "--no-classifier --omega 0",
    "--dec-weight 0",
]


def squared_error(a, b, valid, masks):
    """The sum over valid pixels of two masks (K, 17, 33), and their number."""
    if masks == "softmax":
        a, b = a.softmax(0), b.softmax(0)
    valid = torch.stack([row[::2] for row in valid[::2]])
    return ((a - b).square().sum(0) * valid).sum(), int(valid.sum())


def losses_by_hand(args, network, labeled, unlabeled):
    """The loss terms of the first step, from the formulas of the paper, picture by picture."""
    B = len(labeled)
    x_l, x_u = ([part["image"].float() / 255 for part in kind] for kind in (labeled, unlabeled))
    v_l, v_u = (network(torch.stack(kind), aux=True)[1] for kind in (x_l, x_u))

    def mask(x):
        logits = network(x[None])[0]
        return logits.softmax(0) if args.masks == "probabilities" else logits

    def target(m, stop):
        return m.detach() if stop else m

    def distance(a, b):
        if args.distance == "pooled":
            a, b = a.mean((1, 2)), b.mean((1, 2))
        return float((a - b).detach().square().sum().sqrt())

    found = {"loss_labeled": 0, "loss_cla": 0, "loss_usup": 0, "loss_dec": 0}
    known = sum(int((part["label"] != 255).sum()) for part in labeled)
    for x, part in zip(x_l, labeled):
        logits = at_pixels(network(x[None]), 33, 65)
        label = part["label"][None].long()
        sum_of_pixels = F.cross_entropy(logits, label, ignore_index=255, reduction="sum")
        found["loss_labeled"] = found["loss_labeled"] + sum_of_pixels / known
    if args.classifier:
        for b in range(B):
            prob = network.presence(v_l[b].mean((1, 2))).sigmoid()
            for k in range(10):
                p = prob[k] if k in labeled[b]["label"] else 1 - prob[k]
                found["loss_cla"] = found["loss_cla"] - p.log() / (B * 10)

    m_l, m_u = [mask(x) for x in x_l], [mask(x) for x in x_u]
    lam = guidedmix.sample_lambda(1.0, 0.5, common.rng(0, "lambda", 0))
    lam_l = guidedmix.sample_lambda(1.0, 0.5, common.rng(0, "lambda labeled", 0))
    counts = {"loss_usup": 0, "loss_dec": 0}
    for i in range(B):
        if args.pairs == "similar":
            j = min(range(B), key=lambda j: distance(v_u[i], v_l[j]))
            others = [k for k in range(B) if k != i]
            k = min(others, key=lambda k: distance(v_l[i], v_l[k]))
        else:
            j = (i + common.rng(0, "pair", False, i).randint(B)) % B
            k = (i + common.rng(0, "pair", True, i).randint(1, B)) % B
            assert k != i
        part = lam if args.decoupling == "soft" else 1
        blend = mask(lam * x_l[j] + (1 - lam) * x_u[i])
        direct = args.usup_target == "direct"
        m_dec = blend - part * target(m_l[j], direct)
        m_dec = target(m_dec, args.usup_target == "decoupled")
        valid = unlabeled[i]["valid"] & labeled[j]["valid"]
        error, count = squared_error(m_dec, target(m_u[i], direct), valid, args.masks)
        found["loss_usup"] = found["loss_usup"] + error
        counts["loss_usup"] += count
        part = lam_l if args.labeled_decoupling == "soft" else 1
        stop = args.labeled_stop_gradient
        m_dec = mask(lam_l * x_l[i] + (1 - lam_l) * x_l[k]) - part * target(m_l[i], stop)
        valid = labeled[k]["valid"] & labeled[i]["valid"]
        error, count = squared_error(m_dec, target(m_l[k], stop), valid, args.masks)
        found["loss_dec"] = found["loss_dec"] + error
        counts["loss_dec"] += count
    for name, used in (("loss_usup", args.omega), ("loss_dec", args.dec_weight)):
        found[name] = found[name] / counts[name] if used else 0
    found = {name: value for name, value in found.items() if torch.is_tensor(value)}
    return found, counts


@pytest.mark.parametrize("flags", SETTINGS)
def test_the_first_step_by_hand(main, tmp_path, flags):
    """Losses, and the weights after a step of SGD; the ramp-up of omega is at exp(-5)."""
    argv = [*SHORT, *"--iterations 1 --batch-size 3 --optimizer sgd --lr .05 --omega 60".split()]
    argv += flags.split()
    main(*argv, "--out", "run")
    folder = tmp_path / "run"
    names = strict((folder / "args.json").read_text())
    args = common.parse_args(guidedmix.get_parser(), guidedmix.PAPER, argv)
    data, device = FewStreets(), torch.device("cpu")
    present = 10 if args.classifier else 0
    make = dict(make=guidedmix.GuidedMixNet, mitrans=True, present=present)
    network = common.build_network(args, data, device, **make).train()
    weights = copy.deepcopy(network.state_dict())
    streams = [
        common.Stream(data, names[kind], kind, args, labeled=kind == "labeled")
        for kind in ("labeled", "unlabeled")
    ]
    expected, counts = losses_by_hand(args, network, *([s[p] for p in range(3)] for s in streams))
    if ".4" in flags:
        assert counts["loss_usup"] < 3 * 17 * 33  # padding counts for nothing
    found = {name: value for (_, _, name), value in losses(folder).items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-4), name

    weight = {"loss_dec": args.dec_weight, "loss_usup": args.omega * math.exp(-5)}
    sum(weight.get(name, 1) * value for name, value in expected.items()).backward()
    for name, p in network.named_parameters():
        after = weights[name] - 0.05 * (p.grad + args.weight_decay * weights[name])
        ours = last(folder)["models"]["student"][name]
        torch.testing.assert_close(ours, after, atol=2e-6, rtol=1e-4)


# ---- every flag does its work --------------------------------------------------------------------

ONCE = ["--save-every", "100", "--out", "run"]  # at the end alone: for runs that nothing disturbs


@pytest.fixture
def variant(main, whole, tmp_path):
    """variant("--flag ..", "loss_dec", ..): a run with these flags. In the first iteration the
    terms so named changed and the others did not; later all did."""

    def go(flags, *changed):
        main(*ONCE, *flags.split())
        ours, theirs = losses(tmp_path / "run"), losses(whole)
        assert np.isfinite(list(ours.values())).all()
        for (_, iteration, name), value in ours.items():
            differs = value != theirs[1, iteration, name]
            assert differs == (iteration > 1 or name in changed), (iteration, name)
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
        ("--masks softmax", ["loss_dec", "loss_usup"]),
        ("--usup-target none", []),
        ("--usup-target direct", []),
        ("--no-labeled-stop-gradient", []),
        ("--dec-weight 5", []),
        ("--omega 50", []),
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
    assert terms(folder) == TERMS - {gone}
    classifier = "presence.weight" in last(folder)["models"]["student"]
    assert classifier == (gone != "loss_cla")
    for record in records(folder):
        if "lr" in record:
            for name in ("pseudo_miou", "direct_miou", "omega", "lambda"):
                assert (name in record) == (gone != "loss_usup")


def test_a_term_that_is_left_out_costs_no_pass(main, monkeypatch):
    passes, forward = [], guidedmix.GuidedMixNet.forward

    def watch(network, image, aux=False):
        if network.training:
            passes.append((len(image), torch.is_grad_enabled()))
        return forward(network, image, aux)

    monkeypatch.setattr(guidedmix.GuidedMixNet, "forward", watch)
    for flags, expected in (
        ([], [(4, True), (2, False), (2, True)]),
        (["--omega", 0], [(2, True), (2, True)]),
        (["--dec-weight", 0], [(4, True), (2, False)]),
        (["--usup-target", "none"], [(4, True), (2, True), (2, True)]),
        (["--supervised"], [(2, True)]),
    ):
        passes.clear()
        main(*ONCE, "--overwrite", "--iterations", 1, *flags)
        assert passes == expected, flags


def test_without_mitrans(main, whole, tmp_path):
    main(*ONCE, "--no-mitrans")
    names = last(tmp_path / "run")["models"]["student"].keys()
    assert names == {name for name in last(whole)["models"]["student"] if "non_local" not in name}
    assert terms(tmp_path / "run") == TERMS
    main("--evaluate", "--checkpoint", "run")


def test_distances_place_by_place(main, monkeypatch):
    shapes, distances = [], guidedmix.distances

    def watch(a, b):
        shapes.append((a.shape, b.shape))
        return distances(a, b)

    monkeypatch.setattr(guidedmix, "distances", watch)
    main(*ONCE, "--distance", "places")
    features = 2, 64 * 5 * 9
    assert shapes == 8 * [(features, features)]  # for L_usup and L_dec
    main(*ONCE, "--overwrite", "--pairs", "random")
    assert len(shapes) == 8


def test_rotation(main, whole, tmp_path):
    main(*ONCE, "--rotation", 10)
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    assert all(ours[key] != theirs[key] for key in theirs)


def test_warmup_is_on_labels_alone_then_omega_rises(main, tmp_path):
    main(*ONCE, "--iterations", 8, "--warmup", 2, "--ramp", 0.5, "--log-every", 3)
    start(*ONCE[:2], "--iterations", 8, "--supervised", "--log-every", 2, "--out", "supervised")
    folder = tmp_path / "run"
    expected = {(2, "loss_labeled"), (2, "loss_cla")}
    expected |= {(iteration, name) for iteration in (3, 6, 8) for name in TERMS}
    assert {key[1:] for key in losses(folder)} == expected
    warmup, *others = [r for r in records(folder) if "lr" in r]
    assert "omega" not in warmup
    omegas = [1.5 * math.exp(-5 * (1 - t / 4) ** 2) for t in (0, 3, 4)]
    assert [r["omega"] for r in others] == pytest.approx(omegas)
    ours = losses(folder)[1, 2, "loss_labeled"]  # the classifier moves the encoder a little
    theirs = losses(tmp_path / "supervised")[1, 2, "loss_labeled"]
    assert ours == pytest.approx(theirs, rel=0.1)


def test_supervised_is_the_same_network_with_the_same_weak_views_and_steps(main, whole, tmp_path):
    main(*ONCE, "--supervised")
    folder = tmp_path / "run"
    result = result_of(folder)
    assert result["method"] == "guidedmix-supervised" and result["iterations"] == 4
    assert terms(folder) == {"loss_labeled"} and len(losses(folder)) == 4
    names = {name for name in last(whole)["models"]["student"] if "presence" not in name}
    assert last(folder)["models"]["student"].keys() == names
    ours, theirs = (losses(x)[1, 1, "loss_labeled"] for x in (folder, whole))
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = ([r["lr"] for r in records(x) if "lr" in r] for x in (folder, whole))
    assert ours == theirs
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
        "--pairs random --usup-target none --masks logits --lr 1e-4",
        "--rotation 10 --workers 1",
        "--crop 32 64",
        "--crop 50 61",
    ],
)
def test_other_settings(main, tmp_path, flags):
    main(*ONCE, *flags.split())
    values = list(losses(tmp_path / "run").values())
    assert terms(tmp_path / "run") == TERMS and np.isfinite(values).all() and min(values) > 0


def test_weights_of_another_run(main, whole, tmp_path, capsys):
    main(*ONCE, "--weights", whole / "last.pt", "--iterations", 1)
    assert "missing 0" in capsys.readouterr().out
    assert losses(tmp_path / "run")[1, 1, "loss_labeled"] < losses(whole)[1, 1, "loss_labeled"]


# ---- nothing is lost -----------------------------------------------------------------------------


def at(iteration):
    return lambda run, i, *rest, **more: i == iteration


@pytest.mark.parametrize(
    "flags", ["", "--pairs random --usup-target direct --warmup 3 --rotation 10"]
)
def test_interrupted_at_many_points_and_resumed_ends_with_the_same_bits(
    main, kill, whole, tmp_path, capsys, flags
):
    """With a warm-up of three iterations, the checkpoint after the second is within it."""
    flags, folder = flags.split(), tmp_path / "run"
    if flags:
        main(*flags, "--out", "whole")
        whole = tmp_path / "whole"
    kill(common.Run, "step", at(0), *flags)
    kill(common.Run, "step", at(1), *flags)
    kill(common.Run, "save", at(1), *flags)
    kill(common.Run, "step", at(2), *flags)  # from here on after a checkpoint
    kill(common.Run, "step", at(3), *flags)
    kill(common, "evaluate", lambda *_: True, *flags)
    kill(common.Run, "save", at(3), *flags)
    main(*flags, "--out", "run")
    assert "resumed after iteration 2 of 4" in capsys.readouterr().out
    assert same_end(folder, whole)


def test_resumed_after_the_warmup(main, kill, tmp_path):
    flags = ["--warmup", 1]
    main(*flags, "--out", "whole")
    kill(common.Run, "step", at(2), *flags)
    main(*flags, "--out", "run")
    assert same_end(tmp_path / "run", tmp_path / "whole")


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
        ("--usup-target none", "usup_target"),
        ("--no-labeled-stop-gradient", "labeled_stop_gradient"),
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


# ---- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 4 --pairs random --masks logits",
        "--batch-size 4 --distance places --omega 0",
        "--batch-size 2 --scale .4 .9 --rotation 10 --usup-target none --no-labeled-stop-gradient "
        "--omega 20 --dec-weight 20 --ramp 0",
    ],
)
def test_two_processes_give_one_processs_losses(main, tmp_path, flags):
    """With SGD: AdamW divides by gradients near zero, which makes rounding visible. With a batch of
    2 each process has one labeled picture, whose partner is that of the other process."""
    flags = [*ONCE[:2], "--optimizer", "sgd", "--lr", "0.005", *flags.split()]
    processes = two_processes(guidedmix, tmp_path, *SHORT, *flags, "--out", "two")
    main(*flags, "--out", "one")
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    one, two = tmp_path / "one", tmp_path / "two"
    ours, theirs = losses(two), losses(one)
    without = "--omega 0" in " ".join(flags)
    assert ours.keys() == theirs.keys() and len(ours) == 4 * (3 if without else 4)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    first, second = last(one)["models"]["student"], last(two)["models"]["student"]
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)
    for a, b in zip(records(one), records(two)):
        ours, theirs = ({k: v for k, v in r.items() if k.endswith("_miou")} for r in (a, b))
        assert ours == pytest.approx(theirs, abs=0.5)
    assert result_of(one)["miou"] == pytest.approx(result_of(two)["miou"], abs=0.1)


# ---- errors --------------------------------------------------------------------------------------


WRONG = """--lambda-cap 0, --lambda-cap .6, --lambda-cap -1, --lambda-cap nan, --alpha 0,
--omega -1, --dec-weight -2, --dec-weight nan, --warmup -1, --warmup 500, --warmup 4, --warmup .9,
--warmup nan, --ramp 2, --rotation -3, --rotation 200, --batch-size 1, --batch-size 0, --lr 0,
--head bottleneck, --aspp-branches 2, --alpha 1e9"""


@pytest.mark.parametrize("argv", WRONG.replace("\n", " ").split(", "))
def test_a_wrong_value_is_named_before_the_training(error, argv, tmp_path):
    flag, value = argv.split()
    value = "1000000000" if value == "1e9" else value.lstrip("-0")
    message = error(*argv.split(), *["--lambda-cap", ".1"] * (flag == "--alpha"))
    assert flag in message and value in message and not list(tmp_path.iterdir())


def test_one_labeled_picture_has_no_partner(error, main, tmp_path):
    message = error("--labels", 1)
    assert "--labels 1 " in message and "--dec-weight 0" in message
    assert not list(tmp_path.iterdir())
    main("--labels", 1, "--dec-weight", 0, "--iterations", 1, "--out", "run")  # as the message says
    assert terms(tmp_path / "run") == TERMS - {"loss_dec"}
    main("--labels", 1, "--supervised", "--iterations", 1, "--out", "supervised")
    alone = ["--batch-size", 1, "--dec-weight", 0, "--iterations", 1]
    for pairs in ("similar", "random"):
        main(*alone, "--pairs", pairs, "--out", pairs)
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
    assert end.value.code == 2 and text.count("\n") == 1
    assert text.startswith("error: ") and word in text
