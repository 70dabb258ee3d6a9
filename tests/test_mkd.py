"""The parts of mutual knowledge distillation, each against a naive version written from the paper.

A whole step by hand, the paper's settings, and what the method needs of common.py.
"""

import colorsys
import copy
import itertools
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import common
import mkd
from helpers import FewStreets, equal, run_on_few_streets
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


# ---- Eq. 1 ---------------------------------------------------------------------------------------


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "t, gamma, decay", [(1, 0.4, 0.0), (2, 0.9, 0.5), (9, 0.4, 0.4), (9, 0.9, 8 / 9), (9, 0.0, 0.0)]
)
def test_eq_1_moves_every_parameter_and_copies_the_buffers(t, gamma, decay):
    """In the first steps gamma is at most 1 - 1 / t."""
    teachers = [small_network(), small_network()]
    students = [small_network(), small_network()]
    for student in students:
        student(torch.rand(2, 3, 8, 8))  # statistics, and their counter
        nn.init.normal_(student[1].weight)
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    of_students = [copy.deepcopy(student.state_dict()) for student in students]
    mkd.update_teachers(teachers, students, t - 1, gamma)
    for teacher, old, new in zip(teachers, before, of_students):
        for name, p in teacher.named_parameters():
            torch.testing.assert_close(p.data, decay * old[name] + (1 - decay) * new[name])
            assert p.grad_fn is None
        for name, b in teacher.named_buffers():
            assert torch.equal(b, new[name]) and not torch.equal(b, old[name])
    assert equal([student.state_dict() for student in students], of_students)


def test_in_the_first_step_the_teacher_is_its_student_bit_for_bit():
    teacher, student = small_network(), small_network()
    mkd.update_teachers([teacher], [student], 0, 0.99)
    assert equal(teacher.state_dict(), student.state_dict())


# ---- Eq. 3: the covariances ----------------------------------------------------------------------


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
    """Five batches that differ in size, mean and spread.

    Class 0 is in none of them, class 1 in some; class 4 is a single pixel.
    """
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


