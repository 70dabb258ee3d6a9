"""The parts of GuidedMix-Net, each against a naive version written from the paper; a whole step by hand; and what it needs of common.py."""

import math
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import guidedmix
from test_data import arguments as dataset_arguments

K = 5
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def spec(**changes):
    return (
        dict(
            network="guidedmix",
            backbone="tiny",
            head="plain",
            aspp_branches=4,
            batch_norm="frozen",
            style="torchvision",
            classes=10,
            deep_stem=False,
            mitrans=True,
            present=0,
        )
        | changes
    )


def on_paper(**changes):
    """A network that takes no memory."""
    with torch.device("meta"):
        return guidedmix.make_network(spec(backbone="resnet50", batch_norm="train", **changes))


def count(network):
    return sum(p.numel() for p in network.parameters())


def labels(*shape, classes=K, unknown=0.2):
    return torch.where(torch.rand(shape) < unknown, 255, torch.randint(classes, shape))


# ---- Eqs. 1, 9 -------------------------------------------------------------------------------------------------------


def test_eq_1():
    logits, label = torch.randn(2, K, 4, 6), labels(2, 4, 6)
    terms = [
        -math.log(
            math.exp(logits[b, label[b, i, j], i, j])
            / sum(math.exp(logits[b, k, i, j]) for k in range(K))
        )
        for b in range(2)
        for i in range(4)
        for j in range(6)
        if label[b, i, j] != 255
    ]
    assert float(guidedmix.cross_entropy(logits, label)) == pytest.approx(
        sum(terms) / len(terms), rel=1e-5
    )
    assert float(guidedmix.cross_entropy(logits, torch.full_like(label, 255))) == 0


def test_omega_rises_as_exp_minus_5_times_1_minus_t_squared():
    for t in (0, 0.2, 0.5, 0.99):
        assert guidedmix.ramp_up(t) == pytest.approx(math.exp(-5 * (1 - t) ** 2))
    assert (
        guidedmix.ramp_up(0) == pytest.approx(0.0067, abs=1e-4)
        and guidedmix.ramp_up(1) == guidedmix.ramp_up(7.5) == 1
    )


# ---- Eq. 2 -----------------------------------------------------------------------------------------------------------


def test_eq_2():
    guide, picture = torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4, 6)
    mixed = guidedmix.mix(guide, picture, 0.2)
    for b, c, i, j in np.ndindex(2, 3, 4, 6):
        assert mixed[b, c, i, j] == pytest.approx(
            0.2 * float(guide[b, c, i, j]) + 0.8 * float(picture[b, c, i, j]), abs=1e-6
        )
    assert torch.equal(guidedmix.mix(guide, picture, 0.0), picture)


def naive_lambda(alpha, cap, r):
    """As Sect. 3.1 tells it, one draw after the other."""
    while True:
        x = r.beta(alpha, alpha)
        x = min(x, 1 - x)
        if x < cap:
            return x


@pytest.mark.parametrize(
    "alpha, cap",
    [
        (1.0, 0.5),
        (1.0, 0.3),
        (1.0, 0.1),
        (1.0, 0.01),
        (0.4, 0.5),
        (0.4, 0.1),
        (4.0, 0.5),
        (4.0, 0.3),
    ],
)
def test_lambda_is_beta_folded_and_below_the_cap(alpha, cap):
    ours = np.sort(
        [guidedmix.sample_lambda(alpha, cap, common.rng("ours", i)) for i in range(2000)]
    )
    r = common.rng("theirs", alpha, cap)
    theirs = np.sort([naive_lambda(alpha, cap, r) for _ in range(2000)])
    assert 0 <= ours[0] and ours[-1] < cap and len(set(ours)) == 2000
    both = np.sort(np.concatenate([ours, theirs]))
    gap = (
        np.abs(np.searchsorted(ours, both, "right") - np.searchsorted(theirs, both, "right")).max()
        / 2000
    )  # Kolmogorov and Smirnov's
    assert gap < 0.06  # exceeded by chance once in a thousand
    if alpha == 1:
        np.testing.assert_allclose(
            np.quantile(ours, [0.1, 0.5, 0.9]), cap * np.array([0.1, 0.5, 0.9]), atol=0.05 * cap
        )


def test_a_cap_that_no_draw_meets_is_an_error():
    with pytest.raises(
        common.UserError, match="--alpha 1000000.0 --lambda-cap 0.1.*smaller --alpha"
    ):
        guidedmix.sample_lambda(1e6, 0.1, common.rng("none"))


