"""Each equation of the paper against a naive loop, and the perturbations by content."""

import copy
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet

import common
import rml
from helpers import run_on_few_streets

K, C = 5, 7
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_args(*argv):
    args = common.parse_args(rml.get_parser(), rml.PAPER, list(argv))
    args.rectify = True
    return args


# ---- losses --------------------------------------------------------------------------------------


def test_eq_1_cross_entropy_is_the_mean_over_valid_pixels():
    logits, label = torch.randn(2, K, 3, 4), torch.randint(K, (2, 3, 4))
    label[0, 1] = 255
    total, count = 0.0, 0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                if label[b, y, x] != 255:
                    z = logits[b, :, y, x].double()
                    total -= float(z[label[b, y, x]] - torch.log(torch.exp(z).sum()))
                    count += 1
    assert rml.cross_entropy(logits.log_softmax(1), label).item() == pytest.approx(
        total / count, abs=1e-6
    )


def test_all_ignored_gives_loss_0_and_gradient_0():
    logits = torch.randn(1, K, 3, 4, requires_grad=True)
    loss = rml.cross_entropy(logits.log_softmax(1), torch.full((1, 3, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_the_mean_of_the_processes_losses_is_the_loss_of_the_whole_batch(monkeypatch):
    log_p, label = torch.randn(2, K, 3, 4).log_softmax(1), torch.randint(K, (2, 3, 4))
    label[0, :2] = 255  # the two processes have different numbers of valid pixels
    whole = rml.cross_entropy(log_p, label)
    valid = (label != 255).sum()
    monkeypatch.setattr(common, "all_reduce", lambda count: valid)
    monkeypatch.setattr(common, "world_size", lambda: 2)
    assert (
        rml.cross_entropy(log_p[:1], label[:1]) + rml.cross_entropy(log_p[1:], label[1:])
    ) / 2 == pytest.approx(whole.item(), abs=1e-6)


# ---- pseudo-labels -------------------------------------------------------------------------------


def test_eq_2_and_4_hard_label_with_threshold():
    p, valid = torch.randn(2, K, 6, 8).mul(2).softmax(1), torch.rand(2, 6, 8) > 0.2
    label = rml.hard_label(p, valid, threshold=0.5)
    for b in range(2):
        for y in range(6):
            for x in range(8):
                best = max(range(K), key=lambda k: p[b, k, y, x])
                expected = best if valid[b, y, x] and p[b, best, y, x] > 0.5 else 255
                assert label[b, y, x] == expected
    assert {255} < set(label.flatten().tolist())
    free = rml.hard_label(p, valid)
    assert torch.equal(free == 255, ~valid)
    assert torch.equal(free[valid], p.argmax(1)[valid])


def test_a_pixel_without_any_probability_is_unknown():
    p = torch.tensor([[0.7, 0.3], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)
    assert rml.hard_label(p, torch.ones(1, 1, 2, dtype=torch.bool)).tolist() == [[[0, 255]]]


def naive_rectify(features, p0, prototypes, seen):
    B, _, h, w = features.shape
    out = torch.zeros_like(p0)
    for b in range(B):
        for y in range(h):
            for x in range(w):
                distance = [
                    math.sqrt(
                        sum(float(features[b, c, y, x] - prototypes[k, c]) ** 2 for c in range(C))
                    )
                    for k in range(K)
                ]
                weight = [math.exp(-distance[k]) if seen[k] else 0.0 for k in range(K)]
                p = [
                    (weight[k] / sum(weight) if any(seen) else 1 / K) * float(p0[b, k, y, x])
                    for k in range(K)
                ]
                for k in range(K):
                    out[b, k, y, x] = p[k] / sum(p)
    return out


@pytest.mark.parametrize("seen", [[True] * K, [True, False, True, True, False], [False] * K])
def test_eq_6_and_9_rectification(seen):
    features, p0, prototypes = (
        torch.randn(2, C, 3, 4),
        torch.randn(2, K, 3, 4).softmax(1),
        torch.randn(K, C),
    )
    eta = prototypes.where(torch.tensor(seen)[:, None], torch.inf)
    ours = rml.rectify(features, p0, eta)
    assert torch.allclose(ours, naive_rectify(features, p0, prototypes, seen), atol=1e-6)


def test_rectification_changes_a_label_towards_the_nearer_prototype():
    prototypes = torch.eye(2) * 5
    p0 = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
    near_class_1 = torch.tensor([0.0, 5.0]).view(1, 2, 1, 1)
    assert rml.rectify(near_class_1, p0, prototypes).argmax(1).item() == 1


def test_eq_11_prototypes_move_by_the_batch_mean_of_each_class():
    prototypes, seen = torch.randn(K, C), torch.tensor([True, True, True, False, False])
    features, logits = torch.randn(3, C, 4, 4), torch.randn(3, K, 4, 4)
    logits[:, 0] = logits[:, 4] = -9.0  # classes 0 and 4 are absent from the batch
    expected, prediction = prototypes.clone(), logits.argmax(1)
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[1, :, 2:] = False  # padding: the right half of the second picture
    prediction[1, :, 2:] = K
    for k in range(K):
        cells = [
            features[b, :, y, x]
            for b in range(3)
            for y in range(4)
            for x in range(4)
            if prediction[b, y, x] == k
        ]
        if cells:
            mean = sum(cells) / len(cells)
            expected[k] = 0.9 * prototypes[k] + 0.1 * mean if seen[k] else mean
    eta = prototypes.where(seen[:, None], torch.inf)
    moved = rml.update_prototypes(eta, features, logits, valid, 0.9)
    assert torch.allclose(moved[:4], expected[:4], atol=1e-6)
    assert (moved[4] == torch.inf).all()  # never seen


class StubData:
    """Four pictures whose red channel says the class of each 8 x 8 cell."""

    names, classes = list("abc"), dict.fromkeys("abc", (0, 0, 0))

    def image(self, id):
        cells = np.random.RandomState(int(id)).choice(3, (4, 6), p=[0.7, 0.28, 0.02])
        return np.kron(cells, np.ones((8, 8)))[..., None].repeat(3, 2).astype(np.uint8)


class StubNetwork:
    """Features: class and position; logits: one-hot of the class."""

    feature_channels, stride, cell, align_corners = 3, 8, 8, True

    def eval(self):
        return self

    def features(self, image):
        cells = (image[:, :1, ::8, ::8] * 255).round()
        position = torch.arange(24.0).view(1, 1, 4, 6).expand_as(cells)
        return torch.cat([cells, position, cells * position], 1)

    def classifier(self, features):
        return F.one_hot(features[:, 0].long(), 3).permute(0, 3, 1, 2).float()


def test_eq_10_prototypes_are_means_over_pictures_of_class_means(tmp_path):
    data, network = StubData(), StubNetwork()
    args = SimpleNamespace(prototype_min_cells=3, precision="fp32", cell=8, rectify=True)
    found = rml.start_stage([network], [tmp_path], data, ["1", "2"], ["3", "4"], args, CPU)
    prototypes = found[0]
    seen = prototypes.isfinite().all(1)
    for k in range(3):
        means = []
        for id in "1234":
            f = network.features(
                torch.from_numpy(data.image(id).transpose(2, 0, 1))[None].float() / 255
            )[0]
            cells = [f[:, y, x] for y in range(4) for x in range(6) if f[0, y, x] == k]
            if len(cells) >= 3:
                means.append(sum(cells) / len(cells))
        assert bool(seen[k]) == bool(means)
        if means:
            assert torch.allclose(prototypes[k], sum(means) / len(means), atol=1e-4)
    assert seen.tolist() == [True, True, False]  # class 2 never has 3 cells
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "3.npy",
        "4.npy",
    ]  # p^0 of unlabeled pictures only
    expected = network.classifier(
        network.features(torch.from_numpy(data.image("3").transpose(2, 0, 1))[None].float() / 255)
    ).softmax(1)[0]
    assert np.allclose(np.load(tmp_path / "3.npy"), expected, atol=1e-3)


# ---- who learns from whom ------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--mutual", "none"], {"1_from_1", "2_from_2"}),
        (["--mutual", "mean-teacher"], {"1_from_1", "2_from_2"}),
        (["--mutual", "direct"], {"1_from_2", "2_from_1"}),  # Eq. 3
        (["--mutual", "peer"], {"1_from_2", "2_from_1"}),
        (["--no-rectify"], {"1_from_1", "1_from_2", "2_from_1", "2_from_2"}),  # Eq. 5
        ([], {"1_from_1", "1_from_2", "2_from_1", "2_from_2"}),
    ],
)
def test_eqs_3_and_5_each_student_learns_from_the_right_labels(
    flags, expected, tmp_path, monkeypatch
):
    """Model 1 labels every pixel as class 1, model 2 as class 2; the losses record their labels."""
    length = ["--stage0-iterations", "0", "--iterations", "1", "--stages", "1"]
    made, terms = [], []

    def label_of_model(prob, valid, threshold=0.0):
        made.append(len(made) + 1)
        return torch.full(valid.shape, made[-1])

    def recorded(log_prob, label):
        terms.append(sorted(set(label.flatten().tolist())))
        return log_prob.sum() * 0

    def step(run, iteration, losses, *_, **__):
        assert all(not loss.isnan() for loss in losses.values())
        terms.append(list(losses))
        raise Stop

    monkeypatch.setattr(rml, "hard_label", label_of_model)
    monkeypatch.setattr(rml, "cross_entropy", recorded)
    monkeypatch.setattr(common.Run, "step", step)
    with pytest.raises(Stop):
        run_on_few_streets(rml, *flags, *length, "--labels", "4", "--out", tmp_path)
    names = [name.removeprefix("loss_pseudo_") for name in terms.pop() if "pseudo" in name]
    assert set(names) == expected
    pseudo = [labels for labels in terms if labels in ([1], [2])]
    assert pseudo == [[int(name[-1])] for name in names]  # a term's name says whose labels it has


@pytest.mark.parametrize("mutual", rml.MUTUAL)
def test_the_peer_comes_first(mutual):
    _, learns_from = rml.MUTUAL[mutual]
    for j, models in enumerate(learns_from):
        assert models[0] == 1 - j or models == [j]


# ---- perturbations and EMA -----------------------------------------------------------------------


def test_photometric_operations_follow_the_table():
    image = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8)
    results = [[operation(image, v) for v in range(1, 10)] for operation in rml.PHOTOMETRIC]
    assert len(rml.PHOTOMETRIC) == 9
    for levels in results:
        assert all(r.shape == image.shape and r.dtype == torch.uint8 for r in levels)
    assert torch.equal(results[0][4], image)
    posterize = next(
        i for i, levels in enumerate(results) if torch.equal(levels[0], image & 0b11110000)
    )
    assert torch.equal(results[posterize][8], image & 0b11111110)  # 4 to 7 bits
    solarize = image.where(image < 256 - int(25.6 * 9), 255 - image)
    assert any(torch.equal(levels[8], solarize) for levels in results)
    dark = next(
        levels
        for levels in results
        if torch.equal(levels[0], (image.float() * 0.14).to(torch.uint8))
    )  # brightness .09 v + .05
    assert torch.equal(dark[8], (image.float() * 0.86).to(torch.uint8))