def test_the_diagonal_is_that_of_the_full_covariance():
    diagonal, full = mkd.ClassStatistics(K, C), mkd.ClassStatistics(K, C, True)
    for features, label in uneven_batches():
        diagonal.update(features, label)
        full.update(features, label)
    torch.testing.assert_close(diagonal.covariance, full.covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "label",
    [torch.full((2, 3, 3), 255), torch.zeros(0, 3, 3, dtype=torch.int64)],
    ids=["all unknown", "no picture"],
)
def test_a_batch_without_known_pixels_changes_no_bit(full, label):
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
    statistics = mkd.ClassStatistics(1, 1)
    n = 8
    value = float(before)
    statistics.count[0] = before
    statistics.mean[0] = 1.0
    statistics.covariance[0] = 2.0
    features = value + torch.tensor([-1024.0, 1024.0] * 4).view(1, 1, 2, 4)
    statistics.update(features, torch.zeros(1, 2, 4, dtype=torch.int64))
    total = before + n
    mean = (before * 1.0 + n * value) / total
    square = (before * (2.0 + 1.0) + float(features.double().square().sum())) / total
    assert float(statistics.mean) == pytest.approx(mean, rel=1e-5) and float(
        statistics.covariance
    ) == pytest.approx(square - mean**2, rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_features_in_bfloat16_are_summed_in_float32(full):
    features, label = (torch.randn(2, C, 48, 48) + 4).bfloat16(), labels(2, 48, 48)
    statistics = mkd.ClassStatistics(K, C, full)
    statistics.update(features, label)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float32
    check_statistics(statistics, [(features, label)], rtol=1e-4, atol=1e-4)


# ---- Eq. 3: the term -----------------------------------------------------------------------------


def some_covariance(full):
    a = torch.randn(K, C, C)
    return a @ a.mT if full else a.diagonal(dim1=1, dim2=2).square()


def term_by_hand(weight, covariance, y, j):
    v = weight[j] - weight[y]
    sigma = torch.diag(covariance[y]) if covariance.ndim == 2 else covariance[y]
    return v @ sigma @ v


def augmented(logits, label, weight, covariance, strength):
    """FD with a given covariance."""
    statistics = SimpleNamespace(covariance=covariance, update=lambda features, label: None)
    return mkd.augment_features(logits.detach(), logits, label, weight, statistics, strength)


@pytest.mark.parametrize("through_w", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_augmented_logits_in_value_and_gradient(full, through_w):
    """Eq. 3 as printed has a gradient through w in its last term, too; a detached w has none."""
    weight = torch.randn(K, C, requires_grad=True)
    bias = torch.randn(K)
    covariance = some_covariance(full)
    strength = 0.7
    features = torch.randn(2, C, 3, 4, requires_grad=True)
    label = labels(2, 3, 4)
    push = torch.randn(2, K, 3, 4)
    w = weight if through_w else weight.detach()

    def logits():
        return torch.einsum("kc,bchw->bkhw", weight, features) + bias.view(-1, 1, 1)

    expected = torch.zeros(2, K, 3, 4)
    for b, j, y, x in itertools.product(range(2), range(K), range(3), range(4)):
        expected[b, j, y, x] = logits()[b, j, y, x]
        k = int(label[b, y, x])
        if k != 255:
            expected[b, j, y, x] += strength / 2 * term_by_hand(w, covariance, k, j)
    ours = augmented(logits(), label, w, covariance, strength)
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad((ours * push).sum(), (features, weight), retain_graph=True)
    by_hand = torch.autograd.grad((expected * push).sum(), (features, weight))
    for gradient, gradient_by_hand in zip(gradients, by_hand):
        torch.testing.assert_close(gradient, gradient_by_hand)
    plain = torch.autograd.grad((logits() * push).sum(), weight)[0]
    assert torch.allclose(gradients[1], plain, atol=1e-5) == (not through_w)


@pytest.mark.parametrize("full", [False, True])
def test_cross_entropy_of_augmented_logits_is_eq_3(full):
    weight = torch.randn(K, C)
    bias = torch.randn(K)
    covariance = some_covariance(full)
    strength = 1.5
    features = torch.randn(40, C)
    label = torch.randint(K, (40,))
    expected = []
    for f, y in zip(features, label.tolist()):
        total = 0
        for j in range(K):
            v = weight[j] - weight[y]
            term = strength / 2 * term_by_hand(weight, covariance, y, j)
            total += math.exp(v @ f + bias[j] - bias[y] + term)
        expected.append(math.log(total))
    logits = (features @ weight.T + bias).T[None, :, :, None]
    label = label.view(1, -1, 1)
    ours = augmented(logits, label, weight, covariance, strength)
    assert float(F.cross_entropy(ours, label)) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_the_term_is_zero_for_the_pixels_class_and_unknown_pixels_and_never_negative(full):
    weight = torch.randn(K, C) * 1e-3 + 50  # an expanded square would lose all digits here
    covariance = some_covariance(full)
    table = torch.empty(K, K)
    for y, j in itertools.product(range(K), range(K)):
        v = (weight[j] - weight[y]).double()
        sigma = covariance[y].double()
        table[y, j] = float(v @ (sigma if full else torch.diag(sigma)) @ v)
    assert (table.diagonal() == 0).all() and (table > 0).sum() == K * (K - 1)
    label = torch.arange(K).repeat(2)[None, :, None]
    label[0, K:] = 255
    zeros = torch.zeros(1, K, 2 * K, 1)
    moved = augmented(zeros, label, weight, covariance, 2.0)[0, :, :, 0].T  # (pixel, class)
    torch.testing.assert_close(moved[:K], table, rtol=1e-4, atol=0)
    assert (moved.diagonal() == 0).all() and (moved >= 0).all() and (moved[K:] == 0).all()
    assert (augmented(zeros, label, weight, covariance, 0.0) == 0).all()


def test_statistics_are_of_the_pixels_whose_class_is_known_and_not_of_the_shifted_ones():
    features = torch.randn(3, C, 4, 3, requires_grad=True)
    logits = torch.randn(3, K, 4, 3)
    label = labels(3, 4, 3)
    weight = torch.randn(K, C, 1, 1)
    statistics = mkd.ClassStatistics(K, C)
    ours = mkd.augment_features(features, logits, label, weight, statistics, 1.5)
    expected = mkd.ClassStatistics(K, C)
    expected.update(features.detach(), label)
    assert equal(statistics.state_dict(), expected.state_dict())
    assert int(statistics.count.sum()) == int((label != 255).sum())
    term = augmented(logits, label, weight, expected.covariance, 1.5)
    torch.testing.assert_close(ours, term)


# ---- views ---------------------------------------------------------------------------------------


class Draws:
    """A generator whose numbers are given; it keeps the bounds that randint was asked for."""

    def __init__(self, uniform=(), randint=()):
        self.numbers = list(uniform)
        self.places = list(randint)
        self.bounds = []

    def uniform(self, *range):
        return self.numbers.pop(0)

    def randint(self, bound):
        self.bounds.append(bound)
        return self.places.pop(0)


def mask_of(size, r):
    return mkd.cutmix_mask(torch.zeros(size, dtype=torch.bool), r)


def test_three_boxes_by_hand_off_again_where_two_overlap():
    """u = .36: height .36 ^ .5 = .6, width .6; over root 3, 33 of 96 rows, 67 of 192 columns."""
    r = Draws([0.36, 0.5, 0.36, 0.5, 0.25, 0.0], [0, 0, 20, 40, 41, 81])
    mask = mask_of((96, 192), r)
    expected = np.zeros((96, 192), int)
    expected[0:33, 0:67] += 1
    expected[20:53, 40:107] += 1
    expected[41 : 41 + 55, 81 : 81 + 28] += 1  # height 1, width .25
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), expected % 2 == 1) and expected.max() == 2
    assert r.bounds == [96 - 33 + 1, 192 - 67 + 1] * 2 + [96 - 55 + 1, 192 - 28 + 1]
    assert not r.numbers and not r.places


def test_boxes_lie_inside_the_picture_at_any_place_and_have_their_area():
    areas = []
    reached = torch.zeros(60, 90, dtype=torch.bool)
    for seed in range(500):
        mask = mask_of((60, 90), common.rng(seed))
        r = common.rng(seed)
        expected = np.zeros((60, 90), bool)
        total = 0
        for _ in range(3):
            u = r.uniform(0.25, 0.5)
            height = u ** r.uniform()
            h = round(60 * height / math.sqrt(3))
            w = round(90 * u / height / math.sqrt(3))
            top = r.randint(60 - h + 1)
            left = r.randint(90 - w + 1)
            assert abs(h * w / 5400 - u / 3) < 0.02 and top + h <= 60 and left + w <= 90
            box = np.zeros_like(expected)
            box[top : top + h, left : left + w] = True
            expected = expected ^ box
            total += h * w
        assert np.array_equal(mask.numpy(), expected)
        areas.append([float(mask.float().mean()), total / 5400])
        reached |= mask
    mixed, boxes = np.mean(areas, 0)
    assert boxes == pytest.approx(0.375, abs=0.01)
    assert mixed == pytest.approx(0.25, abs=0.02)  # what overlaps is lost twice
    assert reached.float().mean() > 0.99
    assert all(edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (512, 1024)])
def test_a_mask_of_any_size(size):
    assert all(mask_of(size, common.rng(seed)).shape == size for seed in range(20))


