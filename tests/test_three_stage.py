"""The parts of three_stage.py, each against a naive version.

Strong views against PIL, losses and steps, branches, the mean teacher, tables."""

import copy
import math
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import common
import three_stage
from helpers import at_pixels

K = 5
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")
SIZES = [(32, 32), (33, 47), (64, 128)]
LEVELS = range(1, 10)
SIGNED = [*range(-9, 0), *LEVELS]


# ---- geometric operations ------------------------------------------------------------------------


def affine(a, b, c, d, e, f):
    return lambda picture, fill: picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.NEAREST,
        fillcolor=fill,
    )


PIL_GEOMETRIC = {
    "Rotate": lambda v: (
        lambda picture, fill: picture.rotate(-3 * v, Image.Resampling.NEAREST, fillcolor=fill)
    ),  # signs come in pairs
    "ShearX": lambda v: affine(1, 0.03 * v, 0, 0, 1, 0),
    "ShearY": lambda v: affine(1, 0, 0, 0.03 * v, 1, 0),
    "TranslateX": lambda v: affine(1, 0, v, 0, 1, 0),
    "TranslateY": lambda v: affine(1, 0, 0, 0, 1, v),
}


def coordinates(height, width):
    """A picture (3, H, W) and label maps (2, H, W).

    The picture shows at each pixel its row, its column and 200, the maps row and column."""
    rows, columns = (
        x.to(torch.uint8)
        for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    return torch.stack([rows, columns, torch.full_like(rows, 200)]), torch.stack([rows, columns])


def source(maps, x, y):
    """Where the center of pixel (x, y) comes from: through the last map, then the one before, .."""
    x, y = x + 0.5, y + 0.5
    for matrix in reversed(maps):
        (a, b, c), (d, e, f), _ = matrix.tolist()
        x, y = a * x + b * y + c, d * x + e * y + f
    return x, y


def on_an_edge(x, y):
    """Between two pixels: rounding decides. (PIL computes in 16 bits behind the point.)"""
    return abs(x - round(x)) < 4e-3 or abs(y - round(y)) < 4e-3


def agree(image, labels):
    """Picture and labels of coordinates(), moved, agree at each pixel; outside is 128 and 255."""
    outside = image[2] == 128
    assert set(image[2].flatten().tolist()) <= {128, 200}
    assert torch.equal(outside, labels[0] == 255) and torch.equal(outside, labels[1] == 255)
    assert (image[:2] == torch.where(outside, 128, labels)).all()
    return True


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PIL_GEOMETRIC)
def test_each_geometric_operation_is_that_of_pil(name, size):
    image, labels = coordinates(*size)
    for v in SIGNED:
        matrix = three_stage.GEOMETRIC[name](v, *size)
        moved, moved_labels = three_stage.warp(image, labels, matrix)
        assert (
            moved.shape == image.shape
            and moved_labels.shape == labels.shape
            and moved.dtype == moved_labels.dtype == torch.uint8
        )
        assert agree(moved, moved_labels) and not torch.equal(moved, image)
        by_pil = [
            np.array(PIL_GEOMETRIC[name](v)(Image.fromarray(channel.numpy()), fill))
            for channel, fill in zip([*image, *labels], [128] * 3 + [255] * 2)
        ]
        different = (torch.cat([moved, moved_labels]) != torch.from_numpy(np.stack(by_pil))).any(0)
        assert (
            all(on_an_edge(*source([matrix], x, y)) for y, x in different.nonzero().tolist())
            and different.float().mean() < 0.05
        )
        assert not different.any() or "Translate" not in name


@pytest.mark.parametrize("level", SIGNED)
def test_a_rotation_takes_each_pixel_from_where_a_naive_loop_in_double_precision_does(level):
    """In single precision one pixel of 65 x 97 comes from its neighbor at 27 degrees."""
    height, width = 65, 97
    image, labels = coordinates(height, width)
    moved, _ = three_stage.warp(image, labels, three_stage.GEOMETRIC["Rotate"](level, 65, 97))
    cos, sin = np.cos(np.radians(3 * level)), np.sin(np.radians(3 * level))
    for y, x in product(range(height), range(width)):
        right, down = x + 0.5 - width / 2, y + 0.5 - height / 2
        column = int(np.floor(cos * right + sin * down + width / 2))
        row = int(np.floor(cos * down - sin * right + height / 2))
        is_inside = 0 <= row < height and 0 <= column < width
        assert moved[:, y, x].tolist() == ([row, column, 200] if is_inside else [128] * 3)