@pytest.mark.parametrize("factor", [0.14, 0.5, 0.86])
def test_sharpness_is_that_of_torchvision(factor):
    image = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8)
    ours = common.sharpness(image, factor).int()
    theirs = rml.V.adjust_sharpness(image, factor).int()
    # They differ by rounding.
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.01
    assert torch.equal(common.sharpness(image, 1.0), image)
    thin = image[:, :2]
    assert torch.equal(common.sharpness(thin, factor), thin)


def test_photometric_draws_two_operations_each_with_probability_half():
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)

    def strong(*keys):
        return rml.photometric(image, [(0, 8, 0, 8)], [common.rng(*keys)])

    same = sum(torch.equal(strong("test", i), image) for i in range(400))
    # Unchanged: both skipped, or the identity drawn: (1/2 + 1/2 * 1/9) ** 2 = .309; no-ops add.
    assert 400 * 0.23 < same < 400 * 0.42
    assert torch.equal(strong("a"), strong("a"))


def test_padding_is_neither_changed_nor_counted_by_photometric_operations():
    """A padded picture becomes what the picture alone becomes, within untouched padding."""
    whole = torch.randint(60, 140, (1, 3, 12, 15), dtype=torch.uint8)
    padded = torch.empty(1, 3, 20, 20, dtype=torch.uint8)
    padded[:] = torch.tensor(common.MEAN_COLOR, dtype=torch.uint8)[:, None, None]
    padded[:, :, :12, 5:] = whole  # padding below, and to the left after a flip
    before = padded.clone()
    changed = 0
    for i in range(100):
        alone = rml.photometric(whole, [(0, 12, 0, 15)], [common.rng("pad", i)])
        strong = rml.photometric(padded, [(0, 12, 5, 20)], [common.rng("pad", i)])
        assert torch.equal(strong[:, :, :12, 5:], alone)
        assert torch.equal(strong[:, :, 12:], before[:, :, 12:])
        assert torch.equal(strong[:, :, :, :5], before[:, :, :, :5])
        changed += not torch.equal(alone, whole)
    assert changed > 40
    assert torch.equal(padded, before)


