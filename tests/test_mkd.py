"""The parts of mutual knowledge distillation, each against a naive version written from the paper; a whole step by hand; and what it needs of common.py."""

import copy
import itertools
import math
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import common
import mkd
from helpers import FewStreets, equal
from test_data import stream
from test_evaluation_and_networks import slim_resnets
from test_voc import EXTRA, TRAIN, VAL, make_voc, refused, voc_arguments

K, C = 5, 6
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def labels(*shape, classes=K, unknown=0.2):
    return torch.where(torch.rand(shape) < unknown, 255, torch.randint(classes, shape))


def pictures(n=1, size=(24, 40)):
    return torch.randint(256, (n, 3, *size), dtype=torch.uint8)


# ---- Eq. 1 -----------------------------------------------------------------------------------------------------------


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.9, 1.0])
def test_eq_1_moves_every_parameter_and_copies_the_buffers(decay):
    teacher, student = small_network(), small_network()
    student(torch.rand(2, 3, 8, 8))  # statistics, and their counter
    nn.init.normal_(student[1].weight)
    before, of_student = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    mkd.update_teacher(teacher, student, decay)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.data, decay * before[name] + (1 - decay) * of_student[name])
    for name, b in teacher.named_buffers():
        assert torch.equal(b, of_student[name]) and not torch.equal(b, before[name])
    assert equal(student.state_dict(), of_student) and all(
        p.grad_fn is None for p in teacher.parameters()
    )


def test_the_mean_of_no_past_is_the_student_bit_for_bit():
    teacher, student = small_network(), small_network()
    mkd.update_teacher(teacher, student, 0.0)
    assert equal(teacher.state_dict(), student.state_dict())


# ---- Eq. 3: the covariances ------------------------------------------------------------------------------------------


def pixels_of_classes(batches):
    """{class: (n, C) float64}, all pixels of all batches."""
    found = {}
    for features, label in batches:
        for b, i, j in np.argwhere(label.numpy() != 255):
            found.setdefault(int(label[b, i, j]), []).append(features[b, :, i, j].double().numpy())
    return {k: np.array(x) for k, x in found.items()}


def check_statistics(statistics, batches, **tolerance):
    pixels, full = pixels_of_classes(batches), statistics.covariance.ndim == 3
    for k in range(len(statistics.count)):
        x = pixels.get(k, np.zeros((0, statistics.mean.shape[1])))
        covariance = np.cov(x.T, bias=True) if len(x) else np.zeros(2 * statistics.mean.shape[1:])
        assert int(statistics.count[k]) == len(x)
        np.testing.assert_allclose(
            statistics.mean[k], x.mean(0) if len(x) else 0 * statistics.mean[k], **tolerance
        )
        np.testing.assert_allclose(
            statistics.covariance[k], covariance if full else np.diag(covariance), **tolerance
        )


def uneven_batches():
    """Five batches of differing size, mean and spread; class 0 is in none, class 1 is missing at times, class 4 is a single pixel."""
    batches = []
    for i, (B, h, w) in enumerate([(2, 5, 7), (1, 1, 1), (3, 4, 4), (0, 4, 4), (2, 9, 3)]):
        label = torch.where(torch.rand(B, h, w) < 0.2, 255, torch.randint(1 + i % 2, 4, (B, h, w)))
        batches.append((torch.randn(B, C, h, w) * (i + 1) + 3 * i, label))
    batches[2][1][0, 0, 0] = 4
    return batches


@pytest.mark.parametrize("full", [False, True])
def test_statistics_are_those_of_all_pixels_at_once(full):
    statistics, batches = mkd.ClassStatistics(K, C, full), uneven_batches()
    for features, label in batches:
        statistics.update(features, label)
    check_statistics(statistics, batches, rtol=1e-4, atol=1e-4)
    assert (
        statistics.count.tolist()[0] == 0
        and statistics.count.tolist()[4] == 1
        and min(statistics.count.tolist()[1:4]) > 5
    )
    if full:
        torch.testing.assert_close(statistics.covariance, statistics.covariance.mT)


def test_the_diagonal_is_the_whole_ones():
    diagonal, full = mkd.ClassStatistics(K, C), mkd.ClassStatistics(K, C, True)
    for features, label in uneven_batches():
        diagonal.update(features, label), full.update(features, label)
    torch.testing.assert_close(diagonal.covariance, full.covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "label",
    [torch.full((2, 3, 3), 255), torch.zeros(0, 3, 3, dtype=torch.int64)],
    ids=["all unknown", "no picture"],
)
def test_a_batch_that_knows_nothing_changes_no_bit(full, label):
    statistics = mkd.ClassStatistics(K, C, full)
    for features, y in uneven_batches():
        statistics.update(features, y)
    before = copy.deepcopy(statistics.state_dict())
    statistics.update(torch.randn(len(label), C, 3, 3), label)
    assert equal(statistics.state_dict(), before)


@pytest.mark.parametrize("before", [2**24, 2**31, 2**40])
def test_counts_stay_exact_where_float32_stops_to_count(before):
    statistics = mkd.ClassStatistics(2, 1)
    statistics.count[0] = before
    for _ in range(3):
        statistics.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert statistics.count.tolist() == [before + 3, 0] and statistics.count.dtype == torch.int64


@pytest.mark.parametrize("before", [2**24, 2**31])
def test_many_old_pixels_outweigh_few_new_ones(before):
    statistics, n, value = mkd.ClassStatistics(1, 1), 8, float(before)
    statistics.count[0], statistics.mean[0], statistics.covariance[0] = before, 1.0, 2.0
    features = value + torch.tensor([-1024.0, 1024.0] * 4).view(1, 1, 2, 4)
    statistics.update(features, torch.zeros(1, 2, 4, dtype=torch.int64))
    total = before + n
    mean = (before * 1.0 + n * value) / total
    square = (before * (2.0 + 1.0) + float(features.double().square().sum())) / total
    assert float(statistics.mean) == pytest.approx(mean, rel=1e-5) and float(
        statistics.covariance
    ) == pytest.approx(square - mean**2, rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 512, 256), (2, 4, 1024, 640)])