# ---- Eq. 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [False, True])
def test_eq_3(places):
    a, b = torch.randn(3, 4, 2, 5, requires_grad=True), torch.randn(2, 4, 2, 5)
    found = guidedmix.distances(guidedmix.describe(a, places), guidedmix.describe(b, places))
    assert found.shape == (3, 2) and not found.requires_grad
    for i, j in np.ndindex(3, 2):
        x, y = a[i].detach().double().numpy(), b[j].double().numpy()
        if places:
            squares = sum((x[c, h, w] - y[c, h, w]) ** 2 for c, h, w in np.ndindex(4, 2, 5))
        else:
            squares = sum((x[c].mean() - y[c].mean()) ** 2 for c in range(4))
        assert float(found[i, j]) == pytest.approx(math.sqrt(squares), rel=1e-5)


def between(a, b):
    return guidedmix.distances(guidedmix.describe(a), guidedmix.describe(b))


def test_distances_of_features_that_are_almost_alike_are_not_lost_in_rounding():
    a = torch.full((30, 8, 1, 1), 1000.0)
    b = a + torch.arange(30.0).view(30, 1, 1, 1) * 0.01
    assert between(a, b)[0].tolist() == pytest.approx(
        [0.01 * i * math.sqrt(8) for i in range(30)], abs=2e-3
    )


def test_the_most_similar_picture_is_chosen_and_may_serve_several():
    v = torch.tensor([[0.0], [10.0], [4.0]]).view(3, 1, 1, 1)
    u = torch.tensor([[3.0], [11.0], [9.0], [-5.0]]).view(4, 1, 1, 1)
    assert guidedmix.nearest(between(u, v)).tolist() == [2, 1, 1, 0]


def test_a_labeled_pictures_partner_is_another_one():
    v = torch.tensor([[0.0], [10.0], [4.0], [11.0]]).view(4, 1, 1, 1)
    d = between(v, v)
    before = d.clone()
    assert guidedmix.nearest(d, 0).tolist() == [2, 3, 0, 1] and torch.equal(d, before)
    assert guidedmix.nearest(d[2:], 2).tolist() == [0, 1]  # the second process's two pictures
    same = torch.zeros(2, 1, 1, 1)  # twice the same picture
    assert guidedmix.nearest(between(same, same), 0).tolist() == [1, 0]


# ---- L_cla -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_classes_present_without_background_and_unknown(background):
    label = labels(6, 3, 3, unknown=0.5)
    label[0] = 255
    label[1] = 0
    hot = guidedmix.classes_present(label, K, background)
    assert hot.shape == (6, K - background) and hot.dtype == torch.float32
    for b in range(6):
        for k in range(int(background), K):
            assert hot[b, k - background] == (1.0 if k in label[b].flatten().tolist() else 0.0)
    assert hot[0].sum() == 0 and hot[1].sum() == (0 if background else 1) and 0 < hot.mean() < 1


# ---- Eqs. 4, 5: MITrans ----------------------------------------------------------------------------------------------


def test_eq_5_by_hand_on_a_2x2_map():
    """Query: the first channel, 1 0 2 -1; key: the second, ln 1 .. ln 4; value: the features. So f is m^q: 1 2 3 4 of 10, 1 1 1 1 of 4, 1 4 9 16 of 30, 12 6 4 3 of 25."""
    block = guidedmix.NonLocal(2)
    with torch.no_grad():
        for conv, weight in (
            (block.query, [[1.0, 0.0]]),
            (block.key, [[0.0, 1.0]]),
            (block.value, [[1.0, 0.0], [0.0, 1.0]]),
        ):
            conv.weight.copy_(torch.tensor(weight)[:, :, None, None])
            conv.bias.zero_()
    v = torch.tensor([[1.0, 0.0, 2.0, -1.0], [math.log(m) for m in (1, 2, 3, 4)]]).view(1, 2, 2, 2)
    out = block(v).detach()
    np.testing.assert_allclose(
        out[0, 0].flatten(), [1 + 0.3, 0 + 0.5, 2 + 0.1, -1 + 0.68], atol=1e-6
    )
    second = [
        (2 * math.log(2) + 3 * math.log(3) + 4 * math.log(4)) / 10,
        math.log(24) / 4,
        (4 * math.log(2) + 9 * math.log(3) + 16 * math.log(4)) / 30,
        (6 * math.log(2) + 4 * math.log(3) + 3 * math.log(4)) / 25,
    ]
    np.testing.assert_allclose(out[0, 1].flatten() - v[0, 1].flatten(), second, atol=1e-6)