def test_the_shift_of_a_translation_is_its_level():
    image, labels = coordinates(40, 50)
    assert torch.equal(
        three_stage.warp(image, labels, three_stage.GEOMETRIC["TranslateX"](9, 40, 50))[0][
            :, :, :41
        ],
        image[:, :, 9:],
    )
    assert torch.equal(
        three_stage.warp(image, labels, three_stage.GEOMETRIC["TranslateY"](-9, 40, 50))[1][:, 9:],
        labels[:, :31],
    )


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_composed_operations_are_one_look_up_through_all_maps(size):
    image, labels = coordinates(*size)
    r, (height, width) = common.rng("compose"), size
    for n in [2, 3] * 10:
        names = [list(PIL_GEOMETRIC)[r.randint(5)] for _ in range(n)]
        maps = [three_stage.GEOMETRIC[name](SIGNED[r.randint(18)], *size) for name in names]
        composed, step_by_step = np.linalg.multi_dot(maps), (image, labels)
        for matrix in maps:
            step_by_step = three_stage.warp(*step_by_step, matrix)
        moved, moved_labels = three_stage.warp(image, labels, composed)
        assert agree(moved, moved_labels)
        for y, x in product(range(height), range(width)):
            column, row = source(maps, x, y)
            if not on_an_edge(column, row):
                inside = 0 <= column < width and 0 <= row < height
                assert moved[:, y, x].tolist() == (
                    [int(row), int(column), 200] if inside else [128] * 3
                ), (names, y, x)
        known = (moved_labels[0] != 255) & (step_by_step[1][0] != 255)
        assert (moved_labels.int() - step_by_step[1].int()).abs()[
            :, known
        ].max() <= 2  # one operation after the other: rounded each time


def test_the_identity_leaves_every_bit():
    image, labels = (
        torch.randint(256, (3, 33, 47), dtype=torch.uint8),
        torch.randint(256, (2, 33, 47), dtype=torch.uint8),
    )
    moved, moved_labels = three_stage.warp(image, labels, np.eye(3))
    assert torch.equal(moved, image) and torch.equal(moved_labels, labels)


# ---- photometric operations ----------------------------------------------------------------------

# How many grey levels ours may be off, and PIL's operation. (torchvision rounds means and blends in
# another way.)
PIL_PHOTOMETRIC = {
    "Identity": (0, lambda picture, v: picture),
    "AutoContrast": (1, lambda picture, v: ImageOps.autocontrast(picture)),
    "Equalize": (0, lambda picture, v: ImageOps.equalize(picture)),
    "Solarize": (0, lambda picture, v: ImageOps.solarize(picture, 256 - 25.6 * v)),
    "Posterize": (0, lambda picture, v: ImageOps.posterize(picture, 4 - int(0.4 * v))),
    "Color": (1, lambda picture, v: ImageEnhance.Color(picture).enhance(0.18 * v + 0.1)),
    "Contrast": (1, lambda picture, v: ImageEnhance.Contrast(picture).enhance(0.18 * v + 0.1)),
    "Brightness": (0, lambda picture, v: ImageEnhance.Brightness(picture).enhance(0.18 * v + 0.1)),
    "Sharpness": (1, lambda picture, v: ImageEnhance.Sharpness(picture).enhance(0.18 * v + 0.1)),
}


def pictures():
    noise = torch.randint(256, (3, 33, 47), dtype=torch.uint8)
    street = torch.from_numpy(common.draw_street("test")[0].transpose(2, 0, 1).copy())
    return {
        "noise": noise,
        "pale": noise // 6 + 90,
        "street": street,
        "one color": torch.full((3, 32, 32), 77, dtype=torch.uint8),
    }


@pytest.mark.parametrize("name", PIL_PHOTOMETRIC)
def test_each_photometric_operation_is_that_of_pil(name):
    tolerance, operation = PIL_PHOTOMETRIC[name]
    for image, v in product(pictures().values(), LEVELS):
        ours, before = three_stage.PHOTOMETRIC[name](image, v), image.clone()
        theirs = torch.from_numpy(
            np.array(operation(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), v))
        ).permute(2, 0, 1)
        assert ours.dtype == torch.uint8 and (ours.int() - theirs.int()).abs().max() <= tolerance
        assert torch.equal(image, before)


def test_the_fourteen_operations():
    names = "AutoContrast Brightness Color Contrast Equalize Identity Posterize Rotate Sharpness "
    names += "ShearX ShearY Solarize TranslateX TranslateY"
    assert sorted([*three_stage.PHOTOMETRIC, *three_stage.GEOMETRIC]) == names.split()


# ---- strong views --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The operations only write down (name, level) of the view that is being made."""
    made = []

    def photometric(name):
        return lambda image, v: made.append((name, v)) or image

    def geometric(name):
        return lambda v, *size: made.append((name, v)) or np.eye(3)

    for table, recorder in (
        (three_stage.PHOTOMETRIC, photometric),
        (three_stage.GEOMETRIC, geometric),
    ):
        for name in table:
            monkeypatch.setitem(table, name, recorder(name))
    return made


def test_three_operations_with_replacement_each_with_probability_one_half(calls):
    image, labels = (
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
    )
    views = []
    for i in range(2400):
        three_stage.strong_view(image, labels, inside(image), [common.rng("statistics", i)], 8)
        views.append(list(calls))
        calls.clear()
    for n, share in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8)):  # of views with n operations
        assert sum(len(view) == n for view in views) == pytest.approx(
            2400 * share, abs=4 * (2400 * share * (1 - share)) ** 0.5
        )
    made = sum(views, [])
    total = len(made)
    for name in [*three_stage.PHOTOMETRIC, *three_stage.GEOMETRIC]:
        assert sum(n == name for n, _ in made) == pytest.approx(
            total / 14, abs=4 * (total / 14) ** 0.5
        )
    assert {abs(v) for _, v in made} == set(LEVELS)
    for level in LEVELS:
        assert sum(abs(v) == level for _, v in made) == pytest.approx(
            total / 9, abs=4 * (total / 9) ** 0.5
        )
    signs = [v > 0 for name, v in made if name in three_stage.GEOMETRIC]
    assert sum(signs) == pytest.approx(len(signs) / 2, abs=4 * (len(signs) / 4) ** 0.5)
    assert all(v > 0 for name, v in made if name in three_stage.PHOTOMETRIC)
    twice = sum(view[0][0] == view[1][0] for view in views if len(view) == 2)
    assert twice == pytest.approx(900 / 14, abs=4 * (900 / 14) ** 0.5)