def mixed_by_hand(x, mask):
    result = x[: len(mask)].clone()
    for b, i, j in np.argwhere(mask.numpy()):
        result[b, ..., i, j] = x[(b + 1) % len(x), ..., i, j]
    return result


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("more", [0, 1])
def test_pictures_logits_and_labels_are_mixed_by_the_same_mask_with_the_next_picture(more, start):
    """The first start pictures stay as they are; after the last comes the first, or one more."""
    mask = torch.rand(3, 6, 7) < 0.4
    count = start + 3 + more
    for x in (
        pictures(count, (6, 7)),
        torch.randn(count, K, 6, 7),
        labels(count, 6, 7),
        torch.rand(count, 6, 7) < 0.5,
    ):
        mixed = mkd.cutmix(x, mask, start)
        expected = torch.cat([x[:start], mixed_by_hand(x[start:], mask)])
        assert mixed.dtype == x.dtype and torch.equal(mixed, expected)
        following = x[start + 3] if more else x[start]
        assert torch.equal(mixed[start + 2][..., mask[2]], following[..., mask[2]])
        unmixed = mkd.cutmix(x, torch.zeros_like(mask), start)
        assert torch.equal(unmixed, x[: start + 3])


def test_the_same_gradient_goes_where_the_logits_came_from():
    logits, mask = torch.randn(2, K, 4, 4, requires_grad=True), torch.rand(2, 4, 4) < 0.5
    mkd.cutmix(logits, mask).sum().backward()
    assert torch.equal(
        logits.grad, (1.0 - mask.float() + mask.roll(1, 0).float())[:, None].expand_as(logits)
    )


NAMES = ["color_jitter", "blur", "equalize", "solarize", "grey"]


def test_one_of_five_operations_by_its_share(monkeypatch):
    constants = [lambda image, r, k=k: torch.full_like(image, k) for k in range(5)]
    monkeypatch.setattr(mkd, "OPERATIONS", constants)
    n = 6000
    image = torch.zeros(3, 1, 1, dtype=torch.uint8)
    counts = Counter(int(mkd.strong_view(image, common.rng(seed))[0]) for seed in range(n))
    for k, weight in enumerate((3, 5, 1, 1, 5)):
        share = weight / 15
        assert abs(counts[k] - n * share) < 4 * math.sqrt(n * share * (1 - share)), NAMES[k]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_operations_do(name, monkeypatch):
    monkeypatch.setattr(mkd.V, "gaussian_blur", lambda image, size, sigma: image * 0 + 1)
    for color in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(mkd.V, f"adjust_{color}", lambda image, factor: image * 0 + 2)
    image = (torch.randint(256, (3, 24, 40)) // 2 + 40).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = {
        "color_jitter": lambda: np.full((24, 40, 3), 2),
        "blur": lambda: np.full((24, 40, 3), 1),
        "equalize": lambda: np.asarray(ImageOps.equalize(picture)),
        "solarize": lambda: np.asarray(ImageOps.solarize(picture, 128)),
        "grey": lambda: np.repeat(np.asarray(picture.convert("L"))[..., None], 3, 2),
    }[name]()
    result = mkd.OPERATIONS[NAMES.index(name)](image, common.rng(0))
    assert result.dtype == torch.uint8 and result.shape == image.shape
    difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max()
    assert difference <= (name == "grey")


def views(operation, image, seed, inside=None):
    whole = [(0, image.shape[2], 0, image.shape[3])] * len(image)
    batch = {"image": image, "inside": inside or whole, "position": list(range(len(image)))}
    return mkd.views(operation, batch, SimpleNamespace(seed=seed), "strong")


@pytest.mark.parametrize("operation", [mkd.strong_view, common.distort])
def test_padding_is_neither_recolored_nor_counted(operation):
    """What a view makes of a padded picture is what it makes of the picture alone."""
    pictures_alone = pictures(30, (20, 30))
    padded = torch.full((30, 3, 33, 41), 124, dtype=torch.uint8)
    padded[:, :, 5:25, 11:] = pictures_alone
    view = views(operation, padded, 3, [(5, 25, 11, 41)] * 30)
    assert torch.equal(view[:, :, 5:25, 11:], views(operation, pictures_alone, 3))
    assert not torch.equal(view, padded)
    view[:, :, 5:25, 11:] = 124
    assert (view == 124).all()


def test_a_picture_that_is_thinner_than_a_blur_stays_as_it_is():
    image = pictures(40, (8, 40))
    assert torch.equal(views(mkd.strong_view, image, 0, [(2, 5, 0, 40)] * 40), image)
    assert not torch.equal(views(mkd.strong_view, image, 0, [(2, 6, 0, 40)] * 40), image)


def test_each_picture_has_an_operation_that_its_position_and_the_seed_decide():
    image = pictures(40)
    one = views(mkd.strong_view, image, 7)
    assert torch.equal(one, views(mkd.strong_view, image, 7))
    assert one.dtype == torch.uint8 and one.shape == image.shape
    alone = [mkd.strong_view(image[i], common.rng(7, "strong", i)) for i in range(40)]
    assert torch.equal(one, torch.stack(alone))
    assert sum(torch.equal(*pair) for pair in zip(one, image)) < 3
    grey = [bool((x[0] == x[1]).all()) for x in one]
    assert 5 < sum(grey) < 25
    assert not torch.equal(one, views(mkd.strong_view, image, 8))
    assert views(mkd.strong_view, image[:0], 7).shape == (0, 3, 24, 40)


COLORS = ("brightness", "contrast", "saturation", "hue")