def test_features_that_are_worked_on_in_parts_count_the_same(full, shape):
    features, label = (
        torch.randn(shape) + torch.arange(shape[0]).view(-1, 1, 1, 1),
        labels(shape[0], *shape[2:], classes=3),
    )
    several, single = mkd.ClassStatistics(3, shape[1], full), mkd.ClassStatistics(3, shape[1], full)
    several.update(features, label)
    single.update(
        torch.cat(list(features), 1)[None], torch.cat(list(label))[None]
    )  # one tall picture
    assert torch.equal(several.count, single.count) and int(several.count.sum()) == int(
        (label != 255).sum()
    )
    torch.testing.assert_close(several.mean, single.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(several.covariance, single.covariance, rtol=1e-4, atol=1e-4)
    x = features.transpose(0, 1).flatten(1)[:, label.flatten() == 1].double().numpy()
    np.testing.assert_allclose(
        several.covariance[1], np.cov(x, bias=True) if full else x.var(1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("full", [False, True])
def test_features_in_bfloat16_are_summed_in_float32(full):
    features, label = (torch.randn(2, C, 48, 48) + 4).bfloat16(), labels(2, 48, 48)
    statistics = mkd.ClassStatistics(K, C, full)
    statistics.update(features, label)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float32
    check_statistics(statistics, [(features, label)], rtol=1e-4, atol=1e-4)


# ---- Eq. 3: the term -------------------------------------------------------------------------------------------------


def some_covariance(full):
    a = torch.randn(K, C, C)
    return a @ a.mT if full else a.diagonal(dim1=1, dim2=2).square()


def term_by_hand(weight, covariance, y, j):
    v = weight[j] - weight[y]
    sigma = torch.diag(covariance[y]) if covariance.ndim == 2 else covariance[y]
    return v @ sigma @ v


def augmented(logits, label, weight, covariance, strength):
    statistics = SimpleNamespace(covariance=covariance, update=lambda features, label: None)
    return mkd.augment_features(logits.detach(), logits, label, weight, statistics, strength)


@pytest.mark.parametrize("full", [False, True])
def test_augmented_logits_in_value_and_gradient(full):
    weight, bias, covariance, strength = (
        torch.randn(K, C, requires_grad=True),
        torch.randn(K),
        some_covariance(full),
        0.7,
    )
    features, label, push = (
        torch.randn(2, C, 3, 4, requires_grad=True),
        labels(2, 3, 4),
        torch.randn(2, K, 3, 4),
    )

    def logits():
        return torch.einsum("kc,bchw->bkhw", weight, features) + bias.view(-1, 1, 1)

    expected = torch.zeros(2, K, 3, 4)
    for b, j, y, x in itertools.product(range(2), range(K), range(3), range(4)):
        expected[b, j, y, x] = logits()[b, j, y, x]
        if label[b, y, x] != 255:
            expected[b, j, y, x] += (
                strength / 2 * term_by_hand(weight.detach(), covariance, int(label[b, y, x]), j)
            )
    ours = augmented(logits(), label, weight, covariance, strength)  # no gradient through the term
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad((ours * push).sum(), (features, weight)),
        torch.autograd.grad((expected * push).sum(), (features, weight)),
    ):
        torch.testing.assert_close(a, b)
    leaf = torch.randn(2, K, 3, 4, requires_grad=True)
    augmented(leaf, label, weight, covariance, strength).backward(push)
    assert torch.equal(leaf.grad, push) and weight.grad is None


@pytest.mark.parametrize("full", [False, True])
def test_cross_entropy_of_augmented_logits_is_eq_3(full):
    weight, bias, covariance, strength = (
        torch.randn(K, C),
        torch.randn(K),
        some_covariance(full),
        1.5,
    )
    f, y = torch.randn(40, C), torch.randint(K, (40,))
    expected = [
        math.log(
            sum(
                math.exp(
                    (weight[j] - weight[k]) @ x
                    + bias[j]
                    - bias[k]
                    + strength / 2 * term_by_hand(weight, covariance, k, j)
                )
                for j in range(K)
            )
        )
        for x, k in zip(f, y.tolist())
    ]
    logits = (f @ weight.T + bias).T[None, :, :, None]
    ours = augmented(logits, y.view(1, -1, 1), weight, covariance, strength)
    assert float(F.cross_entropy(ours, y.view(1, -1, 1))) == pytest.approx(
        np.mean(expected), rel=1e-4
    )


@pytest.mark.parametrize("full", [False, True])
def test_the_term_is_zero_for_the_own_class_and_unknown_pixels_and_never_negative(full):
    weight, covariance = torch.randn(K, C) * 1e-3 + 50, some_covariance(full)
    table = mkd.augmentation_table(
        weight, covariance
    )  # an expanded square would lose all digits here
    assert (
        table.shape == (K, K)
        and (table.diagonal() == 0).all()
        and (table >= 0).all()
        and (table > 0).sum() == K * (K - 1)
    )
    label = torch.arange(K).repeat(2)[None, :, None]
    label[0, K:] = 255
    moved = augmented(torch.zeros(1, K, 2 * K, 1), label, weight, covariance, 2.0)[
        0, :, :, 0
    ].T  # (pixel, class)
    assert torch.equal(moved[:K], table) and (moved[K:] == 0).all()
    assert (augmented(torch.zeros(1, K, 2 * K, 1), label, weight, covariance, 0.0) == 0).all()


def test_statistics_are_of_all_pictures_and_at_the_logits_size_and_the_term_is_for_the_last_ones():
    features, logits, label, weight = (
        torch.randn(3, C, 9, 6),
        torch.randn(2, K, 4, 3),
        labels(3, 4, 3),
        torch.randn(K, C),
    )
    own, expected = mkd.ClassStatistics(K, C), mkd.ClassStatistics(K, C)
    ours = mkd.augment_features(features, logits, label, weight, own, 1.5)
    expected.update(F.interpolate(features, (4, 3), mode="bilinear", align_corners=False), label)
    assert equal(own.state_dict(), expected.state_dict()) and int(own.count.sum()) == int(
        (label != 255).sum()
    )
    torch.testing.assert_close(ours, augmented(logits, label[1:], weight, expected.covariance, 1.5))


# ---- views -----------------------------------------------------------------------------------------------------------


class Draws:
    """A generator whose numbers are given; it keeps the bounds that randint was asked for."""

    def __init__(self, uniform=(), randint=()):
        self.numbers, self.places, self.bounds = list(uniform), list(randint), []

    def uniform(self, *range):
        return self.numbers.pop(0)

    def randint(self, bound):
        self.bounds.append(bound)
        return self.places.pop(0)


def test_three_boxes_by_hand_off_again_where_two_overlap():
    """u = .36 and a height of .36 ^ .5 = .6, a width of .6: over the root of 3, 33 of 96 rows and 67 of 192 columns."""
    r = Draws([0.36, 0.5, 0.36, 0.5, 0.25, 0.0], [0, 0, 20, 40, 41, 81])
    mask = mkd.cutmix_mask((96, 192), r)
    expected = np.zeros((96, 192), int)
    expected[0:33, 0:67] += 1
    expected[20:53, 40:107] += 1
    expected[41 : 41 + 55, 81 : 81 + 28] += 1  # height 1, width .25
    assert (
        mask.dtype == torch.bool
        and np.array_equal(mask.numpy(), expected % 2 == 1)
        and expected.max() == 2
    )
    assert (
        r.bounds == [96 - 33 + 1, 192 - 67 + 1] * 2 + [96 - 55 + 1, 192 - 28 + 1]
        and not r.numbers
        and not r.places
    )


def test_boxes_lie_inside_the_picture_at_any_place_and_have_their_area():
    areas, reached = [], torch.zeros(60, 90, dtype=torch.bool)
    for seed in range(500):
        r, own = common.rng(seed), common.rng(seed)
        mask, expected, total = mkd.cutmix_mask((60, 90), r), np.zeros((60, 90), bool), 0
        for _ in range(3):
            u = own.uniform(0.25, 0.5)
            height = u ** own.uniform()
            h, w = round(60 * height / math.sqrt(3)), round(90 * u / height / math.sqrt(3))
            top, left = own.randint(60 - h + 1), own.randint(90 - w + 1)
            assert abs(h * w / 5400 - u / 3) < 0.02 and top + h <= 60 and left + w <= 90
            box = np.zeros_like(expected)
            box[top : top + h, left : left + w] = True
            expected, total = expected ^ box, total + h * w
        assert np.array_equal(mask.numpy(), expected)
        areas.append([float(mask.float().mean()), total / 5400])
        reached |= mask
    mixed, boxes = np.mean(areas, 0)
    assert boxes == pytest.approx(0.375, abs=0.01) and mixed == pytest.approx(
        0.25, abs=0.02
    )  # what overlaps is lost twice
    assert reached.float().mean() > 0.99 and all(
        edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1])
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (512, 1024)])
def test_a_mask_of_any_size(size):
    assert all(mkd.cutmix_mask(size, common.rng(seed)).shape == size for seed in range(20))