def test_the_boxes_of_weak_views_lie_around_what_is_valid():
    """Crops that reach beyond the scaled picture; some are flipped."""
    args = small_args("--crop", "100", "90", "--scale", "0.5", "1.5", "--batch-size", "16")
    args.size = None
    stream = common.Stream(common.Streets(), ["train_0000", "train_0001"], "u", args)
    batch = next(common.batches(stream, args, CPU, 0, 1))
    for (top, bottom, left, right), valid in zip(batch["inside"], batch["valid"]):
        inside = torch.zeros_like(valid)
        inside[top:bottom, left:right] = True
        assert torch.equal(inside, valid)
    assert len({tuple(box) for box in batch["inside"]}) > 4
    assert any(left > 0 for _, _, left, _ in batch["inside"])  # flipped
    assert any(bottom < 100 for _, bottom, _, _ in batch["inside"])


def test_cutmix_box_has_half_the_area_and_lies_anywhere():
    masks = torch.stack([rml.cutmix_mask((64, 128), common.rng("mask", i)) for i in range(300)])
    area = masks.float().mean((1, 2))
    assert area.min() > 0.48
    assert area.max() < 0.52
    for mask in masks[:50]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one box
        assert 32 <= len(rows) <= 64
        assert 64 <= len(columns) <= 128
    assert masks[:, 4:60, 8:120].any(0).all()  # the very corners are rare
    height = masks.any(2).sum(1).double() / 64
    assert height.log().mean() == pytest.approx(math.log(0.5) / 2, abs=0.06)  # h = exp(u ln .5)