def test_eq_5_against_a_loop():
    block, v = guidedmix.NonLocal(8), torch.randn(2, 8, 3, 5)
    out = block(v)
    q, k, value = (
        conv(v).detach().double().numpy() for conv in (block.query, block.key, block.value)
    )
    assert q.shape == k.shape == (2, 4, 3, 5) and value.shape == (2, 8, 3, 5)
    for b, i, j in np.ndindex(2, 3, 5):
        scores = np.exp([[q[b, :, i, j] @ k[b, :, m, n] for n in range(5)] for m in range(3)])
        expected = v[b, :, i, j].numpy() + sum(
            scores[m, n] / scores.sum() * value[b, :, m, n] for m, n in np.ndindex(3, 5)
        )
        np.testing.assert_allclose(out[b, :, i, j].detach(), expected, atol=1e-5)


def test_attention_is_fused_and_so_never_holds_the_whole_map():
    """With the other kernels forbidden it still runs, forward and backward."""
    block, v = guidedmix.NonLocal(256), torch.randn(2, 256, 9, 11, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        block(v).sum().backward()
    assert v.grad.abs().sum() > 0 and all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("size", [41, 40])
def test_mitrans_doubles_the_size_and_cuts_to_the_skip(size):
    step, skip = (
        guidedmix.MITrans(8, 3, 16, common.group_norm),
        torch.randn(1, 3, 2 * size - size % 2, 2 * size - size % 2),
    )
    assert step(torch.randn(1, 8, size, size), skip).shape == (1, 16, *skip.shape[2:])


def test_what_mitrans_shows_a_skip_begins_at_the_corner():
    """A spot in the last row and column of the coarse map stays there; one in the first stays in the first."""
    step = guidedmix.MITrans(8, 8, 8, lambda channels: nn.Identity(), non_local=False)
    seen = []
    step.fuse = nn.Identity()
    step.shuffle[0] = nn.Conv2d(8, 32, 1, bias=False)
    with torch.no_grad():
        step.shuffle[0].weight.copy_(
            torch.eye(8).repeat_interleave(4, 0)[:, :, None, None]
        )  # each place becomes 2 x 2 places like it
    v, skip = torch.randn(1, 8, 3, 3), torch.randn(1, 8, 5, 5)
    seen = step(v, skip)
    for i, j in np.ndindex(5, 5):
        assert torch.equal(seen[0, :8, i, j], v[0, :, i // 2, j // 2]) and torch.equal(
            seen[0, 8:, i, j], skip[0, :, i, j]
        )


@pytest.mark.parametrize(
    "crop, sizes",
    [
        (321, (41, 81, 161)),
        (513, (65, 129, 257)),
        (480, (60, 120, 240)),
        (64, (8, 16, 32)),
        (50, (7, 13, 25)),
    ],
)
def test_odd_sizes(crop, sizes):
    network = on_paper().eval()
    v, layer1, stem = network.encode(torch.empty(1, 3, crop, crop, device="meta"))
    assert [x.shape[1:] for x in (v, layer1, stem)] == [
        (c, n, n) for c, n in zip((512, 256, 64), sizes)
    ]
    assert network.step1(v, layer1).shape == (1, 256, sizes[1], sizes[1])
    assert network.features(torch.empty(1, 3, crop, crop, device="meta")).shape == (
        1,
        128,
        sizes[2],
        sizes[2],
    )
    assert network(torch.empty(2, 3, crop, crop + 16, device="meta")).shape == (
        2,
        10,
        sizes[2],
        sizes[2] + 8,
    )


def test_parameters_are_those_of_the_docstring():
    with torch.device("meta"):
        counts = [
            count(
                guidedmix.make_network(
                    spec(backbone=name, batch_norm="train", classes=21, present=20)
                )
            )
            for name in ("resnet50", "resnet101")
        ]
    for n in counts:
        assert f"{n:,}" in guidedmix.__doc__
    conv = lambda i, o, k=1: i * o * k * k
    bn = lambda c: 2 * c
    resnet50 = 23_508_032  # torchvision's, without its classifier
    psp = 4 * (conv(2048, 512) + bn(512)) + conv(4096, 512, 3) + bn(512)
    step = lambda c, skip, width: (
        2 * (conv(c, c // 2) + c // 2)
        + conv(c, c)
        + c  # query, key, value
        + conv(c, 4 * width)
        + 4 * width
        + conv(width + skip, width, 3)
        + conv(width, width, 3)
        + 2 * bn(width)
    )
    assert (
        counts[0]
        == resnet50 + psp + step(512, 256, 256) + step(256, 64, 128) + 128 * 21 + 21 + 512 * 20 + 20
    )


def test_without_mitrans_only_the_non_local_blocks_are_gone():
    with_it, without = on_paper().state_dict(), on_paper(mitrans=False).state_dict()
    assert {k: v.shape for k, v in with_it.items() if ".non_local." not in k} == {
        k: v.shape for k, v in without.items()
    }
    assert {k.split(".")[0] for k in with_it.keys() - without.keys()} == {"step1", "step2"}


def test_the_networks_halves_make_the_whole_and_every_part_takes_part():
    network = guidedmix.make_network(spec(present=3))
    image = torch.rand(2, 3, 32, 48)
    logits, v, present = guidedmix.WithEncoder(network)(image)
    assert (
        torch.equal(logits, network(image))
        and torch.equal(logits, network.classifier(network.features(image)))
        and logits.shape == (2, 10, 16, 24)
    )
    assert (
        torch.equal(v, network.encode(image)[0])
        and v.shape == (2, 64, 4, 6)
        and present.shape == (2, 3)
    )
    torch.testing.assert_close(present, network.presence(v.mean((2, 3))))
    (logits.sum() + present.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    heads = sum(p.numel() for p in network.head_parameters())
    assert heads + count(network.backbone) == count(network) and network.stride == 2
    assert guidedmix.WithEncoder(guidedmix.make_network(spec()))(image)[2] is None


def test_crops_of_8n_1_pixels_have_corners_on_corners():
    assert guidedmix.GuidedMixNet.align_corners
    logits = torch.zeros(1, 1, 161, 161)
    logits[..., 80, 100] = 1
    up = common.upsample(logits, (321, 321), True)
    assert up[0, 0, 160, 200] == 1 and up[0, 0, 160, 201] == 0.5


def test_a_checkpoint_of_another_network_goes_to_its_script():
    with pytest.raises(common.UserError, match="guidedmix.py"):
        common.make_network(spec())
    with pytest.raises(common.UserError, match="pspnet"):
        guidedmix.make_network(spec(network="pspnet"))


# ---- Eqs. 6 to 8 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_eqs_7_and_8(how):
    mixed, guide = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4)
    found = guidedmix.decouple(mixed, guide, 0.3, how)
    for b, k, i, j in np.ndindex(2, K, 3, 4):
        assert float(found[b, k, i, j]) == pytest.approx(
            float(mixed[b, k, i, j]) - (1 if how == "hard" else 0.3) * float(guide[b, k, i, j]),
            abs=1e-6,
        )


def test_what_was_mixed_as_eq_6_has_it_is_decoupled():
    m_l, m_u = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4)
    torch.testing.assert_close(guidedmix.decouple(m_l + m_u, m_l, 0.3, "hard"), m_u)
    torch.testing.assert_close(guidedmix.decouple(0.3 * m_l + m_u, m_l, 0.3), m_u)


# ---- Eqs. 10, 12 -----------------------------------------------------------------------------------------------------


def test_eqs_10_and_12():
    a, b, valid = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4), torch.rand(2, 3, 4) < 0.6
    pixels = [
        sum((float(a[n, k, i, j]) - float(b[n, k, i, j])) ** 2 for k in range(K))
        for n, i, j in np.ndindex(2, 3, 4)
        if valid[n, i, j]
    ]
    assert 0 < len(pixels) < 24
    assert float(guidedmix.mask_error(a, b, valid)) == pytest.approx(
        sum(pixels) / len(pixels), rel=1e-5
    )
    everywhere = torch.ones_like(valid)
    assert float(guidedmix.mask_error(a, b, everywhere)) == pytest.approx(
        float(((a - b) ** 2).sum() / (2 * 3 * 4)), rel=1e-5
    )  # 1 / (H W), per picture
    assert float(guidedmix.mask_error(a, b, ~everywhere)) == 0


# ---- rotation --------------------------------------------------------------------------------------------------------

TURN = partial(guidedmix.rotate, degrees=10.0)


class Plain(common.Dataset):
    """Pictures of 60x80 in one colour a class, in blocks of 20."""

    def __init__(self):
        ids = [f"picture_{i}" for i in range(8)]
        super().__init__(
            "plain",
            {f"class {k}": (50 * k + 25,) * 3 for k in range(K)},
            ids,
            ids[:1],
            {id: (id, id) for id in ids},
            {k: k for k in range(K)},
        )

    def label(self, id, full_size=False):
        rows, columns = np.mgrid[:60, :80]
        return ((rows // 20 * 2 + columns // 20) % K).astype(np.uint8)

    def image(self, id):
        return np.repeat(50 * self.label(id)[..., None] + 25, 3, 2).astype(np.uint8)


def inside_of_a_class(label):
    """Where all neighbours within two pixels are in the crop and have the same label."""
    x = label[None, None].float()
    return F.pad((F.max_pool2d(x, 5, 1) == -F.max_pool2d(-x, 5, 1))[0, 0], (2, 2, 2, 2))


@pytest.mark.parametrize("crop", [(40, 48), (72, 96)])
def test_rotation_turns_picture_and_label_alike_and_what_is_beyond_is_unknown(crop):
    data, turned = Plain(), 0
    for labeled in (True, False):
        source = common.Stream(
            data,
            data.train,
            "labeled",
            dataset_arguments(crop=crop, scale=(0.7, 1.1)),
            labeled=labeled,
            cut=TURN,
        )
        for position in range(20):
            sample = source[position]
            image, label, valid = (
                sample["image"].int(),
                sample["label" if labeled else "truth"],
                sample["valid"],
            )
            assert image.shape == (3, *crop) and label.shape == valid.shape == crop
            known = valid & inside_of_a_class(label)
            assert (
                known.float().mean() > 0.1
                and (image[0][known] == 50 * label[known].int() + 25).all()
            )
            mean = torch.tensor(common.MEAN_COLOR)[:, None]
            assert (
                (label[~valid] == 255).all()
                and (label[valid] != 255).all()
                and (image[:, ~valid] == mean).all()
            )
            turned += 0 < int((~valid).sum()) < valid.numel()
            if crop == (72, 96):
                assert not valid.all()  # beyond the picture
    assert turned > 3


def test_angles_are_drawn_from_the_whole_range(monkeypatch):
    angles, rotate = [], guidedmix.V.rotate
    monkeypatch.setattr(
        guidedmix.V,
        "rotate",
        lambda x, angle, *a, **k: angles.append(angle) or rotate(x, angle, *a, **k),
    )
    for i in range(100):
        TURN(
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.zeros(8, 8, dtype=torch.uint8),
            0,
            0,
            (8, 8),
            common.rng(i),
        )
    assert len(set(angles)) == 100 and all(
        angles[i] == angles[i + 1] == angles[i + 2] for i in range(0, 300, 3)
    )
    assert -10 <= min(angles) < -9 and 9 < max(angles) <= 10


@pytest.mark.parametrize("crop", [(40, 48), (33, 90)])
def test_turned_by_nothing_it_is_the_plain_view(crop):
    data = Plain()
    for position in range(10):
        samples = [
            common.Stream(
                data, data.train, "labeled", dataset_arguments(crop=crop, scale=(0.7, 1.1)), cut=cut
            )[position]
            for cut in (None, partial(guidedmix.rotate, degrees=0.0))
        ]
        assert all(
            torch.equal(samples[0][key], samples[1][key]) for key in ("image", "label", "valid")
        )


def test_a_quarter_turn():
    """Exact, and larger than any corner of the window: a square picture with its crop in the middle, turned counterclockwise."""
    image, label = (
        torch.randint(256, (3, 21, 21), dtype=torch.uint8),
        torch.randint(5, (21, 21), dtype=torch.uint8),
    )
    exact = type("Always90", (), {"uniform": staticmethod(lambda low, high: 90.0)})
    x, y, valid = guidedmix.rotate(image, label, 5, 5, (11, 11), exact, 90.0)
    assert (
        torch.equal(x, image.rot90(1, (1, 2))[:, 5:16, 5:16])
        and torch.equal(y, label.rot90(1)[5:16, 5:16])
        and valid.all()
    )


def test_a_loader_process_can_be_given_the_cut():
    again = pickle.loads(pickle.dumps(TURN))
    picture = (
        torch.randint(256, (3, 30, 40), dtype=torch.uint8),
        torch.randint(5, (30, 40), dtype=torch.uint8),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *(cut(*picture, 3, 4, (16, 16), common.rng("cut")) for cut in (TURN, again))
        )
    )


# ---- batch norm ------------------------------------------------------------------------------------------------------


def test_blends_do_not_enter_the_running_statistics_and_are_normalised_by_their_own():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.BatchNorm2d(4), common.FrozenBatchNorm(4)),
    ).train()
    clean, blends = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8) / 3
    network(clean)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    with guidedmix.keep_statistics(network):
        inside = network(blends)
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())
    torch.testing.assert_close(inside, network(blends))  # the same batch statistics
    assert not any(
        torch.equal(before[f"{i}.running_mean"], network.state_dict()[f"{i}.running_mean"])
        for i in ("1", "2.0")
    )  # and now they count
    assert torch.equal(before["2.1.running_mean"], network.state_dict()["2.1.running_mean"])