def mixed_by_hand(x, mask):
    result = x[: len(mask)].clone()
    for b, i, j in np.argwhere(mask.numpy()):
        result[b, ..., i, j] = x[(b + 1) % len(x), ..., i, j]
    return result


@pytest.mark.parametrize("more", [0, 1])
def test_pictures_logits_and_labels_are_cut_by_the_same_mask_out_of_the_next_picture(more):
    mask = torch.rand(3, 6, 7) < 0.4
    for x in (
        pictures(3 + more, (6, 7)),
        torch.randn(3 + more, K, 6, 7),
        labels(3 + more, 6, 7),
        torch.rand(3 + more, 6, 7) < 0.5,
    ):
        mixed = mkd.cutmix(x, mask)
        assert mixed.dtype == x.dtype and torch.equal(mixed, mixed_by_hand(x, mask))
        assert torch.equal(
            mixed[2][..., mask[2]], x[3 if more else 0][..., mask[2]]
        )  # after the last comes the first, or the one more
        assert torch.equal(mkd.cutmix(x, torch.zeros_like(mask)), x[:3])


def test_the_same_gradient_goes_where_the_logits_came_from():
    logits, mask = torch.randn(2, K, 4, 4, requires_grad=True), torch.rand(2, 4, 4) < 0.5
    mkd.cutmix(logits, mask).sum().backward()
    assert torch.equal(
        logits.grad, (1.0 - mask.float() + mask.roll(1, 0).float())[:, None].expand_as(logits)
    )


NAMES = ["color_jitter", "blur", "equalize", "solarize", "grey"]