def tiny():
    return common.make_network(
        dict(
            backbone="tiny",
            head="bottleneck",
            aspp_branches=4,
            batch_norm="frozen",
            style="torchvision",
            classes=K,
        )
    )


def test_model_noise_is_in_training_mode_only_and_has_no_parameters():
    network, x = tiny(), torch.rand(2, 3, 32, 64)
    keys, before = list(network.state_dict()), network.eval()(x)
    rml.add_model_noise(network, 0.5, 0.2)
    assert list(network.state_dict()) == keys
    assert torch.equal(network.eval()(x), before)
    network.train()
    assert not torch.equal(network(x), network(x))
    assert drop_shares(network) == [0.2] * 8
    assert network.dropout.p == 0.5
    network = tiny()
    rml.add_model_noise(network, 0.5, 0.2, linear=True)
    assert drop_shares(network) == pytest.approx([0.2 * i / 8 for i in range(1, 9)])


def drop_shares(network):
    return [module.p for module in network.modules() if isinstance(module, rml.StochasticDepth)]


@pytest.mark.parametrize(
    "block",
    [
        partial(resnet.BasicBlock, 8, 8),
        partial(resnet.BasicBlock, 8, 8, norm_layer=common.FrozenBatchNorm),
        partial(resnet.Bottleneck, 8, 2),
        partial(resnet.Bottleneck, 8, 2, norm_layer=common.FrozenBatchNorm),
    ],
)
def test_a_dropped_residual_branch_leaves_the_shortcut(block):
    torch.manual_seed(0)  # other weights could end in zeros everywhere
    x = torch.rand(1, 8, 4, 4)
    network = torch.nn.Sequential(block())
    rml.add_model_noise(network, 0.0, 1.0)
    assert torch.equal(network.train()(x), x)  # the shortcut is x, at least 0
    assert not torch.equal(network.eval()(x), x)