def test_color_jitter_in_its_ranges_and_in_random_order(monkeypatch):
    calls = []
    for color in COLORS:

        def adjust(image, factor, color=color):
            calls.append((color, float(factor)))
            return image + 1

        monkeypatch.setattr(mkd.V, f"adjust_{color}", adjust)
    for seed in range(500):
        jittered = mkd.color_jitter(torch.zeros(3, 1, 1), common.rng(seed))
        assert (jittered == 4).all()  # one after the other
    quadruples = [calls[i : i + 4] for i in range(0, 2000, 4)]
    orders = {tuple(color for color, _ in quadruple) for quadruple in quadruples}
    assert len(calls) == 2000 and orders == set(itertools.permutations(COLORS))
    for color in COLORS:
        low, high = (-0.25, 0.25) if color == "hue" else (0.5, 1.5)
        drawn = np.array([factor for name, factor in calls if name == color])
        near = (high - low) / 50
        assert low <= drawn.min() < low + near and high - near < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 2 * near
    factors = np.array([[dict(quadruple)[color] for color in COLORS] for quadruple in quadruples])
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.2  # four independent numbers


def test_blur_in_its_ranges(monkeypatch):
    calls = []

    def gaussian_blur(image, size, sigma):
        calls.append((size, sigma))
        return image

    monkeypatch.setattr(mkd.V, "gaussian_blur", gaussian_blur)
    for seed in range(300):
        mkd.OPERATIONS[NAMES.index("blur")](torch.zeros(3, 8, 8), common.rng(seed))
    sizes = Counter(size for size, _ in calls)
    sigmas = np.array([sigma for _, sigma in calls])
    assert set(sizes) == {3, 5, 7} and min(sizes.values()) > 70
    assert 0.1 <= sigmas.min() < 0.15 and 1.95 < sigmas.max() <= 2.0


def test_distortion_depends_on_position_and_seed_alone_and_not_on_torchs_generator():
    image = pictures(12)
    state = torch.get_rng_state()
    one = views(common.distort, image, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.dtype == torch.uint8 and one.shape == image.shape
    torch.rand(5)
    assert torch.equal(one, views(common.distort, image, 0))
    assert torch.equal(one[5], common.distort(image[5], common.rng(0, "strong", 5)))
    assert sum(torch.equal(*pair) for pair in zip(one, image)) < 4
    assert not torch.equal(one, views(common.distort, image, 1))


class Chosen:
    """Numbers for common.distort(): by how much, and which of its parts take place."""

    def __init__(self, brightness=0.0, saturation=1.0, hue=0, contrast=1.0, last=False, parts=()):
        order = ["brightness", "saturation", "hue"]
        order.insert(3 if last else 1, "contrast")
        happens = [0.4 if name in parts else 0.6 for name in order]
        self.numbers = [brightness, saturation, contrast, *happens]
        self.integers = [hue, int(last)]
        self.ranges = []

    def uniform(self, *bounds):
        self.ranges.append(bounds)
        return self.numbers.pop(0)

    def randint(self, *bounds):
        self.ranges.append(bounds)
        return self.integers.pop(0)


def distorted(color, **chosen):
    """A flat picture of this color, distorted by the operations that are named: its color."""
    r = Chosen(parts=chosen.keys(), **chosen)
    image = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, 5, 4)
    result = common.distort(image, r)
    assert result.dtype == torch.uint8 and (result == result[:, :1, :1]).all()
    ranges = [(-32, 32), (0.5, 1.5), (-18, 18), (2,), (0.5, 1.5), (), (), (), ()]
    assert r.ranges == ranges  # MMSegmentation's defaults
    return result[:, 0, 0].tolist()


def test_operations_of_the_distortion_in_closed_form():
    grey = [100, 100, 100]
    assert distorted(grey, contrast=0.5) == [50, 50, 50]  # x <- c x, not a mix with the mean
    assert distorted([200, 100, 30], contrast=1.5) == [255, 150, 45]
    assert distorted([0, 100, 250], brightness=-20.0) == [0, 80, 230]
    assert distorted([0, 100, 250], brightness=20.0) == [20, 120, 255]
    # V 200, S 1/2: S becomes 3/4, 1/4, at most 1
    assert distorted([200, 100, 100], saturation=1.5) == [200, 50, 50]
    assert distorted([200, 100, 100], saturation=0.5) == [200, 150, 150]
    assert distorted([200, 80, 20], saturation=1.5) == [200, 67, 0]  # S .9 -> 1, at the same hue
    for factor in (0.5, 1.5):
        assert distorted(grey, saturation=factor) == grey
        assert distorted([0, 0, 0], saturation=factor) == [0, 0, 0]
    # a unit of hue is 2 degrees; 60 degrees turn red into yellow
    assert distorted([200, 0, 0], hue=15) == [200, 100, 0]
    assert distorted([200, 0, 0], hue=-15) == [200, 0, 100]
    assert distorted(grey, hue=17) == grey
    assert distorted([200, 100, 30]) == [200, 100, 30]


@pytest.mark.parametrize("last", [False, True])
def test_distortion_is_that_of_mmsegmentation_pixel_by_pixel(last):
    """Brightness; contrast in one of two places; saturation and hue in HSV."""
    image = pictures(1, (6, 9))[0]
    chosen = dict(brightness=25.0, saturation=1.3, hue=-11, contrast=0.8)
    ours = common.distort(image, Chosen(last=last, parts=chosen.keys(), **chosen))
    contrast = lambda color: np.clip(0.8 * color, 0, 255)  # noqa: E731
    for y, x in itertools.product(range(6), range(9)):
        color = np.clip(image[:, y, x].numpy() + 25.0, 0, 255)
        color = color if last else contrast(color)
        h, s, v = colorsys.rgb_to_hsv(*color / 255)
        color = 255 * np.array(colorsys.hsv_to_rgb((h - 22 / 360) % 1, min(1, 1.3 * s), v))
        color = contrast(color) if last else color
        assert np.abs(ours[:, y, x].numpy() - color).max() < 2.5, (y, x)  # rounding of each step