def test_one_of_five_operations_by_its_weight(monkeypatch):
    monkeypatch.setattr(
        mkd,
        "OPERATIONS",
        tuple(
            (weight, lambda image, r, k=k: torch.full_like(image, k))
            for k, (weight, _) in enumerate(mkd.OPERATIONS)
        ),
    )
    n = 6000
    counts = Counter(
        mkd.strong_view(
            torch.zeros(n, 3, 1, 1, dtype=torch.uint8), [common.rng(seed) for seed in range(n)]
        )[:, 0, 0, 0].tolist()
    )
    for k, weight in enumerate((3, 5, 1, 1, 5)):
        share = weight / 15
        assert abs(counts[k] - n * share) < 4 * math.sqrt(n * share * (1 - share)), NAMES[k]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_operations_do(name, monkeypatch):
    monkeypatch.setattr(mkd.V, "gaussian_blur", lambda image, size, sigma: image * 0 + 1)
    for color in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(mkd.V, f"adjust_{color}", lambda image, factor: image * 0 + 2)

    class Chosen:
        def __init__(self):
            self.real, self.first = common.rng(0), True

        def __getattr__(self, attribute):
            if attribute == "choice" and self.first:
                self.first = False
                return lambda operations, p: NAMES.index(name)
            return getattr(self.real, attribute)

    image = (torch.randint(256, (1, 3, 24, 40)) // 2 + 40).to(torch.uint8)
    picture, moved = (
        Image.fromarray(image[0].permute(1, 2, 0).numpy()),
        mkd.strong_view(image, [Chosen()]),
    )
    expected = {
        "color_jitter": lambda: np.full((24, 40, 3), 2),
        "blur": lambda: np.full((24, 40, 3), 1),
        "equalize": lambda: np.asarray(ImageOps.equalize(picture)),
        "solarize": lambda: np.asarray(ImageOps.solarize(picture, 128)),
        "grey": lambda: np.repeat(np.asarray(picture.convert("L"))[..., None], 3, 2),
    }[name]()
    assert moved.dtype == torch.uint8 and moved.shape == image.shape
    assert np.abs(moved[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= (
        name == "grey"
    )


def test_every_picture_has_its_own_operation_that_its_generator_decides():
    image = pictures(40)
    one, two = (mkd.strong_view(image, [common.rng(7, i) for i in range(40)]) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.uint8 and one.shape == image.shape
    alone = torch.cat([mkd.strong_view(image[i : i + 1], [common.rng(7, i)]) for i in range(40)])
    assert torch.equal(one, alone) and sum(torch.equal(a, b) for a, b in zip(one, image)) < 3
    grey = [bool((x[0] == x[1]).all()) for x in one]
    assert 5 < sum(grey) < 25
    assert not torch.equal(one, mkd.strong_view(image, [common.rng(8, i) for i in range(40)]))


def test_colour_jitter_in_its_ranges_and_in_random_order(monkeypatch):
    calls = []
    for color in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(
            mkd.V,
            f"adjust_{color}",
            lambda image, factor, color=color: calls.append((color, float(factor))) or image + 1,
        )
    for seed in range(500):
        assert (
            mkd.color_jitter(torch.zeros(3, 1, 1), common.rng(seed)) == 4
        ).all()  # one after the other
    orders = Counter(tuple(color for color, _ in calls[i : i + 4]) for i in range(0, 2000, 4))
    assert len(calls) == 2000 and set(orders) == set(
        itertools.permutations(("brightness", "contrast", "saturation", "hue"))
    )
    for color, low, high in (
        ("brightness", 0.5, 1.5),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.25, 0.25),
    ):
        drawn = np.array([factor for name, factor in calls if name == color])
        near = (high - low) / 50
        assert (
            low <= drawn.min() < low + near
            and high - near < drawn.max() <= high
            and abs(drawn.mean() - (low + high) / 2) < 2 * near
        )
    factors = np.array(
        [
            [
                dict(calls[i : i + 4])[color]
                for color in ("brightness", "contrast", "saturation", "hue")
            ]
            for i in range(0, 2000, 4)
        ]
    )
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.2  # each has a number of its own


def test_blur_in_its_ranges(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mkd.V, "gaussian_blur", lambda image, size, sigma: calls.append((size, sigma)) or image
    )
    for seed in range(300):
        mkd.blur(torch.zeros(3, 8, 8), common.rng(seed))
    sizes, sigmas = (
        Counter(tuple(size) for size, _ in calls),
        np.array([sigma for _, sigma in calls]),
    )
    assert set(sizes) == {(3, 3), (5, 5), (7, 7)} and min(sizes.values()) > 70
    assert (
        (sigmas[:, 0] == sigmas[:, 1]).all()
        and 0.1 <= sigmas.min() < 0.15
        and 1.95 < sigmas.max() <= 2.0
    )


def test_distortion_depends_on_the_generators_alone_and_leaves_torchs_own_alone():
    image, state = pictures(12), torch.get_rng_state()
    one = mkd.distort(image, [common.rng(i) for i in range(12)])
    assert (
        torch.equal(torch.get_rng_state(), state)
        and one.dtype == torch.uint8
        and one.shape == image.shape
    )
    torch.rand(5)
    assert torch.equal(one, mkd.distort(image, [common.rng(i) for i in range(12)]))
    assert torch.equal(one[5:6], mkd.distort(image[5:6], [common.rng(5)]))
    assert sum(torch.equal(a, b) for a, b in zip(one, image)) < 4 and not torch.equal(
        one, mkd.distort(image, [common.rng(i + 1) for i in range(12)])
    )


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------


def test_hard_labels_are_the_highest_class_where_valid_and_carry_no_gradient():
    logits, valid = torch.randn(2, K, 5, 6, requires_grad=True), torch.rand(2, 5, 6) < 0.7
    label = mkd.hard_label(logits, valid)
    assert label.dtype == torch.int64 and not label.requires_grad
    for b, y, x in itertools.product(range(2), range(5), range(6)):
        assert int(label[b, y, x]) == (
            max(range(K), key=lambda k: float(logits[b, k, y, x].detach()))
            if valid[b, y, x]
            else 255
        )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_confident_pixels(threshold):
    logits = 3 * torch.randn(2, K, 5, 6)
    logits[0, 2, 0, 0] = 1e4  # a probability of 1 exactly
    keep = mkd.confident(logits, threshold)
    p = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    assert keep.dtype == torch.bool and np.array_equal(
        keep.numpy(), (p / p.sum(1, keepdims=True)).max(1) >= threshold
    )
    assert keep[0, 0, 0] and bool(keep.all()) == (threshold == 0.0)


@pytest.mark.parametrize(
    "size, small",
    [
        ((64, 128), (8, 16)),
        ((321, 321), (41, 41)),
        ((512, 1024), (64, 128)),
        ((12, 8), (6, 8)),
        ((713, 361), (90, 46)),
        ((9, 7), (9, 7)),
        ((8, 16), (64, 128)),
    ],
)
def test_labels_at_another_size_are_those_at_the_cells_centres(size, small):
    for x in (labels(2, *size), torch.rand(2, *size) < 0.5):
        sampled = mkd.sample(x, small)
        assert sampled.dtype == x.dtype and sampled.shape == (2, *small)
        rows, columns = (
            [(2 * i + 1) * n // (2 * m) for i in range(m)] for n, m in zip(size, small)
        )
        assert torch.equal(sampled, x[:, rows][:, :, columns])
    assert mkd.sample(labels(0, *size), small).shape == (0, *small)


# ---- losses and networks ---------------------------------------------------------------------------------------------


def cross_entropy_by_hand(logits, label):
    total, count = 0.0, 0
    for b, y, x in itertools.product(*map(range, label.shape)):
        if label[b, y, x] != 255:
            total, count = (
                total + logits[b, :, y, x].logsumexp(0) - logits[b, int(label[b, y, x]), y, x],
                count + 1,
            )
    return total / max(count, 1)


def test_cross_entropy_is_the_mean_over_valid_pixels_and_zero_without_any():
    logits, label = torch.randn(2, K, 5, 6, requires_grad=True), labels(2, 5, 6, unknown=0.5)
    ours, theirs = mkd.cross_entropy(logits, label), cross_entropy_by_hand(logits, label)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0]
    )
    none = mkd.cross_entropy(logits, torch.full_like(label, 255))
    none.backward()
    assert float(none.detach()) == 0 and (logits.grad == 0).all()


def test_the_ensemble_is_the_mean_of_logits():
    networks = [nn.Conv2d(3, K, 3) for _ in range(2)]
    image = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        mkd.Ensemble(networks)(image), (networks[0](image) + networks[1](image)) / 2
    )


# ---- a whole step by hand --------------------------------------------------------------------------------------------


class Step:
    """The first iteration of a run on few streets: what went in, the networks before, the losses and the weights after.

    It is also the last, so that lambda is lambda0; and at t = 1 each teacher is its student."""

    def __init__(self, folder, *flags):
        argv = [
            "--labels",
            "4",
            "--batch-size",
            "2",
            "--crop",
            "32",
            "64",
            "--scale",
            ".3",
            ".7",
            "--seed",
            "2",
            "--iterations",
            "1",
            "--loss-stride",
            "4",
            "--optimizer",
            "sgd",
            "--lr",
            ".5",
            "--weight-decay",
            "0",
            "--log-every",
            "1",
            "--out",
            str(folder),
            "--warmup",
            "0",
            "--cutmix",
            *flags,
        ]
        self.views, self.distorted, self.masks, self.losses, self.before, self.targets = (
            [],
            [],
            [],
            {},
            [],
            [],
        )
        args = self.args = common.parse_args(mkd.get_parser(), mkd.PAPER, argv)
        args.cutmix = args.cutmix and args.strong
        data = self.data = FewStreets()
        labeled, unlabeled = common.split(args, data)
        with pytest.MonkeyPatch.context() as patch:
            self.keep(
                patch,
                mkd,
                "strong_view",
                lambda result, images, generators: self.views.append((images, result)),
            )
            self.keep(patch, mkd, "distort", lambda result, *_: self.distorted.append(result))
            self.keep(patch, mkd, "cutmix_mask", lambda result, *_: self.masks.append(result))
            self.keep(
                patch,
                mkd,
                "cross_entropy",
                lambda result, logits, label: self.targets.append(label),
            )
            self.keep(
                patch,
                common,
                "build_network",
                lambda result, *_: (
                    result.last.weight.data.mul_(30),
                    self.before.append(copy.deepcopy(result)),
                ),
            )
            patch.setattr(
                common.Run,
                "watch",
                lambda run, stage, i, losses, real=common.Run.watch: (
                    self.losses.update(losses) or real(run, stage, i, losses)
                ),
            )
            mkd.train(args, data, labeled, unlabeled, CPU)
        self.after = torch.load(folder / "last.pt", weights_only=True)
        self.labeled, self.unlabeled = (
            next(
                common.batches(
                    common.Stream(data, ids, name, args, labeled=name == "labeled"), args, CPU, 0, 1
                )
            )
            for ids, name in ((labeled, "labeled"), (unlabeled, "unlabeled"))
        )

    @staticmethod
    def keep(patch, module, name, look):
        real = getattr(module, name)

        def spied(*args, **kwargs):
            result = real(*args, **kwargs)
            look(result, *args)
            return result

        patch.setattr(module, name, spied)

    def by_hand(self):
        """Algorithm 1, lines 6 to 15: {name of a loss term: value} with gradients, the students they belong to, and the teachers' and students' targets."""
        args, size, students = self.args, (8, 16), copy.deepcopy(self.before)
        teachers = copy.deepcopy(self.before)  # Eq. 1 at t = 1
        image, label, both = self.labeled["image"], self.labeled["label"], args.labeled_consistency
        weak = self.unlabeled["image"]
        strong, mask = (
            self.views[0][1] if args.strong else weak,
            torch.stack(self.masks or [torch.zeros(32, 64, dtype=torch.bool)] * 2),
        )
        if args.weak_photometric:
            image, weak = self.distorted
        assert bool(self.masks) == args.cutmix and bool(self.views) == bool(args.strong)
        strong = mixed_by_hand(strong, mask)
        rows, columns = (
            [4 * i + 2 for i in range(8)],
            [4 * i + 2 for i in range(16)],
        )  # the cells' centres
        small_mask, small_label = (x[:, rows][:, :, columns] for x in (mask, label))
        valid = torch.cat(
            [
                x[:, rows][:, :, columns]
                for x in (self.labeled["valid"], mixed_by_hand(self.unlabeled["valid"], mask))
            ]
        )

        unmixed = self.unlabeled["valid"][:, rows][:, :, columns]
        assert (
            not valid[:2].all()
            and not unmixed.all()
            and torch.equal(valid[2:], unmixed) == (not mask.any())
        )  # there is padding, and it is mixed

        def at_stride(x):
            return F.interpolate(x, size, mode="bilinear", align_corners=False)

        def answer(network, unlabeled):
            """Features and logits of the labeled and the unlabeled pictures, (2B, ..)"""
            features = network.features(torch.cat([image, unlabeled]) / 255.0)
            return (
                at_stride(features),
                at_stride(network.classifier(features)),
                network.classifier(features),
            )

        def highest(logits):
            return logits.detach().argmax(1).where(valid, 255)

        def augmented(network, features, logits, with_labeled):
            """FD: p + lambda / 2 v^T Sigma v."""
            y = torch.cat([small_label, highest(logits)[2:]])
            first = 0 if with_labeled else 2
            pixels = pixels_of_classes([(features[first:].detach(), y[first:])])
            w, term = (
                network.last.weight.detach().flatten(1).double().numpy(),
                torch.zeros_like(logits),
            )
            for k, x in pixels.items():
                sigma = np.cov(x.T, bias=True)
                sigma = sigma if args.features == "full" else np.diag(np.diag(sigma))
                for j in range(10):
                    v = w[j] - w[k]
                    term[:, j][y == k] = args.lambda0 / 2 * float(v @ sigma @ v)
            return logits + term

        teacher_labels, kept = [], []
        for network in teachers:
            with torch.no_grad():
                features, logits, _ = answer(network, weak)
            features, logits = (
                torch.cat([x[:2], mixed_by_hand(x[2:], small_mask)]) for x in (features, logits)
            )
            confidence = logits.softmax(1).amax(1)
            if args.features_of_teachers:
                logits = augmented(network, features, logits, both)
            y = highest(logits)
            y[confidence < args.threshold] = 255
            teacher_labels.append(y)
        losses, logits_of = {}, []
        for j, network in enumerate(students, 1):
            features, logits, coarse = answer(network, strong)
            crop = F.interpolate(coarse[:2], (32, 64), mode="bilinear", align_corners=False)
            losses[f"loss_labeled_{j}"] = cross_entropy_by_hand(crop, label)
            logits_of.append(
                augmented(network, features, logits, True) if args.features != "none" else logits
            )
        first = 0 if both else 2
        from_teacher = {"mutual": (2, 1), "own": (1, 2), "none": ()}[args.teachers]
        for j, i in enumerate(from_teacher, 1):
            losses[f"loss_st_{j}"] = cross_entropy_by_hand(
                logits_of[j - 1][first:], teacher_labels[i - 1][first:]
            )
        for j, i in ((1, 2), (2, 1)):
            losses[f"loss_ss_{j}"] = cross_entropy_by_hand(
                logits_of[j - 1][first:], highest(logits_of[i - 1])[first:]
            )
        return losses, students, [y[first:] for y in teacher_labels]


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--features full --teachers own",
        "--threshold .3 --alpha .5 --beta 2 --no-cutmix --lambda0 5",
        "--no-strong --features none",
        "--teachers none --lambda0 3 --beta .5",
        "--features-of-teachers --labeled-consistency --weak-photometric --lambda0 3",
        "--features-of-teachers --features full --lambda0 3",
    ],
)
def test_a_step_is_algorithm_1(flags, tmp_path):
    step = Step(tmp_path / "run", *flags.split())
    losses, students, teacher_labels = step.by_hand()
    assert step.losses.keys() == losses.keys()
    for name, value in losses.items():
        assert float(step.losses[name].detach()) == pytest.approx(
            float(value.detach()), rel=1e-4, abs=1e-5
        ), name
        assert float(value.detach()) > 0.1
    weights = {"labeled": 1.0, "st": step.args.alpha, "ss": step.args.beta}
    total = sum(weights[name.split("_")[1]] * value for name, value in losses.items())  # Eq. 4
    total.backward()
    for j, network in enumerate(students, 1):
        for name, p in network.named_parameters():
            expected, after = (
                p.detach() - step.args.lr * p.grad,
                step.after["models"][f"student_{j}"][name],
            )
            torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
            assert not torch.equal(after, p.detach()), name
    if step.args.teachers != "none":
        assert not torch.equal(*teacher_labels)  # so that a swap is seen
        for i in (1, 2):
            assert equal(
                step.after["models"][f"teacher_{i}"], dict(step.before[i - 1].state_dict())
            )
        targets = (
            step.targets[2],
            step.targets[4],
        )  # after the labels of both students: st 1, ss 1, st 2, ss 2
        order = (1, 0) if step.args.teachers == "mutual" else (0, 1)
        assert all((a == teacher_labels[i]).float().mean() > 0.99 for a, i in zip(targets, order))
    if step.args.threshold:
        kept = [(y != 255).float().mean() for y in (step.targets[2], step.targets[3])]
        assert 0 < kept[0] < kept[1]  # of the other student's labels none is left out
    assert not any(y.requires_grad for y in step.targets)