# ---- the paper's settings --------------------------------------------------------------------------------------------


def arguments(line):
    """The arguments of a command line, with the number of labels in each public size of the dataset."""
    args = common.parse_args(guidedmix.get_parser(), guidedmix.PAPER, line.split())
    share = args.labels
    sizes = {"vocaug": [10582], "cityscapes": [2975], "context": [4998, 4996], "streets": [256]}[
        args.dataset
    ]
    for size in sizes:  # as common.split() counts them
        args.labels = common.count_labels(
            share, SimpleNamespace(name=args.dataset, train=range(size))
        )
        yield args


@pytest.mark.parametrize(
    "dataset, crop, batch, cap, pairs, classifier",
    [
        ("vocaug", (321, 321), 12, 0.5, "similar", True),
        ("cityscapes", (513, 513), 8, 0.3, "random", False),
        ("context", (480, 480), 8, 0.4, "similar", True),
    ],
)
def test_the_papers_settings(dataset, crop, batch, cap, pairs, classifier):
    args = next(arguments(f"--dataset {dataset}"))
    assert (args.crop, args.batch_size, args.lambda_cap, args.pairs, args.classifier) == (
        crop,
        batch,
        cap,
        pairs,
        classifier,
    )
    assert (
        args.lr,
        args.weight_decay,
        args.iterations,
        args.optimizer,
        args.scale,
        args.rotation,
    ) == (1e-3, 1e-4, 40_000, "sgd", (0.5, 2.0), 10)
    assert (
        args.backbone,
        args.weights,
        args.alpha,
        args.decoupling,
        args.scales,
        args.flip,
        args.warmup,
        args.ramp,
    ) == ("resnet101", "imagenet", 1, "soft", [1.0], False, 0.05, 0.1)