def test_ema_is_a_weighted_mean_and_copies_buffers():
    student = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    teacher = copy.deepcopy(student).requires_grad_(False)
    for p in student.parameters():
        torch.nn.init.normal_(p)
    before = [p.clone() for p in teacher.parameters()]
    student(torch.randn(4, 2, 3, 3))
    rml.update_teachers([teacher], [student], 0.9)
    for old, new, p in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-6)
        assert not new.requires_grad
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)
    assert teacher[1].running_mean.abs().sum() > 0
    rml.update_teachers([teacher], [student], 0.0)
    assert all(map(torch.equal, teacher.parameters(), student.parameters()))  # a copy


def test_paper_table_fills_the_arguments():
    args = small_args("--dataset", "cityscapes")
    assert (args.lr, args.iterations, args.batch_size, tuple(args.crop), tuple(args.size)) == (
        1e-4,
        90_000,
        4,
        (256, 512),
        (512, 1024),
    )
    assert (args.dropout, args.drop_path, args.prototype_decay, args.stages) == (
        0.5,
        0.2,
        0.9999,
        2,
    )
    assert small_args("--dataset", "cityscapes", "--lr", "3").lr == 3


# ---- the paper's tables --------------------------------------------------------------------------

CITY, VOC = ["--dataset", "cityscapes"], ["--dataset", "voc"]
IML = ["--stages", "1", "--no-rectify"]
CLEAN = ["--no-photometric", "--no-cutmix"]
STILL = ["--dropout", "0", "--drop-path", "0"]
TABLES = {
    "Table 1, Deeplabv2": ([*CITY, "--supervised"], {100: 45.40, 372: 56.08, 744: 60.91}),
    "Table 1, Ours": (CITY, {100: 58.25, 372: 63.97, 744: 66.15}),
    "Table 2, Deeplabv2": (
        [*VOC, "--supervised"],
        {106: 36.25, 212: 46.30, 529: 55.92, 1323: 63.73},
    ),
    "Table 2, Deeplabv2, Full": (["--dataset", "vocaug", "--supervised"], {10582: 72.62}),
    "Table 2, Ours": (VOC, {106: 53.77, 212: 64.63, 529: 68.82, 1323: 70.34}),
    "Table 3, Ours": (
        [*VOC, "--weights", "coco"],
        {106: 63.60, 212: 68.66, 529: 71.19, 1323: 73.38},
    ),
    "Table 4, supervised baseline": ([*CITY, "--supervised"], {372: 56.03}),
    "Table 4, IML": ([*CITY, *IML, *CLEAN, *STILL], {372: 60.09}),
    "Table 4, IML (+ model noises)": ([*CITY, *IML, *CLEAN], {372: 60.51}),
    "Table 4, IML (+ input noises)": ([*CITY, *IML, *STILL], {372: 60.49}),
    "Table 4, IML (+ full noises)": ([*CITY, *IML], {372: 61.25}),
    "Table 4, RML": ([*CITY, "--stages", "1"], {372: 62.85}),
    "Table 4, RML (two stages)": ([*CITY, "--stages", "2"], {372: 63.65}),
    "Table 5, Deeplabv2 baseline": ([*CITY, "--supervised", "--stages", "1"], {372: 54.52}),
    "Table 5, SETR baseline": (
        [*CITY, "--supervised", "--stages", "1", "--network", "setr"],
        {372: 57.79},
    ),
    "Table 5, Deeplabv2-Deeplabv2 IML": ([*CITY, *IML], {372: "61.25 / 61.53"}),
    "Table 5, SETR-SETR IML": (
        [*CITY, *IML, *CLEAN, *STILL, "--network", "setr"],
        {372: "64.15 / 63.74"},
    ),
    "Table 5, Deeplabv2-SETR IML": (
        [*CITY, *IML, *CLEAN, *STILL, "--network", "deeplabv2,setr"],
        {372: "63.96 / 64.35"},
    ),
}