def test_lambda_rises_along_half_a_cosine_and_teachers_follow_eq_1_with_a_quick_start(
    tmp_path, monkeypatch
):
    """gamma .6: the decay is 0, 1/2, and from then on .6."""
    saved, lambdas, save = [], [], common.Run.save
    monkeypatch.setattr(
        common.Run,
        "save",
        lambda run, headline, networks, **state: (
            saved.append(
                copy.deepcopy({name: network.state_dict() for name, network in networks.items()})
            )
            or save(run, headline, networks, **state)
        ),
    )
    monkeypatch.setattr(
        mkd,
        "augment_features",
        lambda *given, real=mkd.augment_features: lambdas.append(given[-1]) or real(*given),
    )
    monkeypatch.setattr(common, "Streets", FewStreets)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "mkd.py",
            "--labels",
            "4",
            "--batch-size",
            "2",
            "--crop",
            "32",
            "64",
            "--iterations",
            "5",
            "--save-every",
            "1",
            "--gamma",
            ".6",
            "--lr",
            ".01",
            "--lambda0",
            "3",
            "--out",
            str(tmp_path / "run"),
            "--warmup",
            "0",
        ],
    )
    mkd.main()
    assert len(saved) == 6 and equal(saved[0]["student_1"], saved[0]["teacher_1"])
    for t in range(1, 6):
        decay = {1: 0.0, 2: 0.5}.get(t, 0.6)
        for i in (1, 2):
            for name, value in saved[t][f"teacher_{i}"].items():
                torch.testing.assert_close(
                    value,
                    decay * saved[t - 1][f"teacher_{i}"][name]
                    + (1 - decay) * saved[t - 1][f"student_{i}"][name],
                )
    np.testing.assert_allclose(
        lambdas, np.repeat([3 * (1 - math.cos(math.pi * t / 5)) / 2 for t in range(1, 6)], 2)
    )