# ---- pseudo-labels -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("loss_stride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("crop", [(64, 96), (61, 125), (321, 321), (40, 33)])
def test_maps_at_the_stride_of_the_losses_lie_where_labels_do(crop, loss_stride, stride):
    """Cell i of both lies on pixel i times the stride; borders continue beyond the last cell."""
    args = SimpleNamespace(crop=crop, loss_stride=loss_stride)
    rows, columns = (torch.arange(0, side, stride).float() for side in crop)
    maps = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]  # the pixel's place
    place = torch.stack(torch.meshgrid(*map(torch.arange, crop), indexing="ij"))
    place = place[:, ::loss_stride, ::loss_stride]
    expected = torch.stack([place[0].clamp(max=rows[-1]), place[1].clamp(max=columns[-1])])
    torch.testing.assert_close(mkd.at_stride(maps, stride, args)[0], expected.float())


# ---- losses and networks -------------------------------------------------------------------------


def cross_entropy_by_hand(logits, label):
    total = 0.0
    count = 0
    for b, y, x in itertools.product(*map(range, label.shape)):
        k = int(label[b, y, x])
        if k != 255:
            pixel = logits[b, :, y, x]
            total = total + pixel.logsumexp(0) - pixel[k]
            count += 1
    return total / max(count, 1)


def test_cross_entropy_is_the_mean_over_known_pixels_and_zero_without_any():
    logits = torch.randn(2, K, 5, 6, requires_grad=True)
    label = labels(2, 5, 6, unknown=0.5)
    ours = mkd.cross_entropy(logits, label)
    expected = cross_entropy_by_hand(logits, label)
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    none = mkd.cross_entropy(logits, torch.full_like(label, 255))
    none.backward()
    assert float(none.detach()) == 0 and (logits.grad == 0).all()


def test_the_ensemble_is_the_mean_of_logits():
    networks = [nn.Conv2d(3, K, 3) for _ in range(2)]
    image = torch.rand(2, 3, 8, 8)
    expected = (networks[0](image) + networks[1](image)) / 2
    torch.testing.assert_close(mkd.Ensemble(networks)(image), expected)


# ---- a whole step by hand ------------------------------------------------------------------------

STEP = (
    "--labels 4 --batch-size 2 --crop 32 64 --scale .3 .7 --seed 2 --iterations 1 --warmup 0 "
    "--loss-stride 4 --cutmix --optimizer sgd --lr .5 --weight-decay 0 --log-every 1"
)


def every_fourth(x):
    """Pixels (B, .., 32, 64) at --loss-stride 4: cell i of a loss is centered on pixel 4 i."""
    return x[..., ::4, ::4]


def at_stride(maps):
    """Maps of stride 2: their cell i is centered on pixel 2 i."""
    return maps[..., ::2, ::2]