def numbers(*argv):
    """What a run with these arguments prints."""
    args = common.parse_args(rml.get_parser(), rml.PAPER, list(argv))
    if args.rectify is None:  # as main() does
        args.rectify = args.mutual in ("peer", "indirect")
    args.labels = int(args.labels)  # as split() does
    return rml.paper_miou(args)


@pytest.mark.parametrize("row", TABLES)
def test_each_row_of_the_papers_tables_is_printed_beside_its_setting(row):
    argv, miou = TABLES[row]
    for labels, number in miou.items():
        expected = number if isinstance(number, str) else f"{number:.2f}"
        assert f"{expected} ({row})" in numbers(*argv, "--labels", str(labels))
    assert numbers(*argv, "--labels", "371") == []


def test_all_rows_are_those_of_the_paper():
    rows = {line.split(" | ")[0] for line in rml.PAPER_MIOU.strip().splitlines()}
    assert rows - {"Table 5, SETR-Deeplabv2 IML"} == set(TABLES)


def test_an_oracle_and_the_swapped_pair_have_their_number():
    assert numbers(*CITY, "--supervised", "--labels", "2975") == ["67.14 (Table 1, Deeplabv2)"]
    (row,) = numbers(*CITY, *IML, *CLEAN, *STILL, "--network", "setr,deeplabv2")
    assert row == "64.35 / 63.96 (Table 5, SETR-Deeplabv2 IML)"


@pytest.mark.parametrize(
    "changes",
    [
        "--lr 1",
        "--stages 3",
        "--soft",
        "--interpolate logits",
        "--weights none",
        "--backbone resnet50",
        "--stages 1 --no-rectify --dropout 0",
        "--stages 1 --no-rectify --no-photometric",
        "--stages 1 --no-rectify --mutual direct",
        "--supervised --network setr-naive --stages 1",
        "--supervised --network setr",
    ],
)
def test_another_setting_has_no_number_of_the_paper(changes):
    assert numbers(*CITY, *changes.split()) == []


def test_what_makes_no_other_setting_keeps_the_number():
    expected = ["63.97 (Table 1, Ours)", "63.65 (Table 4, RML (two stages))"]
    same = "--lr 1e-4 --crop 256 512 --seed 3 --split-seed 1 --workers 1 --stages 2 --cutmix"
    assert numbers(*CITY, *same.split()) == expected


def test_a_drawn_list_of_vocaug_is_not_the_papers():
    """The paper's lists are of French et al.; a seed draws other pictures of the 10,582."""
    argv = ["--dataset", "vocaug", "--labels", "1323"]
    assert numbers(*argv) == []
    assert numbers(*argv, "--supervised") == []
    assert numbers(*argv, "--split", "list.txt") == ["70.34 (Table 2, Ours)"]


def test_the_end_of_a_run_shows_all_rows(tmp_path, monkeypatch, capsys):
    rows = ["61.25 (Table 4, IML)", "61.25 / 61.53 (Table 5, IML)"]
    monkeypatch.setattr(rml, "paper_miou", lambda args: rows)
    length = "--stage0-iterations 1 --iterations 1 --stages 1 --labels 4 --batch-size 2"
    run_on_few_streets(rml, *length.split(), "--out", tmp_path)
    output = capsys.readouterr().out
    assert all(f"paper     {row}\n" in output for row in rows)
    assert "the paper reports 61.25" in output


# ---- soft pseudo-labels, and what is upsampled ---------------------------------------------------


def test_footnote_2_soft_cross_entropy():
    log_prob = torch.randn(2, K, 3, 4).log_softmax(1)
    target = torch.randn(2, K, 3, 4).softmax(1)
    target[0, :, 1] = 0  # unknown
    total, count = 0.0, 0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                if (b, y) != (0, 1):
                    terms = target[b, :, y, x].double() * log_prob[b, :, y, x].double()
                    total -= float(terms.sum())
                    count += 1
    loss = rml.cross_entropy(log_prob, target)
    assert loss.item() == pytest.approx(total / count, abs=1e-6)
    hard = torch.randint(K, (2, 3, 4))
    one_hot = F.one_hot(hard, K).permute(0, 3, 1, 2).float()
    equal = rml.cross_entropy(log_prob, one_hot), rml.cross_entropy(log_prob, hard)
    assert equal[0].item() == pytest.approx(equal[1].item(), abs=1e-6)
    assert rml.cross_entropy(log_prob, 0 * target) == 0