@pytest.mark.parametrize(
    "line, miou",
    [
        ("vocaug --labels 1464", 73.7),
        ("vocaug --labels 1464 --lambda-cap .1", 67.9),
        ("vocaug --labels 1464 --lambda-cap .4", 71.4),
        ("vocaug --labels 1464 --pairs random", 71.9),
        ("vocaug --labels 1464 --no-mitrans", 72.7),
        ("vocaug --labels 1464 --decoupling hard", 71.4),
        ("vocaug --labels 500", 65.4),
        ("vocaug --labels 1000", 68.1),
        ("vocaug", 73.4),
        ("vocaug --labels 2646", 75.5),
        ("vocaug --labels 5291", 76.5),
        ("vocaug --crop 512 512", 75.2),
        ("vocaug --labels 5291 --crop 512 512 --scales .5 .75 1 1.25 1.5 1.75 --flip", 78.2),
        ("cityscapes", 65.8),
        ("cityscapes --lambda-cap .5", 65.7),
        ("cityscapes --labels 100", 56.9),
        ("cityscapes --labels 1488", 69.8),
        ("context", 40.3),
        ("context --lambda-cap .3", 39.8),
        ("context --labels 1/4", 41.7),
        ("context --lambda-cap .1", 37.6),
        ("vocaug --labels 1/2", 76.5),
        ("vocaug --labels 1464 --pairs random --no-mitrans", None),
        ("vocaug --labels 1464 --lambda-cap .25", None),
        ("vocaug --labels 1464 --flip", None),
        ("vocaug --labels 700", None),
        ("vocaug --labels 1464 --backbone resnet101", None),
        ("vocaug --labels 500 --backbone resnet101", None),
        ("vocaug --labels 1/8 --backbone resnet50", None),
        ("vocaug --labels 500/10582", None),
        ("cityscapes --crop 512 512", None),
        ("vocaug --labels 1464 --iterations 10", None),
        ("streets", None),
    ],
)
def test_the_papers_numbers_stand_beside_their_settings(line, miou):
    for args in arguments(f"--dataset {line}"):
        assert guidedmix.paper_miou(args) == miou