def generators(*names):
    return [common.rng("strong", name) for name in names]


def inside(images):
    """Crops without padding."""
    return [(0, images.shape[2], 0, images.shape[3])] * len(images)


def test_a_view_depends_on_its_picture_and_generator_alone():
    images, labels = (
        torch.randint(256, (6, 3, 33, 47), dtype=torch.uint8),
        torch.randint(K, (6, 2, 33, 47), dtype=torch.uint8),
    )
    before = images.clone(), labels.clone()
    strong, moved = three_stage.strong_view(
        images, labels, inside(images), generators(*range(6)), 8
    )
    assert (
        strong.shape == images.shape
        and moved.shape == labels.shape
        and strong.dtype == moved.dtype == torch.uint8
    )
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    again = three_stage.strong_view(
        images, labels, inside(images), generators(*range(6)), 8
    )
    assert torch.equal(strong, again[0]) and torch.equal(moved, again[1])
    for i in range(6):
        part = images[i : i + 1], labels[i : i + 1], inside(images[:1])
        alone = three_stage.strong_view(*part, generators(i), 8)
        assert torch.equal(strong[i : i + 1], alone[0]) and torch.equal(moved[i : i + 1], alone[1])
        other = three_stage.strong_view(*part, generators(f"other {i}"), 8)
        assert not torch.equal(strong[i : i + 1], other[0])
    none = three_stage.strong_view(images[:0], labels[:0], [], [], 8)
    assert torch.equal(none[0], images[:0]) and torch.equal(none[1], labels[:0])


def test_picture_and_labels_stay_together_to_the_pixel(monkeypatch):
    for name in three_stage.PHOTOMETRIC:
        monkeypatch.setitem(three_stage.PHOTOMETRIC, name, lambda image, v: image)
    image, labels = coordinates(33, 47)
    moved, cut = 0, []
    for i in range(100):
        (strong,), (after,) = three_stage.strong_view(
            image[None], labels[None], inside(image[None]), generators(f"together {i}"), 8
        )
        outside = after[0] == 255
        hidden = (strong == 128).all(0) & ~outside  # by Cutout: labels are not cut
        assert torch.equal(outside, after[1] == 255) and (strong[:, outside] == 128).all()
        assert torch.equal(strong[:2, ~outside & ~hidden], after[:, ~outside & ~hidden])
        cut.append(int(hidden.sum()))
        moved += not torch.equal(after, labels)
    assert 40 < moved < 60  # 1 - (1 - 5/14 / 2) ** 3 = .446, of 100
    assert max(cut) <= 3 * 8 * 8 and min(cut) > 0


def test_what_comes_from_outside_is_grey_whatever_else_was_done():
    """Equalize, Solarize and others would change a grey that was there before them."""
    image, labels, seen = (
        torch.randint(256, (1, 3, 32, 40), dtype=torch.uint8),
        torch.ones(1, 1, 32, 40, dtype=torch.uint8),
        0,
    )
    for i in range(100):
        strong, moved = three_stage.strong_view(
            image, labels, inside(image), generators(f"grey {i}"), 4
        )
        outside = moved[0, 0] == 255
        assert (strong[0][:, outside] == 128).all()
        seen += int(outside.any())
    assert seen > 30


def test_padding_is_no_part_of_the_picture(monkeypatch):
    """Photometric operations neither change padding nor count it in means and histograms; Cutout
    hides as much of a picture as without padding."""
    for name in three_stage.GEOMETRIC:
        monkeypatch.setitem(three_stage.GEOMETRIC, name, lambda v, *size: np.eye(3))
    picture = torch.randint(20, 90, (1, 3, 20, 31), dtype=torch.uint8)
    labels = torch.ones(1, 1, 32, 40, dtype=torch.uint8)
    changed = 0
    for padding in (0, 124, 255):
        images = torch.full((1, 3, 32, 40), padding, dtype=torch.uint8)
        images[:, :, 3:23, 9:40] = picture  # flipped crops have padding on the left
        for i in range(60):
            strong, _ = three_stage.strong_view(
                images, labels, [(3, 23, 9, 40)], generators(f"padding {i}"), 4
            )
            alone, _ = three_stage.strong_view(
                picture, labels[..., :20, :31], inside(picture), generators(f"padding {i}"), 4
            )
            assert torch.equal(strong[..., 3:23, 9:40], alone)
            strong[..., 3:23, 9:40] = padding
            assert (strong == padding).all()
            changed += not torch.equal(alone, picture)
    assert changed > 90


# ---- Cutout --------------------------------------------------------------------------------------