# ---- the paper's settings --------------------------------------------------------------------------------------------


def row(*argv):
    return common.parse_args(mkd.get_parser(), mkd.PAPER, list(argv))


@pytest.mark.parametrize(
    "dataset, lr, crop",
    [
        ("voc", 0.0025, (512, 512)),
        ("vocaug", 0.0025, (512, 512)),
        ("cityscapes", 0.01, (512, 1024)),
    ],
)
def test_settings_of_sect_4_1(dataset, lr, crop):
    args = row("--dataset", dataset)
    assert (args.lr, tuple(args.crop), args.batch_size, args.optimizer, args.weight_decay) == (
        lr,
        crop,
        16,
        "sgd",
        5e-4,
    )
    assert (args.network, args.backbone, args.weights) == (
        "deeplabv3plus",
        "resnet50",
        "imagenet",
    ) and args.changed == []
    assert (
        args.gamma,
        args.alpha,
        args.beta,
        args.lambda0,
        args.threshold,
        args.teachers,
        args.features,
    ) == (0.4, 1.5, 1.0, 1.5, 0.0, "mutual", "diagonal")
    assert (
        args.strong
        and args.cutmix
        and not (args.features_of_teachers or args.labeled_consistency or args.weak_photometric)
    )
    assert (
        args.scales == [1.0] and not args.flip and not args.base_size
    )  # whole pictures at one scale
    (momentum,) = {
        group["momentum"]
        for group in common.make_optimizer(args, args.lr, small_network().parameters()).param_groups
    }
    assert momentum == 0.9


@pytest.mark.parametrize("dataset", ["voc", "vocaug", "streets"])
def test_the_official_preset_is_the_code_where_it_departs_from_the_paper(dataset):
    paper, code = row("--dataset", dataset), row("--dataset", dataset, "--preset", "official")
    assert (
        code.gamma,
        code.features_of_teachers,
        code.labeled_consistency,
        code.weak_photometric,
    ) == (0.6, True, True, True)
    differs = {name for name, value in vars(paper).items() if getattr(code, name) != value}
    assert differs == {
        "gamma",
        "features_of_teachers",
        "labeled_consistency",
        "weak_photometric",
        "preset",
        "table_preset",
        "given",
    }
    assert (
        row("--dataset", dataset, "--preset", "official", "--no-weak-photometric").weak_photometric
        is False
    )


# Tables 1 and 2: (dataset, --extra, backbone, threshold, labels), mIoU
CELLS = [
    ("voc", None, "resnet50", 0, 92, 60.60),
    ("voc", None, "resnet101", 0, 732, 75.90),
    ("voc", "all", "resnet50", 0, 366, 74.25),
    ("voc", "all", "resnet101", 0, 1464, 80.02),
    ("voc", "all", "resnet101", 0.95, 92, 74.40),
    ("voc", "all", "resnet101", 0.95, 1464, 80.80),
    ("vocaug", None, "resnet50", 0, 662, 74.02),
    ("vocaug", None, "resnet50", 0, 5291, 76.92),
    ("vocaug", None, "resnet101", 0, 2646, 77.62),
    ("cityscapes", None, "resnet50", 0, 372, 78.07),
    ("cityscapes", None, "resnet101", 0, 186, 77.19),
    ("cityscapes", None, "resnet101", 0, 1488, 81.04),
]