def test_soft_labels_are_mixed_as_their_pictures():
    args = small_args("--no-photometric", "--soft")
    images = torch.zeros(3, 3, 16, 24, dtype=torch.uint8), torch.ones(3, 3, 16, 24).byte()
    unlabeled = [dict(image=image, position=[4, 5, 6]) for image in images]
    labels = torch.arange(6)[:, None, None].expand(6, 16, 24)
    soft = F.one_hot(labels, 6).permute(0, 3, 1, 2).float()
    view, mixed = rml.strong_view(unlabeled, [soft, soft], args, 1, 0)
    hard_view, hard = rml.strong_view(unlabeled, [labels, labels], args, 1, 0)
    assert torch.equal(view, hard_view)
    for i in range(2):
        assert torch.equal(mixed[i].argmax(1), hard[i])
        assert torch.equal(hard[i] >= 3, view[:, 0] == 1)
        assert mixed[i].sum(1).eq(1).all()


def test_soft_labels_are_learned(tmp_path, monkeypatch):
    """Students get probabilities that add up to 1, or to 0 where the label is unknown."""
    seen, real = [], rml.cross_entropy
    monkeypatch.setattr(rml, "cross_entropy", lambda *x: seen.append(x[1]) or real(*x))
    length = "--stage0-iterations 1 --iterations 2 --stages 1 --labels 4 --batch-size 2 --soft"
    threshold = ["--threshold", ".2"]
    run_on_few_streets(rml, *length.split(), *threshold, "--out", tmp_path)
    soft = [target for target in seen if target.dim() == 4]
    assert len(soft) == 2 * 2 * 2  # iterations, students, models
    for target in soft:
        total = target.sum(1)
        assert target.max(1).values[total > 0].min() > 0.2
        assert ((total - 1).abs().lt(1e-5) | (total == 0)).all()
        assert ((target > 0) & (target < 1)).any()


def test_the_weight_of_pseudo_labels(tmp_path):
    """With weight 0 the students are those of a run whose pseudo-labels are all ignored."""
    length = "--stage0-iterations 1 --iterations 3 --stages 1 --labels 4 --batch-size 2".split()
    weights = {}
    for flags in ("--pseudo-weight 0", "--threshold 1", "--pseudo-weight 0.2", "--pseudo-weight 1"):
        folder = tmp_path / flags
        run_on_few_streets(rml, *length, *flags.split(), "--out", folder)
        state = torch.load(folder / "last.pt")["models"]["student_1"]
        weights[flags] = torch.cat([x.flatten().float() for x in state.values()])
    vectors = list(weights.values())
    assert torch.equal(vectors[0], vectors[1])
    far = [(vector - vectors[0]).norm() for vector in vectors]
    assert far[2] > 0 and far[3] > 0 and not torch.equal(vectors[2], vectors[3])


@pytest.mark.parametrize("what", ["prob", "logits"])
def test_what_is_upsampled_for_pseudo_labels(what):
    args = small_args("--interpolate", what, "--crop", "24", "32")
    network = SimpleNamespace(cell=8, align_corners=True)
    logits = 4 * torch.randn(2, K, 3, 4)
    found = rml.upsample_prob(logits.softmax(1), network, args)
    if what == "prob":  # as in ProDA
        expected = common.upsample(logits.softmax(1), (24, 32), 8)
    else:  # as in French et al.
        expected = common.upsample(logits, (24, 32), 8).softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for y in range(3):
        for x in range(4):  # a cell's own pixel
            assert torch.allclose(
                found[:, :, 8 * y, 8 * x], logits[:, :, y, x].softmax(1), atol=1e-5
            )


def test_the_flags_of_open_choices_exist():
    source = Path(rml.__file__).read_text()
    choices = re.findall(r"# Open: .*(?:\n *#   .*)*", source)
    flags = [flag for choice in choices for flag in re.findall(r"--[a-z][\w-]+", choice)]
    options = {option for action in rml.get_parser()._actions for option in action.option_strings}
    assert len(choices) >= 20
    assert set(flags) <= options
    assert all(";" in choice for choice in choices)