class Centres:
    """A generator that draws the given rows and columns of the centres."""

    def __init__(self, height, rows, columns):
        self.height, self.rows, self.columns = height, list(rows), list(columns)

    def randint(self, high):
        return (self.rows if high == self.height else self.columns).pop(0)


@pytest.mark.parametrize(
    "rows, columns",
    [
        ((10, 20, 30), (10, 25, 40)),
        ((0, 32, 0), (0, 46, 46)),
        ((16, 17, 18), (20, 20, 21)),
        ((3, 32, 31), (44, 1, 23)),
    ],
)
@pytest.mark.parametrize("side", [8, 7, 1, 100])
def test_cutout_against_a_naive_loop(side, rows, columns):
    image = torch.randint(129, 256, (3, 33, 47), dtype=torch.uint8)
    before = image.clone()
    three_stage.cutout(image, side, Centres(33, rows, columns))
    for y, x in product(range(33), range(47)):
        hidden = any(
            0 <= y - (row - side // 2) < side and 0 <= x - (column - side // 2) < side
            for row, column in zip(rows, columns)
        )
        assert image[:, y, x].tolist() == ([128] * 3 if hidden else before[:, y, x].tolist())


def test_cutout_has_three_squares_around_uniform_centres():
    height, width, side, n = 16, 20, 6, 3000
    hidden = torch.zeros(height, width)
    for generator in generators(*range(n)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        three_stage.cutout(image, side, generator)
        hidden += image[0] / 128
    for y, x in product(range(height), range(width)):
        around = sum(
            abs(y + 0.5 - row) < 3 and abs(x + 0.5 - column) < 3
            for row in range(height)
            for column in range(width)
        )  # centres that hide this pixel
        share = 1 - (1 - around / (height * width)) ** 3
        assert hidden[y, x].item() == pytest.approx(
            n * share, abs=5 * (n * share * (1 - share)) ** 0.5
        )


# ---- second branches -----------------------------------------------------------------------------


def network_of(backbone, classes, **spec):
    return common.make_network(
        dict(
            network="deeplabv2",
            backbone=backbone,
            head="plain",
            aspp_branches=4,
            batch_norm="frozen",
            style="torchvision",
            classes=classes,
        )
        | spec
    )


def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize(
    "classes, aspp_2, aspp_3",
    [  # four 3 x 3 convs of 1024 (conv6) and of 2048 (conv5) channels: weights and biases
        (19, 4 * (3 * 3 * 1024 * 19 + 19), 4 * (3 * 3 * 2048 * 19 + 19)),
        (21, 4 * (3 * 3 * 1024 * 21 + 21), 4 * (3 * 3 * 2048 * 21 + 21)),
    ],
)
def test_table_vii_sizes_of_the_branches(classes, aspp_2, aspp_3):
    with torch.device("meta"):  # shapes alone
        network, image = network_of("resnet101", classes), torch.rand(2, 3, 321, 321)
        hat, tilde = (
            three_stage.SecondBranch(network, classes, kind) for kind in ("g-hat", "g-tilde")
        )
        for branch in (hat, tilde):
            for logits in three_stage.TwoBranches(network, branch)(image):
                assert logits.shape == (2, classes, 41, 41)
            assert [conv.dilation for conv in branch.aspp] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    conv6 = 3 * (
        1024 * 256 + 3 * 3 * 256 * 256 + 256 * 1024
    )  # three bottlenecks 1 x 1, 256; 3 x 3, 256; 1 x 1, 1024, on the 1024 channels of conv4
    conv6 += 1024 * 1024  # the first one's projection, as conv5 has it
    norms = 3 * 2 * (256 + 256 + 1024) + 2 * 1024  # frozen
    assert count(hat, trained=True) == conv6 + aspp_2 and count(hat) == conv6 + aspp_2 + norms
    assert count(tilde, trained=True) == count(tilde) == aspp_3
    assert [
        conv.dilation
        for conv in hat.conv6.modules()
        if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3)
    ] == [(4, 4)] * 3


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_batch_norm_of_a_branch_is_that_of_its_backbone(batch_norm):
    with torch.device("meta"):
        network = network_of("resnet50", K, batch_norm=batch_norm)
        norms = [
            m
            for m in three_stage.SecondBranch(network, K, "g-hat").modules()
            if isinstance(m, torch.nn.BatchNorm2d)
        ]
    assert (
        len(norms) == 10
        and {type(m) for m in norms} == {type(network.backbone.bn1)}
        and {m.training for m in norms} == {batch_norm == "train"}
    )


def moved_by_g(kind):
    """Names of the parameters of f to which a loss on g alone gives gradient."""
    network = network_of("tiny", K)
    branch = three_stage.SecondBranch(network, K, kind)
    f, g = three_stage.TwoBranches(network, branch)(torch.rand(2, 3, 32, 64))
    g.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in branch.parameters())
    assert not {id(p) for p in branch.parameters()} & {id(p) for p in network.parameters()}
    moved = {
        name
        for name, p in network.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert all(p.grad is None for name, p in network.named_parameters() if name not in moved)
    return network, moved


@pytest.mark.parametrize(
    "kind, shared",
    [
        ("g-hat", "conv1 bn1 layer1 layer2 layer3"),
        ("g-tilde", "conv1 bn1 layer1 layer2 layer3 layer4"),
    ],
)
def test_g_teaches_f_through_the_shared_blocks_alone(kind, shared):
    """To f's last two blocks, or its last one, goes no gradient."""
    network, moved = moved_by_g(kind)
    assert moved == {
        name
        for name, _ in network.named_parameters()
        if name.startswith(tuple(f"backbone.{block}." for block in shared.split()))
    }


@pytest.mark.parametrize(
    "backbone, size", [("tiny", (32, 64)), ("tiny", (33, 47)), ("resnet50", (33, 33))]
)
def test_f_beside_a_branch_is_the_network_alone_bit_for_bit(backbone, size):
    network, image = network_of(backbone, K).eval(), torch.rand(2, 3, *size)
    alone = network(image)
    for kind in ["g-hat", "g-tilde"]:
        branch = three_stage.SecondBranch(network, K, kind)
        f, g = three_stage.TwoBranches(network, branch)(image)
        assert torch.equal(f, alone) and g.shape == f.shape and not torch.equal(f, g)
    f, g = three_stage.TwoBranches(network, None)(image)
    assert torch.equal(f, alone) and g is None


# ---- the mean teacher ----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.0, 1.0])
def test_ema_is_a_weighted_mean_and_copies_buffers(decay):
    student = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    teacher = copy.deepcopy(student).requires_grad_(False)
    for p in student.parameters():
        torch.nn.init.normal_(p)
    before = copy.deepcopy([list(teacher.parameters()), list(student.parameters())])
    student(torch.randn(4, 2, 3, 3))
    three_stage.update_teacher(teacher, student, decay)
    for new, old, p in zip(teacher.parameters(), *before):
        expected = decay * old + (1 - decay) * p
        assert torch.allclose(new, expected, atol=1e-6) and (
            torch.equal(new, expected) or 0 < decay < 1
        )
    assert all(map(torch.equal, before[1], student.parameters())) and not any(
        p.requires_grad for p in teacher.parameters()
    )
    assert (
        all(map(torch.equal, teacher.buffers(), student.buffers()))
        and teacher[1].num_batches_tracked == 1
        and teacher[1].running_mean.abs().sum() > 0
    )


def test_the_decay_of_each_epoch_is_that_of_the_authors():
    """60 epochs of 1000 iterations; .99 in epochs 0 to 19, .995 to 39, .9975 to 49, then .999."""
    decays = three_stage.PAPER["cityscapes"]["ema_decay"]
    for iteration in {epoch * 1000 + i for epoch in range(60) for i in (0, 1, 500, 999)}:
        epoch = iteration // 1000
        assert three_stage.decay_at(iteration / 60_000, decays) == (
            0.99 if epoch < 20 else 0.995 if epoch < 40 else 0.9975 if epoch < 50 else 0.999
        )
    for n in (
        6,
        1200,
        2000,
        20_000,
    ):  # stages of other lengths: the very first iteration at or behind the border
        for i in range(n):
            assert three_stage.decay_at(i / n, "0123") == str(
                (3 * i >= n) + (3 * i >= 2 * n) + (6 * i >= 5 * n)
            )


# ---- losses --------------------------------------------------------------------------------------


def test_eq_2_cross_entropy_is_the_mean_over_valid_pixels():
    logits, label = 3 * torch.randn(2, K, 3, 4), torch.randint(K, (2, 3, 4))
    label[0, 1] = 255
    total, n = 0.0, 0
    for b, y, x in product(range(2), range(3), range(4)):
        if label[b, y, x] != 255:
            z = logits[b, :, y, x].tolist()
            total += math.log(sum(map(math.exp, z))) - z[label[b, y, x]]
            n += 1
    assert n == 20 and three_stage.cross_entropy(logits, label).item() == pytest.approx(
        total / n, abs=1e-5
    )


@pytest.mark.parametrize("pictures", [2, 0])
def test_a_loss_of_nothing_is_0_with_gradient_0(pictures):
    logits = torch.randn(pictures, K, 3, 4, requires_grad=True)
    loss = three_stage.cross_entropy(logits, torch.full((pictures, 3, 4), 255))
    loss.backward()
    assert (
        loss.shape == ()
        and loss.item() == 0
        and logits.grad.shape == logits.shape
        and not logits.grad.any()
    )


def test_the_mean_of_the_processes_losses_is_the_loss_of_the_whole_batch(monkeypatch):
    logits, label = torch.randn(3, K, 3, 4), torch.randint(K, (3, 3, 4))
    label[0, :2] = (
        255  # the processes have different numbers of valid pixels, and the last has no picture
    )
    whole, valid = three_stage.cross_entropy(logits, label), (label != 255).sum()
    monkeypatch.setattr(three_stage, "all_reduce", lambda n: valid)
    monkeypatch.setattr(common, "world_size", lambda: 3)
    parts = [
        three_stage.cross_entropy(logits[share], label[share])
        for share in (slice(1), slice(1, 3), slice(3, 3))
    ]
    assert (sum(parts) / 3).item() == pytest.approx(whole.item(), abs=1e-6)


# ---- one step ------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def arguments(*argv):
    return common.parse_args(three_stage.get_parser(), three_stage.PAPER, list(map(str, argv)))


STEP = """--labels 3 --stage1-iterations 2 --iterations 2 --crop 32 64 --scale .3 .45 --batch-size 3
    --labeled-batch-size 2 --stage1-batch-size 2 --lambda1 .3 --lambda2 .7
    --ema-decay .5 .6 .7 .8 --precision fp32""".split()


class SixStreets(common.Streets):
    def __init__(self):
        super().__init__()
        self.train, self.val = self.train[:6], self.val[:1]


def turn(maps):
    """A rotation by 180 degrees."""
    return maps.flip(-1, -2)


@pytest.fixture
def second_step(tmp_path, monkeypatch):
    """second_step(stage, flags): what went through the second step of a stage, a namespace.

    Pseudo-masks are the number of their stage everywhere. A and B are a rotation by 180 degrees,
    and A inverts the picture."""
    seen = SimpleNamespace(batches=[], teachers=[], passes=[], drawn=[], decays=[])
    real = SimpleNamespace(
        batches=common.batches,
        write=common.write_pseudo_label,
        update=three_stage.update_teacher,
        step=common.Run.step,
        parallel=common.parallel,
    )

    def batches(*args):
        for batch in real.batches(*args):
            seen.batches.append(batch)
            yield batch

    def write(folder, id, label, colors):
        real.write(folder, id, np.full_like(label, int(folder.name[-1])), colors)

    def parallel(network, device):
        """What a network gets and returns is written down."""

        def write_down(module, inputs, outputs):
            seen.passes.append((module, inputs[0], outputs))

        network = copy.copy(network)
        network._forward_hooks = network._forward_hooks.copy()
        network.register_forward_hook(write_down)
        return real.parallel(network, device)

    def update(teacher, student, decay):
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        real.update(teacher, student, decay)
        seen.decays.append(decay)
        seen.teachers.append(copy.deepcopy(teacher))

    def turned(images, labels, inside, randoms, side):
        assert all(0 <= top < bottom <= 32 and right <= 64 for top, bottom, _, right in inside)
        assert side == 8 and labels.dtype == torch.uint8
        assert len(images) == len(labels) == len(randoms) == 3
        seen.drawn.append([r.randint(10**9) for r in randoms])
        return 255 - turn(images), turn(labels)

    def scale(scaler, loss):
        seen.loss = loss.item()
        return loss

    def go(stage, flags):
        def step(run, iteration, losses, *rest, **numbers):
            if (run.stage, iteration) == (stage, 1):
                seen.losses = {name: value.item() for name, value in losses.items()}
                raise Stop
            real.step(run, iteration, losses, *rest, **numbers)

        argv = [*STEP, "--stages", str(stage), "--out", str(tmp_path / "run"), *flags.split()]
        monkeypatch.setattr(sys, "argv", ["three_stage.py", *argv])
        monkeypatch.setattr(common, "Streets", SixStreets)
        monkeypatch.setattr(common, "batches", batches)
        monkeypatch.setattr(common, "write_pseudo_label", write)
        monkeypatch.setattr(common, "parallel", parallel)
        monkeypatch.setattr(three_stage, "update_teacher", update)
        monkeypatch.setattr(three_stage, "strong_view", turned)
        monkeypatch.setattr(common.Run, "step", step)
        monkeypatch.setattr(common.Run, "panel", lambda *_, **__: None)
        monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
        with pytest.raises(Stop):
            three_stage.main()
        seen.args = arguments(*argv)
        return seen

    return go


def at_crop(logits):
    return at_pixels(logits, (32, 64), 4)


def loss_of(logits, label):
    return F.cross_entropy(logits, label, ignore_index=255).item()


def test_eq_2_the_loss_of_a_step_of_stage_1(second_step):
    seen = second_step(1, "")
    _, image, logits = seen.passes[-1]
    labeled = seen.batches[-1]
    assert len(labeled["image"]) == 2
    assert (labeled["label"] == 255).any()  # small pictures: the crop reaches beyond them
    assert torch.equal(image, labeled["image"] / 255)
    expected = loss_of(at_crop(logits), labeled["label"])
    assert seen.losses == pytest.approx({"loss_labeled": expected}, abs=1e-5)
    assert seen.loss == pytest.approx(expected, abs=1e-5)
    assert seen.decays == [0.5, 0.6]


@pytest.mark.parametrize(
    "stage, flags",
    [
        (2, ""),
        (3, ""),
        (2, "--no-strong"),
        (3, "--no-consistency"),
        (2, "--no-pseudo-masks"),
        (3, "--branch g-hat"),
        (2, "--branch g-tilde"),
        (2, "--no-pseudo-masks --no-consistency"),
        (2, "--no-ema"),
    ],
)
def test_eqs_1_to_5_the_losses_of_a_step(stage, flags, second_step):
    """Computed again from the batches, the teacher and the outputs of the networks."""
    seen = second_step(stage, flags)
    args = seen.args
    decays = [0.0, 0.0] if "--no-ema" in flags else [0.5, 0.6]  # the stage begins; half is done
    assert seen.decays == decays * stage
    module, image, (f, g) = seen.passes[-1]
    labeled, labeled_masks, union = seen.batches[-3:]
    assert len(labeled["image"]) == 2 and len(union["image"]) == 3
    assert (labeled["label"] == 255).any() and not union["valid"].all()

    strong = args.strong and (args.consistency or args.pseudo_masks)
    move = turn if strong else lambda maps: maps
    view = 255 - turn(union["image"]) if strong else union["image"]
    view = torch.cat([labeled["image"], view])  # Sub-batch 2: A = B = identity
    assert torch.equal(image, view / 255)
    drawn = sum(seen.drawn[-2:], [])  # every picture of two steps has its own generator
    assert len(set(drawn)) == (6 if strong else 0)

    f = at_crop(f)
    expected = {"loss_labeled": loss_of(f[:2], labeled["label"])}  # Eq. 2
    total = expected["loss_labeled"]
    if args.consistency:
        weak = torch.cat([labeled["image"], union["image"]])
        valid = torch.cat([labeled["valid"], union["valid"]])
        teacher_label = at_crop(seen.teachers[-2](weak / 255)).argmax(1).masked_fill(~valid, 255)
        target = torch.cat([teacher_label[:2], move(teacher_label[2:])])
        expected["loss_consistency"] = loss_of(f, target)  # Eq. 1
        total += 0.3 * expected["loss_consistency"]
    if args.pseudo_masks:
        for part in (labeled_masks, union):  # labeled pictures have pseudo-masks too
            assert torch.equal(part["label"], torch.where(part["valid"], stage - 1, 255))
        for key in ("image", "valid"):
            assert torch.equal(labeled_masks[key], labeled[key])
        target = torch.cat([labeled_masks["label"], move(union["label"])])
        expected["loss_pseudo"] = loss_of(at_crop(g), target)  # Eq. 3
        total += 0.7 * expected["loss_pseudo"]
        default = stage == 2 and flags != "--branch g-tilde"
        is_g_hat = module.branch.conv6 is not None
        assert is_g_hat == (default or flags == "--branch g-hat")
    else:
        assert g is None
    assert seen.losses == pytest.approx(expected, abs=1e-5)
    assert seen.loss == pytest.approx(total, abs=1e-5)  # Eqs. 4, 5


# ---- batches over processes ----------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_position_exactly_once_in_the_order_of_one_process(processes, size, monkeypatch):
    data = common.Streets()
    stream = common.Stream(
        data, data.train[:4], "test", SimpleNamespace(seed=0, crop=(32, 32), scale=(1.0, 1.0))
    )

    def shares(n):
        monkeypatch.setattr(common, "world_size", lambda: n)
        each = []
        for rank in range(n):
            monkeypatch.setattr(common, "rank", lambda: rank)
            each.append(
                list(
                    common.batches(
                        stream, SimpleNamespace(batch_size=99, workers=0), CPU, 3, 5, size
                    )
                )
            )
        return list(zip(*each))  # for each iteration the parts of the processes

    for t, parts, (whole,) in zip((3, 4), shares(processes), shares(1)):
        assert (
            whole["position"]
            == [t * size + j for j in range(size)]
            == sum((part["position"] for part in parts), [])
        )
        lengths = [len(part["position"]) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        for key in ("image", "label", "valid"):
            assert [len(part[key]) for part in parts] == lengths and {
                part[key].dtype for part in parts
            } == {whole[key].dtype}
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
        assert all(part.keys() == whole.keys() for part in parts)


def test_an_empty_share_of_a_stream_without_labels(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 1)
    data, args = (
        common.Streets(),
        SimpleNamespace(seed=0, crop=(32, 32), scale=(1.0, 1.0), batch_size=1, workers=0),
    )
    (batch,) = common.batches(
        common.Stream(data, data.train[:4], "test", args, labeled=False), args, CPU, 0, 1
    )
    assert batch["truth"].shape == (0, 32, 32) and "label" not in batch


# ---- the paper's numbers -------------------------------------------------------------------------

# Dataset; labels as one may write them; pictures from L, from L and U; lambda 1 = lambda 2.
ROWS = [
    ("cityscapes", ("100", "1/30", "372", "1/8", "744", "1/4"), 1, 4, 1 / 2),
    ("cityscapes", ("1488", "1448", "1/2"), 3, 2, 1 / 2),
    ("vocaug", ("106", "1/100", "212", "1/50"), 1, 9, 1 / 4),
    ("vocaug", ("529", "1/20"), 1, 9, 5 / 4),
    ("vocaug", ("1323", "1/8"), 2, 8, 5 / 8),
]


@pytest.mark.parametrize("dataset, labels, n_labeled, n_all, weight", ROWS)
def test_the_papers_settings(dataset, labels, n_labeled, n_all, weight):
    for n in labels:
        a = arguments("--dataset", dataset, "--labels", n)
        assert (a.labeled_batch_size, a.batch_size, a.stage1_batch_size, a.lambda1, a.lambda2) == (
            n_labeled,
            n_all,
            n_labeled + n_all,
            weight,
            weight,
        )
        assert (
            a.lr,
            a.head_lr,
            a.weight_decay,
            a.optimizer,
            a.batch_norm,
            a.iterations,
            a.stage1_iterations,
        ) == (3e-5, 1, 0, "adamw", "frozen", 60_000, None)
        assert (a.size, a.crop, a.scale) == (
            ((512, 1024), (256, 512), (1, 1))
            if dataset == "cityscapes"
            else (None, (321, 321), (0.5, 1.5))
        )
        assert (a.network, a.head, a.backbone, a.weights, a.aspp_branches) == (
            "deeplabv2",
            "plain",
            "resnet101",
            "imagenet",
            4,
        )
        assert (a.stages, a.ema_decay, a.cutout, a.pseudo_masks_of, a.branch) == (
            3,
            (0.99, 0.995, 0.9975, 0.999),
            32,
            "teacher",
            None,
        )
        assert (
            a.consistency
            and a.pseudo_masks
            and a.strong
            and a.ema
            and not a.flip
            and not a.base_size
            and a.changed == []
        )


CITYSCAPES = "--dataset cityscapes"
VOC = "--dataset vocaug"
COCO = "--dataset vocaug --weights coco"
TABLES = [  # Tables II, III, IV: the rows "Ours" and "DeeplabV2"
    (CITYSCAPES, {"1/30": 54.85, "1/8": 62.82, "1/4": 65.80, "1/2": 67.11, "1/1": None}),
    (CITYSCAPES + " --supervised", {"1/30": None, "1/8": 56.2, "1/4": 60.2, "1/1": 66.0}),
    (VOC, {"1/100": 55.13, "1/50": 62.71, "1/20": 68.23, "1/8": 69.36}),
    (VOC + " --supervised", {"1/50": 48.3, "1/20": 56.8, "1/8": 62.0, "1/1": 70.7}),
    (COCO, {"1/100": 63.82, "1/50": 70.77, "1/20": 71.90, "1/8": 72.95}),
    (COCO + " --supervised", {"1/50": 53.2, "1/20": 58.7, "1/8": 65.2, "1/1": 73.6}),
]


def printed(*argv):
    """The paper's number that a run with these arguments prints."""
    args = arguments(*argv)
    pictures = range(2975 if args.dataset == "cityscapes" else 10_582)
    data = SimpleNamespace(name=args.dataset, train=pictures)
    args.labels = common.count_labels(args.labels, data)
    return three_stage.paper_miou(args)


def test_tables_ii_to_iv():
    for flags, row in TABLES:
        for labels, number in row.items():
            argv = [*flags.split(), "--labels", labels]
            assert printed(*argv) == printed(*argv, "--split", "split_0.pkl") == number
            assert printed(*argv, "--seed", "2") == number
            assert printed(*argv, "--lr", "1") is None
    assert printed("--dataset", "cityscapes", "--labels", "1448") == 67.11  # Sect. IV-A
    assert printed("--dataset", "cityscapes", "--labels", "99") is None


def test_fig_3():
    """The best mIoU is .708, at lambda 1/4 (the default) and 1/2."""
    argv = [*COCO.split(), "--labels", "1/50"]
    assert printed(*argv, "--lambda1", ".5", "--lambda2", ".5") == 70.8
    assert printed(*argv, "--lambda1", ".25", "--lambda2", ".25") == 70.77
    assert printed(*argv, "--lambda1", ".5") is None


def test_a_list_has_the_papers_number_of_as_many_labels(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"2007_{i:06d}\n" for i in range(212)))
    args = arguments(*COCO.split(), "--split", tmp_path / "list.txt")
    args.labels = 212  # as split() counts them
    assert three_stage.paper_miou(args) == 70.77


@pytest.mark.parametrize("flags, cityscapes, voc", [
    ("", 54.85, 70.77),  # Table V, from the first row to the last
    ("--stages 1", 46.91, 55.20),
    ("--stages 2", 53.25, 68.50),
    ("--no-consistency", 50.2, 59.82),
    ("--no-pseudo-masks", 52.63, 68.21),
    ("--no-strong", 47.96, 64.37),
    ("--branch g-hat", 53.80, 69.52),
    ("--no-ema", 53.37, 66.83),  # Table VI
    ("--no-ema --stages 2", 51.68, 64.88),
    ("--stages 4", 55.21, 70.89),  # Sect. IV-C
])
def test_tables_v_and_vi_and_the_fourth_stage(flags, cityscapes, voc):
    flags = flags.split()
    assert printed("--dataset", "cityscapes", "--labels", "100", *flags) == cityscapes
    of_voc = ["--dataset", "vocaug", "--labels", "1/50", "--weights", "coco"]
    assert printed(*of_voc, *flags) == voc
    if flags:
        assert printed("--dataset", "cityscapes", "--labels", "372", *flags) is None
        assert printed(*of_voc[:-2], *flags) is None
        assert printed(*of_voc, *flags, "--lambda1", "1") is None


@pytest.mark.parametrize(
    "flags",
    [
        "--lambda1 1",
        "--no-ema",
        "--stages 4",
        "--branch g-hat",
        "--no-strong",
        "--ema-decay .9 .9 .9 .9",
        "--head-lr .3",
        "--cutout 16",
    ],
)
def test_another_setting_than_the_papers_is_told_apart(flags):
    assert arguments("--dataset", "cityscapes", "--labels", "100", *flags.split()).changed == [
        flags.split()[0].strip("-").removeprefix("no-").replace("-", "_")
    ]