@pytest.mark.parametrize("dataset, extra, backbone, threshold, labels, miou", CELLS)
def test_the_papers_numbers_are_found_by_what_was_given(
    dataset, extra, backbone, threshold, labels, miou
):
    args = row(
        "--dataset",
        dataset,
        "--backbone",
        backbone,
        "--threshold",
        str(threshold),
        "--labels",
        str(labels),
        *["--extra", extra] * bool(extra),
    )
    assert mkd.PAPER_MIOU[args.dataset, args.extra, args.backbone, args.threshold, labels] == miou


def test_the_papers_numbers_are_complete():
    counts = Counter(key[:4] for key in mkd.PAPER_MIOU)
    assert sum(counts.values()) == 8 + 5 + 5 + 5 + 8 + 8 and all(
        60 < miou < 82 for miou in mkd.PAPER_MIOU.values()
    )


@pytest.mark.parametrize(
    "name, total, counts",
    [
        ("voc", 1464, [92, 183, 366, 732]),
        ("vocaug", 10582, [662, 1323, 2646, 5291]),
        ("cityscapes", 2975, [186, 372, 744, 1488]),
    ],
)
def test_shares_are_the_papers_counts(name, total, counts):
    data = SimpleNamespace(name=name, train=range(total))
    assert [common.count_labels(share, data) for share in ("1/16", "1/8", "1/4", "1/2")] == counts


# ---- DeepLabv3+ ------------------------------------------------------------------------------------------------------


def spec(**changes):
    return (
        dict(
            network="deeplabv3plus",
            backbone="resnet50",
            head="plain",
            aspp_branches=4,
            batch_norm="frozen",
            style="torchvision",
            classes=21,
            deep_stem=False,
        )
        | changes
    )


@pytest.fixture(scope="module")
def deeplab():
    return common.make_network(spec()).eval()


@pytest.mark.parametrize(
    "backbone, stem, expected",
    [
        ("resnet50", False, 29_317_573),
        ("resnet101", False, 48_309_701),
        ("resnet50", 64, 29_336_805),
        ("resnet101", 64, 48_328_933),
    ],
)
def test_parameters_of_deeplabv3plus(backbone, stem, expected):
    with torch.device("meta"):
        network = common.make_network(spec(backbone=backbone, deep_stem=stem))
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    "size, low, high",
    [((64, 96), (16, 24), (4, 6)), ((321, 321), (81, 81), (21, 21)), ((33, 65), (9, 17), (3, 5))],
)
def test_deeplabv3plus_of_odd_and_even_sizes(deeplab, size, low, high):
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        features, logits, layers = (
            deeplab.features(image),
            deeplab(image),
            deeplab.backbone.layers(deeplab.normalize(image)),
        )
        assert torch.equal(logits, deeplab.classifier(features))
    assert (
        features.shape == (1, 256, *low)
        and logits.shape == (1, 21, *low)
        and deeplab.feature_channels == 256
        and deeplab.stride == 4
    )
    assert layers[0].shape[2:] == low and layers[3].shape[2:] == high


def test_the_backbone_of_deeplabv3plus_halves_four_times_and_dilates_its_last_layer(deeplab):
    backbone = deeplab.backbone
    assert backbone.stride == 16
    for layer, stride, dilation in (
        (backbone.layer1, 1, 1),
        (backbone.layer2, 2, 1),
        (backbone.layer3, 2, 1),
        (backbone.layer4, 1, 2),
    ):
        for b, block in enumerate(layer):
            assert block.conv2.stride == (stride if b == 0 else 1,) * 2
            own = 1 if b == 0 else dilation  # MMSegmentation: contract_dilation
            assert block.conv2.dilation == block.conv2.padding == (own, own)
        assert layer[0].downsample[0].stride == (stride, stride)


def test_the_head_of_deeplabv3plus(deeplab):
    dilations = [
        [m.dilation[0] for m in branch.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        for branch in deeplab.branches
    ]
    assert dilations == [[], [6], [12], [18]] and deeplab.last.kernel_size == (1, 1)
    decoder = [m for m in deeplab.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.groups) for m in decoder] == [
        (304, 304, 304),
        (304, 256, 1),
        (256, 256, 256),
        (256, 256, 1),
    ]
    assert deeplab.low[0].out_channels == 48 and deeplab.bottleneck[0].in_channels == 5 * 256


@pytest.mark.parametrize("size", [(64, 128), (33, 47)])
def test_tiny_deeplabv3plus_decodes_at_stride_2(size):
    network = common.make_network(spec(backbone="tiny", classes=10))
    image = torch.rand(2, 3, *size)
    features, expected = network.features(image), tuple(math.ceil(n / 2) for n in size)
    assert (
        features.shape == (2, 32, *expected)
        and network.feature_channels == 32
        and network.stride == 2
    )
    assert torch.equal(network(image), network.classifier(features)) and not any(
        isinstance(m, nn.BatchNorm2d) for m in network.modules()
    )