def at_pixels(maps):
    """Maps (B, K, 16, 32) of stride 2 at all pixels: halfway between two cells, or the last one."""
    for axis, cells in ((2, 16), (3, 32)):
        pixel = torch.arange(2 * cells)
        below = maps.index_select(axis, pixel // 2)
        above = maps.index_select(axis, ((pixel + 1) // 2).clamp(max=cells - 1))
        maps = (below + above) / 2
    return maps


class Step:
    """The first iteration of a run on few streets: inputs, networks before, losses, weights after.

    It is also the last, so that lambda is lambda0; and at t = 1 each teacher is its student.
    """

    def __init__(self, folder, *flags):
        argv = [*STEP.split(), "--out", str(folder), *flags]
        self.args = common.parse_args(mkd.get_parser(), mkd.PAPER, argv)
        self.views = {}  # by name
        self.masks = []
        self.losses = {}
        self.before = []
        self.targets = []  # of cross_entropy, in the order of the calls

        def keep_views(result, operation, batch, args, name):
            self.views[name] = result

        def keep_network(result, *_):
            result.last.weight.data.mul_(30)
            self.before.append(copy.deepcopy(result))

        def keep_losses(result, run, iteration, losses, *_, **__):
            self.losses |= losses

        with pytest.MonkeyPatch.context() as patch:
            self.keep(patch, mkd, "views", keep_views)
            self.keep(patch, mkd, "cutmix_mask", lambda mask, *_: self.masks.append(mask))
            self.keep(
                patch, mkd, "cross_entropy", lambda _, logits, label: self.targets.append(label)
            )
            self.keep(patch, common, "build_network", keep_network)
            self.keep(patch, common.Run, "step", keep_losses)
            run_on_few_streets(mkd, *argv)
        self.after = torch.load(folder / "last.pt", weights_only=True)
        data = FewStreets()
        labeled, unlabeled = common.split(self.args, data)
        self.labeled = self.batch(common.Stream(data, labeled, "labeled", self.args))
        stream = common.Stream(data, unlabeled, "unlabeled", self.args, labeled=False)
        self.unlabeled = self.batch(stream)

    def batch(self, stream):
        return next(common.batches(stream, self.args, CPU, 0, 1))

    @staticmethod
    def keep(patch, module, name, keep):
        """Call keep(result, arguments of the call) after each call of module.name."""
        real = getattr(module, name)

        def spied(*args, **kwargs):
            result = real(*args, **kwargs)
            keep(result, *args, **kwargs)
            return result

        patch.setattr(module, name, spied)

    def prepare(self):
        """The batch: pictures, mask, labels and valid pixels at the stride of the losses."""
        args = self.args
        self.image = self.labeled["image"]
        self.weak = self.unlabeled["image"]
        strong = self.views["strong"] if args.strong else self.weak
        if args.weak_photometric:
            self.image = self.views["distort labeled"]
            self.weak = self.views["distort"]
        no_masks = [torch.zeros(32, 64, dtype=torch.bool)] * 2
        mask = torch.stack(self.masks or no_masks)
        assert bool(self.masks) == (args.cutmix and args.strong)
        assert ("strong" in self.views) == args.strong
        self.strong = mixed_by_hand(strong, mask)
        self.small_mask = every_fourth(mask)
        self.small_label = every_fourth(self.labeled["label"])
        unmixed = every_fourth(self.unlabeled["valid"])
        mixed = every_fourth(mixed_by_hand(self.unlabeled["valid"], mask))
        self.valid = torch.cat([every_fourth(self.labeled["valid"]), mixed])
        # there is padding, and it is mixed
        assert not self.valid[:2].all() and not unmixed.all()
        assert torch.equal(mixed, unmixed) == (not mask.any())

    def highest(self, logits):
        return logits.detach().argmax(1).where(self.valid, 255)

    def augmented(self, features, logits, y, w):
        """FD: p + lambda / 2 v^T Sigma v."""
        table = torch.zeros(10, 10, dtype=torch.float64)
        w = w.flatten(1).double()
        for k, x in pixels_of_classes([(features.detach(), y)]).items():
            sigma = np.cov(x.T, bias=True)
            if self.args.features == "diagonal":
                sigma = np.diag(np.diag(sigma))
            for j in range(10):
                v = w[j] - w[k]
                table[k, j] = self.args.lambda0 / 2 * (v @ torch.from_numpy(sigma) @ v)
        term = torch.zeros_like(logits)
        for k, j in itertools.product(range(10), range(10)):
            term[:, j] += (y == k) * table[k, j].float()
        return logits + term

    def label_of_teacher(self, network):
        args = self.args
        with torch.no_grad():
            features = network.features(torch.cat([self.image, self.weak]) / 255.0)
            logits = at_stride(network.classifier(features))
        features = at_stride(features)
        features = torch.cat([features[:2], mixed_by_hand(features[2:], self.small_mask)])
        logits = torch.cat([logits[:2], mixed_by_hand(logits[2:], self.small_mask)])
        confidence = logits.softmax(1).amax(1)
        if args.features_of_teachers:
            y = torch.cat([self.small_label, self.highest(logits)[2:]])
            part = slice(0 if args.labeled_consistency else 2, None)  # what a teacher sees
            shifted = self.augmented(features[part], logits[part], y[part], network.last.weight)
            logits = torch.cat([logits[: part.start], shifted])
        y = self.highest(logits)
        y[confidence < args.threshold] = 255
        return y

    def by_hand(self):
        """Algorithm 1, lines 6 to 15.

        Returns {name of a loss term: value} with gradients, the students that these belong to, and
        the teachers' labels.
        """
        args = self.args
        self.prepare()
        students = copy.deepcopy(self.before)
        teachers = copy.deepcopy(self.before)  # Eq. 1 at t = 1
        first = 0 if args.labeled_consistency else 2
        teacher_labels = [self.label_of_teacher(network)[first:] for network in teachers]
        teacher_of = {"mutual": {1: 2, 2: 1}, "own": {1: 1, 2: 2}, "none": {}}[args.teachers]
        losses = {}
        all_logits = []
        for j, network in enumerate(students, 1):
            features = network.features(torch.cat([self.image, self.strong]) / 255.0)
            coarse = network.classifier(features)
            crop = at_pixels(coarse[:2])
            losses[f"loss_labeled_{j}"] = cross_entropy_by_hand(crop, self.labeled["label"])
            logits = at_stride(coarse)
            if args.features != "none":
                y_u = self.highest(logits)[2:]
                if args.unlabeled_class == "teacher":
                    y_u = teacher_labels[teacher_of[j] - 1][-2:]
                y = torch.cat([self.small_label, y_u])
                w = network.last.weight if args.weight_gradient else network.last.weight.detach()
                logits = self.augmented(at_stride(features), logits, y, w)
            all_logits.append(logits)
        for j, i in teacher_of.items():
            losses[f"loss_st_{j}"] = cross_entropy_by_hand(
                all_logits[j - 1][first:], teacher_labels[i - 1]
            )
        for j, i in ((1, 2), (2, 1)):
            losses[f"loss_ss_{j}"] = cross_entropy_by_hand(
                all_logits[j - 1][first:], self.highest(all_logits[i - 1])[first:]
            )
        return losses, students, teacher_labels


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
        "--no-weight-gradient --lambda0 3",
        "--features full --no-weight-gradient --lambda0 3 --teachers own",
        "--unlabeled-class teacher --lambda0 3",
        "--unlabeled-class teacher --lambda0 3 --threshold .3 --labeled-consistency",
    ],
)
def test_a_step_is_algorithm_1(flags, tmp_path):
    step = Step(tmp_path / "run", *flags.split())
    losses, students, teacher_labels = step.by_hand()
    assert step.losses.keys() == losses.keys()
    for name, value in losses.items():
        value = float(value.detach())
        assert float(step.losses[name].detach()) == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert value > 0.1
    weights = {"labeled": 1.0, "st": step.args.alpha, "ss": step.args.beta}
    total = sum(weights[name.split("_")[1]] * value for name, value in losses.items())  # Eq. 4
    total.backward()
    for j, network in enumerate(students, 1):
        after = step.after["models"][f"student_{j}"]
        for name, p in network.named_parameters():
            expected = p.detach() - step.args.lr * p.grad
            torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-4)
            assert not torch.equal(after[name], p.detach()), name
    # cross_entropy is called for labeled 1, 2, st 1, 2, ss 1, 2
    if step.args.teachers != "none":
        assert not torch.equal(*teacher_labels)  # so that a swap is seen
        for i in (1, 2):
            before = dict(step.before[i - 1].state_dict())
            assert equal(step.after["models"][f"teacher_{i}"], before)
        order = (1, 0) if step.args.teachers == "mutual" else (0, 1)
        for target, i in zip(step.targets[2:4], order):
            assert (target == teacher_labels[i]).float().mean() > 0.99
    if step.args.threshold:
        of_teacher, of_student = step.targets[2], step.targets[4]
        # none of the other student's labels is left out
        assert 0 < (of_teacher != 255).float().mean() < (of_student != 255).float().mean()
    assert not any(y.requires_grad for y in step.targets)