def resnet_v1c():
    """{MMSegmentation's key: random tensor} of a ResNet50-V1c of an eighth of the width in layers 1 to 4, with its classifier."""
    state = {}
    for key, value in common.make_backbone("resnet50", deep_stem=64).state_dict().items():
        if key.startswith("conv1."):
            key = key.replace("conv1.", "stem.")
        elif key.startswith("bn1."):
            key = key.replace("bn1.", "stem.7.")
        state[key] = (
            torch.rand(value.shape) / max(1, value[0].numel())
            if value.is_floating_point()
            else torch.tensor(17)
        )
    return state | {"fc.weight": torch.rand(1000, 256), "fc.bias": torch.rand(1000)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_mmsegmentations_v1c_load_whole(wrapped, tmp_path, monkeypatch, capsys):
    slim_resnets(monkeypatch)
    state = resnet_v1c()
    stems = {
        key: value.shape
        for key, value in state.items()
        if key.startswith("stem.") and value.ndim == 4
    }
    assert stems == {
        "stem.0.weight": (32, 3, 3, 3),
        "stem.3.weight": (32, 32, 3, 3),
        "stem.6.weight": (64, 32, 3, 3),
    }
    assert {
        "stem.7.running_mean",
        "stem.1.bias",
        "stem.4.weight",
        "layer1.0.conv1.weight",
    } <= state.keys()
    torch.save(
        {"meta": {"epoch": 1}, "state_dict": state} if wrapped else state, tmp_path / "v1c.pth"
    )
    args = SimpleNamespace(**spec(), weights=str(tmp_path / "v1c.pth"), input_style=None, seed=0)
    network = common.build_network(args, SimpleNamespace(names=range(21)), CPU)
    own = network.backbone.state_dict()
    assert (
        network.spec["deep_stem"] == 64
        and network.spec["style"] == "torchvision"
        and len(own) == len(state) - 2
    )
    for key, value in state.items():
        if not key.startswith("fc."):
            ours = key.replace("stem.7.", "bn1.").replace("stem.", "conv1.")
            assert torch.equal(own[ours], value), key
    output = capsys.readouterr().out
    assert f"{len(own)} loaded, skipped 2 (fc.weight, fc.bias)" in output
    again = common.make_network(network.spec)  # from a checkpoint's description
    again.load_state_dict(network.state_dict())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        logits = network.eval()(image)
        assert logits.isfinite().all() and torch.equal(again.eval()(image), logits)


# ---- additional pictures of voc --------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    """VOC with the list of the 10,582, which names a val picture too, and without the masks of SegmentationClassAug."""
    root = make_voc(tmp_path / "voc", True)
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    with open(root / "ImageSets/Segmentation/train_aug.txt", "a") as file:
        file.write(f"{VAL[0]}\n")
    return root


@pytest.mark.parametrize(
    "extra, seed, labels", [("all", 0, 2), ("3", 0, 2), ("3", 1, 1), ("1", 2, 4), (None, 0, 2)]
)
def test_extra_pictures_of_voc_are_those_of_the_10582_that_are_neither_in_train_nor_in_val(
    voc, extra, seed, labels
):
    args = voc_arguments(voc, extra=extra, seed=seed, labels=labels)
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    chosen = (
        []
        if extra is None
        else common.hash_order(seed, EXTRA)[: 4 if extra == "all" else int(extra)]
    )
    assert (
        data.train == TRAIN
        and data.val == VAL
        and sorted(labeled + unlabeled) == sorted(TRAIN + chosen)
        and len(labeled) == labels
    )
    assert unlabeled[4 - labels :] == chosen and set(labeled) <= set(TRAIN)
    for id in chosen:
        assert data.files[id][1] is None and (data.label(id) == 255).all()
    if chosen:
        batch = next(
            common.batches(
                common.Stream(data, chosen, "unlabeled", args, labeled=False), args, CPU, 0, 1
            )
        )
        assert (batch["truth"] == 255).all() and batch["image"].float().std() > 10


@pytest.mark.parametrize("extra", ["5", "0", "many"])
def test_more_extra_pictures_than_there_are(voc, extra):
    assert f"--extra {extra}: " in refused(voc, extra=extra) and "1 to 4" in refused(
        voc, extra=extra
    )


def test_extra_pictures_without_their_list_or_on_vocaug(voc):
    assert "--extra all" in refused(voc, dataset="vocaug", extra="all")
    (voc / "ImageSets/Segmentation/train_aug.txt").unlink()
    message = refused(voc, extra="all")
    assert "train_aug.txt" in message and "trainaug.txt" in message and "10,582" in message
    assert common.open_dataset(voc_arguments(voc)).extra == []


@pytest.fixture
def lists(tmp_path):
    """Two lists as UniMatch has them: the second names pictures of train and extra ones."""
    (tmp_path / "labeled.txt").write_text(
        "".join(f"JPEGImages/{id}.jpg SegmentationClass/{id}.png\n" for id in TRAIN[:2])
    )
    (tmp_path / "unlabeled.txt").write_text(
        "".join(f"JPEGImages/{id}.jpg SegmentationClass/{id}.png\n" for id in TRAIN[2:] + EXTRA)
    )
    return [str(tmp_path / "labeled.txt"), str(tmp_path / "unlabeled.txt")]


def test_the_second_list_of_a_split_may_name_extra_pictures(voc, lists):
    args = voc_arguments(voc, extra="all", split=lists)
    labeled, unlabeled = common.split(args, common.open_dataset(args))
    assert labeled == TRAIN[:2] and set(unlabeled) == set(TRAIN[2:] + EXTRA)
    assert EXTRA[0] in refused(voc, split=lists) and "--extra all" in refused(voc, split=lists)


def test_an_extra_picture_that_a_list_names_is_no_second_time_among_the_unlabeled(voc, lists):
    args = voc_arguments(voc, extra="all", split=lists)
    assert common.split(args, common.open_dataset(args))[1] == TRAIN[2:] + EXTRA


# ---- neighbours of a share -------------------------------------------------------------------------------------------


def shares(processes, monkeypatch, batch_size, **options):
    result = []
    for process in range(processes):
        monkeypatch.setattr(common, "world_size", lambda: processes)
        monkeypatch.setattr(common, "rank", lambda: process)
        args = SimpleNamespace(batch_size=batch_size, workers=0)
        result.append(list(common.batches(stream(), args, CPU, 0, 3, **options)))
    return result


@pytest.mark.parametrize("processes, batch_size", [(2, 4), (4, 4), (2, 2), (3, 7), (4, 12)])
def test_with_overlap_a_share_has_the_first_picture_of_the_next_one_too(
    processes, batch_size, monkeypatch
):
    (whole,) = shares(1, monkeypatch, batch_size, overlap=True)
    parts, plain = (
        shares(processes, monkeypatch, batch_size, overlap=True),
        shares(processes, monkeypatch, batch_size),
    )
    for t in range(3):
        assert whole[t]["position"] == list(
            range(batch_size * t, batch_size * (t + 1))
        )  # one process: no picture more
        own = [part[t]["position"] for part in plain]
        for i, part in enumerate(parts):
            expected = own[i] + [own[(i + 1) % processes][0]]
            assert part[t]["position"] == expected
            places = [p - batch_size * t for p in expected]
            for key in ("image", "label", "valid"):
                assert torch.equal(part[t][key], whole[t][key][places])


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_are_mixed_as_the_whole_batch(processes, monkeypatch):
    (whole,) = shares(1, monkeypatch, 4, overlap=True)
    mask = torch.rand(3, 4, 32, 32) < 0.5
    parts = shares(processes, monkeypatch, 4, overlap=True)
    for t in range(3):
        mixed = [
            mkd.cutmix(part[t]["image"], own)
            for part, own in zip(parts, mask[t].split(4 // processes))
        ]
        assert torch.equal(torch.cat(mixed), mkd.cutmix(whole[t]["image"], mask[t]))