@pytest.mark.parametrize("warmup", [0, 2])
def test_lambda_rises_along_half_a_cosine_and_teachers_follow_eq_1_with_a_quick_start(
    warmup, tmp_path, monkeypatch
):
    """gamma .6: the decay is 0, 1/2, and from then on .6. lambda begins after the warm-up."""
    saved = []
    lambdas = []
    write = common.Run._write_checkpoint

    def keep_weights(run, iteration, keep):
        networks = {name: keep[name] for name in keep if name[:-2] in ("student", "teacher")}
        states = {name: network.state_dict() for name, network in networks.items()}
        saved.append(copy.deepcopy(states))
        write(run, iteration, keep)

    def keep_lambda(*given, real=mkd.augment_features):
        lambdas.append(given[-1])
        return real(*given)

    monkeypatch.setattr(common.Run, "_write_checkpoint", keep_weights)
    monkeypatch.setattr(mkd, "augment_features", keep_lambda)
    flags = (
        "--labels 4 --batch-size 2 --crop 32 64 --iterations 5 --save-every 1 "
        f"--gamma .6 --lr .01 --lambda0 3 --warmup {warmup}"
    )
    run_on_few_streets(mkd, *flags.split(), "--out", tmp_path / "run")
    assert len(saved) == 6 and equal(saved[0]["student_1"], saved[0]["teacher_1"])
    for t in range(1, 6):
        decay = {1: 0.0, 2: 0.5}.get(t, 0.6)
        for i in (1, 2):
            student = saved[t - 1][f"student_{i}"]
            teacher = saved[t - 1][f"teacher_{i}"]
            for name, value in saved[t][f"teacher_{i}"].items():
                expected = decay * teacher[name] + (1 - decay) * student[name]
                torch.testing.assert_close(value, expected)
    count = 5 - warmup
    expected = [3 * (1 - math.cos(math.pi * t / count)) / 2 for t in range(1, count + 1)]
    np.testing.assert_allclose(lambdas, np.repeat(expected, 2))  # two students


# ---- the paper's settings ------------------------------------------------------------------------


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
        for group in common.make_optimizer(args, args.lr, small_network()).param_groups
    }
    assert momentum == 0.9


def test_each_line_of_algorithm_1_is_named_where_it_acts():
    """Lines 1 and 2 say what the data are; line 17 ends the loop."""
    source = Path(mkd.__file__).read_text()
    named = set()
    for numbers in re.findall(r"\blines? (\d+(?:, \d+)*)", source):
        named |= {int(number) for number in numbers.split(", ")}
    assert named == set(range(3, 17))


def test_the_flags_of_open_choices_exist():
    source = Path(mkd.__file__).read_text()
    choices = re.findall(r"# (?:Open|Code): .*(?:\n *#   .*)*", source)
    flags = {flag for choice in choices for flag in re.findall(r"--[a-z][\w-]+", choice)}
    options = {option for action in mkd.get_parser()._actions for option in action.option_strings}
    assert len(choices) >= 18 and len(flags) >= 10
    assert flags <= options
    assert all(";" in choice for choice in choices if "# Open" in choice)


@pytest.mark.parametrize("dataset", ["voc", "vocaug", "streets"])
def test_the_official_preset_is_the_code_where_it_departs_from_the_paper(dataset):
    paper, code = row("--dataset", dataset), row("--dataset", dataset, "--preset", "official")
    assert (
        code.gamma,
        code.weight_gradient,
        code.features_of_teachers,
        code.labeled_consistency,
        code.weak_photometric,
    ) == (0.6, False, True, True, True)
    differs = {name for name, value in vars(paper).items() if getattr(code, name) != value}
    assert differs == {
        "gamma",
        "weight_gradient",
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


# The paper's tables, "Ours", row by row: flags, the values of one more flag, and mIoU.
R101 = "--backbone resnet101"
VOC = "--labels 92 183 366 732"
VOCAUG = "--labels 662 1323 2646 5291"
CITYSCAPES = "--labels 186 372 744 1488"
TABLES = [
    ("Table 1", "--dataset voc", VOC, [60.60, 66.74, 71.01, 72.73]),
    ("Table 1, no dagger", "--dataset voc --extra all", "--labels 1464", [78.14]),
    ("Table 1", f"--dataset voc {R101}", VOC, [65.35, 70.18, 74.44, 75.90]),
    ("Table 1, no dagger", f"--dataset voc --extra all {R101}", "--labels 1464", [79.96]),
    (
        "Table 1",
        "--dataset voc --extra all",
        f"{VOC} 1464",
        [64.92, 69.48, 74.25, 75.89, 77.59],
    ),
    (
        "Table 1",
        f"--dataset voc --extra all {R101}",
        f"{VOC} 1464",
        [69.10, 74.63, 76.76, 78.66, 80.02],
    ),
    (
        "Table 1",
        f"--dataset voc --extra all {R101} --threshold 0.95",
        f"{VOC} 1464",
        [74.40, 75.92, 77.74, 78.68, 80.80],
    ),
    ("Table 2", "--dataset vocaug", VOCAUG, [74.02, 75.24, 76.09, 76.92]),
    ("Table 2", f"--dataset vocaug {R101}", VOCAUG, [75.90, 76.59, 77.62, 78.94]),
    ("Table 2", "--dataset vocaug --split U2PL", VOCAUG, [76.03, 78.03, 77.56, 77.37]),
    ("Table 2", f"--dataset vocaug --split U2PL {R101}", VOCAUG, [78.44, 79.74, 79.55, 80.60]),
    ("Table 2", "--dataset cityscapes", CITYSCAPES, [75.47, 78.07, 79.95, 80.52]),
    ("Table 2", f"--dataset cityscapes {R101}", CITYSCAPES, [77.19, 79.20, 80.80, 81.04]),
    (
        "Table 3",
        "--dataset vocaug --teachers none --no-strong --features none",
        "--labels 662",
        [68.82],
    ),
    (
        "Table 3",
        "--dataset vocaug --teachers own --no-strong --features none",
        "--labels 662",
        [68.85],
    ),
    ("Table 3", "--dataset vocaug --no-strong --features none", "--labels 662", [70.19]),
    ("Table 3", "--dataset vocaug --teachers none --features none", "--labels 662", [72.52]),
    ("Table 3", "--dataset vocaug --teachers none --no-strong", "--labels 662", [70.76]),
    ("Table 3", "--dataset vocaug --features none", "--labels 662", [73.66]),
    ("Table 3", "--dataset vocaug", "--labels 662", [74.02]),
    (
        "Table 4",
        "--dataset vocaug",
        "--gamma 0 0.2 0.4 0.6 0.8",
        [72.41, 72.68, 72.82, 72.74, 72.78],
    ),
    (
        "Table 4",
        f"--dataset vocaug {R101}",
        "--gamma 0 0.2 0.4 0.6 0.8",
        [74.53, 74.60, 75.34, 75.17, 75.07],
    ),
]
for weight in ("--beta", "--alpha"):
    values = f"{weight} 0 0.5 1 1.5 2"
    flags = "--dataset vocaug --features none"
    TABLES += [
        ("Table 5", flags, values, [72.52, 72.80, 73.66, 73.43, 73.49]),
        ("Table 5", f"{flags} {R101}", values, [74.44, 75.81, 75.44, 75.80, 75.64]),
    ]
CELLS = []  # (table, command, mIoU)
for table, flags, values, numbers in TABLES:
    flag, *values = values.split()
    CELLS += [(table, f"{flags} {flag} {x}", miou) for x, miou in zip(values, numbers, strict=True)]


def rows_of(command):
    """What a run of this command says of the paper."""
    args = row(*command.split())
    args.labels = int(args.labels or 662)  # as common.split() leaves it
    return mkd.paper_miou(args)


@pytest.mark.parametrize("table, command, miou", CELLS)
def test_each_cell_of_the_papers_tables_is_printed_by_its_command(table, command, miou):
    numbers = [text.split(" ", 1)[0] for text in rows_of(command) if f" ({table}: " in text]
    assert f"{miou:.2f}" in numbers
    both = command.endswith(("--beta 1", "--alpha 1.5"))  # the same setting twice in Table 5
    assert len(numbers) == 1 + ("U2PL" in command or both)  # a list may be that of CPS


def test_a_setting_that_no_table_has_prints_no_number():
    for command in (
        "--dataset voc --threshold .9",
        "--dataset voc --threshold .95",  # * is with dagger and ResNet-101
        "--dataset voc --extra all --threshold .95 --labels 92",
        "--dataset voc --extra 100",
        "--dataset cityscapes --alpha 1",
        "--dataset cityscapes --gamma .6",
        "--dataset cityscapes --supervised",
        "--dataset vocaug --labels 100",
        "--dataset vocaug --network deeplabv2 --head bottleneck",
        "--dataset vocaug --backbone tiny",
        "--dataset vocaug --no-weight-gradient",
        "--dataset vocaug --unlabeled-class teacher",
        "--dataset vocaug --lambda0 1",
        "--dataset vocaug --iterations 100",
        "--dataset vocaug --gamma .5",
        "--dataset vocaug --gamma .6 --labels 1323",
        "--dataset streets",
    ):
        assert rows_of(command) == [], command


def test_the_official_preset_says_that_the_papers_number_is_of_other_settings():
    found = rows_of("--dataset vocaug --preset official")
    assert "74.02 (Table 2: vocaug --labels 662, without --preset official)" in found
    assert all("without --preset official" in text for text in found)
    assert not any("official" in text for text in rows_of("--dataset vocaug"))


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


# ---- DeepLabv3+ ----------------------------------------------------------------------------------


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
    assert layers[1].shape[2:] == low and layers[4].shape[2:] == high


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
            expected = 1 if b == 0 else dilation  # MMSegmentation: contract_dilation
            assert block.conv2.dilation == block.conv2.padding == (expected, expected)
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
    """{MMSegmentation's key: random tensor} of a ResNet50-V1c with its classifier.

    Layers 1 to 4 have an eighth of the width.
    """
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
    more = dict(output_stride=None, input_style=None, seed=0)
    args = SimpleNamespace(**spec(), **more, weights=str(tmp_path / "v1c.pth"))
    network = common.build_network(args, SimpleNamespace(names=range(21)), CPU)
    loaded = network.backbone.state_dict()
    assert (
        network.spec["deep_stem"] == 64
        and network.spec["style"] == "torchvision"
        and len(loaded) == len(state) - 2
    )
    for key, value in state.items():
        if not key.startswith("fc."):
            ours = key.replace("stem.7.", "bn1.").replace("stem.", "conv1.")
            assert torch.equal(loaded[ours], value), key
    output = capsys.readouterr().out
    assert f"{len(loaded)} loaded, skipped 2 (fc.weight, fc.bias)" in output
    again = common.make_network(network.spec)  # from a checkpoint's description
    again.load_state_dict(network.state_dict())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        logits = network.eval()(image)
        assert logits.isfinite().all() and torch.equal(again.eval()(image), logits)


# ---- additional pictures of voc ------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    """VOC with the list of the 10,582, which names a val picture too.

    It lacks the masks of SegmentationClassAug.
    """
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


# ---- neighbors of a share -----------------------------------------------------------------------


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
        positions = [part[t]["position"] for part in plain]
        for i, part in enumerate(parts):
            expected = positions[i] + [positions[(i + 1) % processes][0]]
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
            mkd.cutmix(part[t]["image"], of_share)
            for part, of_share in zip(parts, mask[t].split(4 // processes))
        ]
        assert torch.equal(torch.cat(mixed), mkd.cutmix(whole[t]["image"], mask[t]))
