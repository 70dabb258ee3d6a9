"""The parts of GuidedMix-Net, each against a naive version written from the paper."""

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
from helpers import head_parameters
from test_data import arguments as dataset_arguments

K = 5
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def spec(**changes):
    described = dict(network="guidedmix", backbone="tiny", style="torchvision", deep_stem=False)
    described |= dict(batch_norm="frozen", classes=10, mitrans=True, present=0)
    return described | changes


def on_paper(**changes):
    """A network that takes no memory."""
    with torch.device("meta"):
        return guidedmix.GuidedMixNet(spec(backbone="resnet50", batch_norm="train", **changes))


def count(network):
    return sum(p.numel() for p in network.parameters())


def labels(*shape, classes=K, unknown=0.2):
    return torch.where(torch.rand(shape) < unknown, 255, torch.randint(classes, shape))


# ---- Eq. 1 ---------------------------------------------------------------------------------------


def at_pixel(cells, i, j):
    """The value at pixel (i, j) of cells (h, w), cell c on pixel 2 c, continued at the border."""
    h, w = cells.shape
    value = 0
    for y, x in np.ndindex(h + 1, w + 1):
        share = max(0, 1 - abs(i / 2 - y)) * max(0, 1 - abs(j / 2 - x))
        value += share * float(cells[min(y, h - 1), min(x, w - 1)])
    return value


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 5)])
def test_eq_1(size):
    """Cell c of the logits is centred on pixel 2 c, at even and odd sizes."""
    cells = [math.ceil(side / 2) for side in size]
    logits, label = torch.randn(2, K, *cells), labels(2, *size)
    terms = []
    for b, i, j in np.ndindex(2, *size):
        if label[b, i, j] != 255:
            exp = [math.exp(at_pixel(logits[b, k], i, j)) for k in range(K)]
            terms.append(-math.log(exp[label[b, i, j]] / sum(exp)))
    expected = sum(terms) / len(terms)
    assert float(guidedmix.cross_entropy(logits, label)) == pytest.approx(expected, rel=1e-5)
    assert float(guidedmix.cross_entropy(logits, torch.full_like(label, 255))) == 0


# ---- Eqs. 2, 6: blends ---------------------------------------------------------------------------


class Scale(nn.Module):
    """In place of a network: logits are colors times 3, normalized if there is a batch norm."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, image):
        return self.layers(3 * image)


def blend(network, guide, image, masks="softmax"):
    args = SimpleNamespace(alpha=1.0, lambda_cap=0.5, seed=3, precision="fp32", masks=masks)
    return guidedmix.blend(args, network, guide, image, "some", "key")


def test_eq_2():
    guide, image = torch.randint(256, (2, 2, 3, 4, 6), dtype=torch.uint8)
    lam, x_mix, mask = blend(Scale(), guide, image)
    assert lam == guidedmix.sample_lambda(1.0, 0.5, common.rng(3, "some", "key"))
    for b, c, i, j in np.ndindex(2, 3, 4, 6):
        expected = lam * int(guide[b, c, i, j]) + (1 - lam) * int(image[b, c, i, j])
        assert x_mix[b, c, i, j] == pytest.approx(expected / 255, abs=1e-6)
    torch.testing.assert_close(mask, 3 * x_mix)


def test_masks_are_logits_or_probabilities():
    guide, image = torch.randint(256, (2, 2, 3, 4, 6), dtype=torch.uint8)
    logits = blend(Scale(), guide, image, "logits")[2]
    assert torch.equal(logits, blend(Scale(), guide, image)[2])
    torch.testing.assert_close(blend(Scale(), guide, image, "probabilities")[2], logits.softmax(1))


def naive_lambda(alpha, cap, r):
    """As in Sect. 3.1, one draw after the other."""
    while True:
        x = r.beta(alpha, alpha)
        x = min(x, 1 - x)
        if x < cap:
            return x


CAPS = [(1.0, cap) for cap in (0.5, 0.3, 0.1, 0.01)]
CAPS += [(0.4, 0.5), (0.4, 0.1), (4.0, 0.5), (4.0, 0.3)]


@pytest.mark.parametrize("alpha, cap", CAPS)
def test_lambda_is_beta_folded_and_below_the_cap(alpha, cap):
    generators = [common.rng("ours", i) for i in range(2000)]
    ours = np.sort([guidedmix.sample_lambda(alpha, cap, r) for r in generators])
    r = common.rng("theirs", alpha, cap)
    theirs = np.sort([naive_lambda(alpha, cap, r) for _ in range(2000)])
    assert 0 <= ours[0] and ours[-1] < cap and len(set(ours)) == 2000
    both = np.sort(np.concatenate([ours, theirs]))
    below = [np.searchsorted(draws, both, "right") for draws in (ours, theirs)]
    gap = np.abs(below[0] - below[1]).max() / 2000  # of Kolmogorov and Smirnov
    assert gap < 0.06  # exceeded by chance once in a thousand
    if alpha == 1:
        parts = np.array([0.1, 0.5, 0.9])
        np.testing.assert_allclose(np.quantile(ours, parts), cap * parts, atol=0.05 * cap)


def test_a_cap_that_no_draw_meets_is_an_error():
    message = "--alpha 1000000.0 --lambda-cap 0.1.*smaller --alpha"
    with pytest.raises(common.UserError, match=message):
        guidedmix.sample_lambda(1e6, 0.1, common.rng("none"))


# ---- Eq. 3 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["pooled", "places"])
def test_eq_3(distance):
    a, b = torch.randn(3, 4, 2, 5, requires_grad=True), torch.randn(2, 4, 2, 5)
    found = guidedmix.distances(guidedmix.describe(a, distance), guidedmix.describe(b, distance))
    assert found.shape == (3, 2) and not found.requires_grad
    for i, j in np.ndindex(3, 2):
        x, y = a[i].detach().double().numpy(), b[j].double().numpy()
        if distance == "places":
            squares = sum((x[c, h, w] - y[c, h, w]) ** 2 for c, h, w in np.ndindex(4, 2, 5))
        else:
            squares = sum((x[c].mean() - y[c].mean()) ** 2 for c in range(4))
        assert float(found[i, j]) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_distances_of_features_that_are_almost_alike_are_not_lost_in_rounding():
    a = torch.full((30, 8), 1000.0)
    b = a + torch.arange(30.0)[:, None] * 0.01
    expected = [0.01 * i * math.sqrt(8) for i in range(30)]
    assert guidedmix.distances(a, b)[0].tolist() == pytest.approx(expected, abs=2e-3)


def pairs(features, guides, labeled=False, kind="similar", seed=0):
    """The guide of each of the features among the guides, with one channel."""
    args = SimpleNamespace(pairs=kind, seed=seed)
    features, guides = torch.tensor(features)[:, None], torch.tensor(guides)[:, None]
    guides = {"image": guides, "features": guides}
    positions = list(range(len(features)))
    return guidedmix.pair(args, positions, features, guides, labeled).tolist()


def test_the_most_similar_picture_is_chosen_and_may_serve_several():
    assert pairs([3.0, 11.0, 9.0, -5.0], [0.0, 10.0, 4.0]) == [2, 1, 1, 0]


def test_the_partner_of_a_labeled_picture_is_another_one(monkeypatch):
    v = [0.0, 10.0, 4.0, 11.0]
    assert pairs(v, v, labeled=True) == [2, 3, 0, 1]
    assert pairs([0.0, 0.0], [0.0, 0.0], labeled=True) == [1, 0]  # the same picture twice
    monkeypatch.setattr(guidedmix, "rank", lambda: 1)
    assert pairs(v[2:], v, labeled=True) == [0, 1]


def test_random_pairs_take_all_pictures_and_never_the_picture_itself(monkeypatch):
    v = [0.0, 10.0, 4.0, 11.0]
    monkeypatch.setattr(guidedmix, "rank", lambda: 1)
    unlabeled = [pairs(v[2:], v, kind="random", seed=seed) for seed in range(40)]
    labeled = [pairs(v[2:], v, True, "random", seed) for seed in range(40)]
    for i in range(2):
        assert {partners[i] for partners in unlabeled} == {0, 1, 2, 3}
        assert {partners[i] for partners in labeled} == {0, 1, 2, 3} - {2 + i}


# ---- L_cla ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_the_classifier_learns_which_classes_are_present(background):
    """One output for each class, or for each class but the background; 255 is no class."""
    label = labels(6, 3, 3, unknown=0.5)
    label[0] = 255
    label[1] = 0
    logits = torch.randn(6, K - background)
    terms = []
    for b, k in np.ndindex(6, K - background):
        prob = 1 / (1 + math.exp(-logits[b, k]))
        present = k + background in label[b]
        terms.append(-math.log(prob if present else 1 - prob))
    expected = sum(terms) / len(terms)
    loss = guidedmix.classifier_loss(logits, label, K)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# ---- Eqs. 4, 5: MITrans --------------------------------------------------------------------------


def test_eq_5_by_hand_on_a_2x2_map():
    """Query: the first channel, 1 0 2 -1; key: the second, ln 1 .. ln 4; value: the features. So f
    is m^q: 1 2 3 4 of 10, 1 1 1 1 of 4, 1 4 9 16 of 30, 12 6 4 3 of 25."""
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
    first = [1 + 0.3, 0 + 0.5, 2 + 0.1, -1 + 0.68]
    np.testing.assert_allclose(out[0, 0].flatten(), first, atol=1e-6)
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
    step = guidedmix.MITrans(8, 3, 16, common.group_norm)
    double = 2 * size - size % 2
    skip = torch.randn(1, 3, double, double)
    assert step(torch.randn(1, 8, size, size), skip).shape == (1, 16, double, double)


def test_a_skip_and_the_shuffled_features_begin_at_the_same_corner():
    step = guidedmix.MITrans(8, 8, 8, lambda channels: nn.Identity(), non_local=False)
    step.fuse = nn.Identity()
    step.shuffle[0] = nn.Conv2d(8, 32, 1, bias=False)
    repeat = torch.eye(8).repeat_interleave(4, 0)  # each position becomes 2 x 2 positions like it
    with torch.no_grad():
        step.shuffle[0].weight.copy_(repeat[:, :, None, None])
    v, skip = torch.randn(1, 8, 3, 3), torch.randn(1, 8, 5, 5)
    out = step(v, skip)
    for i, j in np.ndindex(5, 5):
        assert torch.equal(out[0, :8, i, j], v[0, :, i // 2, j // 2])
        assert torch.equal(out[0, 8:, i, j], skip[0, :, i, j])


CROPS = [(321, (41, 81, 161)), (513, (65, 129, 257)), (480, (60, 120, 240)), (64, (8, 16, 32))]


@pytest.mark.parametrize("crop, sizes", [*CROPS, (50, (7, 13, 25))])
def test_odd_sizes(crop, sizes):
    network, seen = on_paper().eval(), []
    for step in (network.step1, network.step2):
        step.register_forward_hook(lambda step, inputs, output: seen.append((*inputs, output)))
    logits = network(torch.empty(1, 3, crop, crop, device="meta"))
    (v, layer1, out1), (_, stem, out2) = seen
    coarse, middle, fine = sizes
    assert v.shape == (1, 512, coarse, coarse)
    assert layer1.shape == out1.shape == (1, 256, middle, middle)
    assert stem.shape == (1, 64, fine, fine) and out2.shape == (1, 128, fine, fine)
    assert logits.shape == (1, 10, fine, fine)
    logits = network(torch.empty(2, 3, crop, crop + 16, device="meta"))
    assert logits.shape == (2, 10, fine, fine + 8)


def test_parameters_are_those_of_the_docstring():
    counts = []
    for name in ("resnet50", "resnet101"):
        with torch.device("meta"):
            described = spec(backbone=name, batch_norm="train", classes=21, present=20)
            counts.append(count(guidedmix.GuidedMixNet(described)))
        assert f"{counts[-1]:,}" in guidedmix.GuidedMixNet.__doc__

    def conv(i, o, k=1):
        return i * o * k * k

    def bn(c):
        return 2 * c

    def step(c, skip, width):
        query_key_value = 2 * (conv(c, c // 2) + c // 2) + conv(c, c) + c
        shuffle = conv(c, 4 * width) + 4 * width
        return (
            query_key_value
            + shuffle
            + conv(width + skip, width, 3)
            + conv(width, width, 3)
            + (2 * bn(width))
        )

    resnet50 = 23_508_032  # torchvision's, without its classifier
    psp = 4 * (conv(2048, 512) + bn(512)) + conv(4096, 512, 3) + bn(512)
    steps = step(512, 256, 256) + step(256, 64, 128)
    heads = 128 * 21 + 21 + 512 * 20 + 20
    assert counts[0] == resnet50 + psp + steps + heads


def test_without_mitrans_only_the_non_local_blocks_are_gone():
    with_it, without = on_paper().state_dict(), on_paper(mitrans=False).state_dict()
    shapes = {k: v.shape for k, v in with_it.items() if ".non_local." not in k}
    assert shapes == {k: v.shape for k, v in without.items()}
    assert {k.split(".")[0] for k in with_it.keys() - without.keys()} == {"step1", "step2"}


def test_every_part_of_the_network_takes_part():
    network = guidedmix.GuidedMixNet(spec(present=3))
    image = torch.rand(2, 3, 32, 48)
    logits, v, present = network(image, aux=True)
    assert torch.equal(logits, network(image)) and logits.shape == (2, 10, 16, 24)
    assert v.shape == (2, 64, 4, 6) and present.shape == (2, 3)
    torch.testing.assert_close(present, network.presence(v.mean((2, 3))))
    (logits.sum() + present.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    heads = sum(p.numel() for p in head_parameters(network))
    assert heads + count(network.backbone) == count(network) and network.stride == 2
    assert guidedmix.GuidedMixNet(spec())(image, aux=True)[2] is None


def test_crops_of_8n_1_pixels_have_corners_on_corners():
    assert guidedmix.GuidedMixNet.align_corners
    logits = torch.zeros(1, 1, 161, 161)
    logits[..., 80, 100] = 1
    up = common.upsample(logits, (321, 321), 2)
    assert up[0, 0, 160, 200] == 1 and up[0, 0, 160, 201] == 0.5


def test_a_checkpoint_of_another_network_goes_to_its_script():
    with pytest.raises(common.UserError, match="guidedmix.py"):
        common.make_network(spec())
    with pytest.raises(common.UserError, match="pspnet"):
        guidedmix.GuidedMixNet(spec(network="pspnet"))


# ---- Eqs. 6 to 8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_eqs_7_and_8(how):
    mixed, guide = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4)
    found = guidedmix.decouple(mixed, guide, 0.3, how)
    for b, k, i, j in np.ndindex(2, K, 3, 4):
        part = 1 if how == "hard" else 0.3
        expected = float(mixed[b, k, i, j]) - part * float(guide[b, k, i, j])
        assert float(found[b, k, i, j]) == pytest.approx(expected, abs=1e-6)


def test_what_was_mixed_as_eq_6_has_it_is_decoupled():
    m_l, m_u = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4)
    torch.testing.assert_close(guidedmix.decouple(m_l + m_u, m_l, 0.3, "hard"), m_u)
    torch.testing.assert_close(guidedmix.decouple(0.3 * m_l + m_u, m_l, 0.3), m_u)


# ---- Eqs. 10, 12 ---------------------------------------------------------------------------------


def test_eqs_10_and_12():
    """Masks are compared at their cells, cell c on pixel 2 c, where this pixel is valid."""
    a, b, valid = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4), torch.rand(2, 5, 8) < 0.6
    pixels = []
    for n, i, j in np.ndindex(2, 3, 4):
        if valid[n, 2 * i, 2 * j]:
            pixels.append(sum((a[n, k, i, j] - b[n, k, i, j]).item() ** 2 for k in range(K)))
    assert 0 < len(pixels) < 24
    mean = sum(pixels) / len(pixels)
    assert float(guidedmix.mask_error(a, b, valid)) == pytest.approx(mean, rel=1e-5)
    everywhere = torch.ones_like(valid)
    mean = float(((a - b) ** 2).sum() / (2 * 3 * 4))  # 1 / (H W), for each picture
    assert float(guidedmix.mask_error(a, b, everywhere)) == pytest.approx(mean, rel=1e-5)
    assert float(guidedmix.mask_error(a, b, ~everywhere)) == 0


def test_masks_are_compared_by_their_softmax_where_asked():
    a, b, valid = torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4), torch.rand(2, 6, 8) < 0.6
    error = guidedmix.mask_error(a, b, valid, "softmax")
    assert torch.equal(error, guidedmix.mask_error(a.softmax(1), b.softmax(1), valid))


def test_with_probabilities_eqs_8_and_12_agree_on_what_a_blend_is():
    """Hard L_dec is least where M_mix is the mean of the masks, if these are sure of two classes.
    Soft decoupling of that mean with lambda = 1/2 is the other mask's half."""
    M_l, M_u = F.one_hot(torch.tensor([1, 3]), K).float().view(2, 1, K, 1, 1)
    logits = torch.zeros(1, K, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool)
    for _ in range(500):
        optimizer.zero_grad()
        M_mix = guidedmix.to_mask(logits, "probabilities")
        M_dec = guidedmix.decouple(M_mix, M_l, 0.3, "hard")  # Eq. 12
        guidedmix.mask_error(M_dec, M_u, everywhere).backward()
        optimizer.step()
    torch.testing.assert_close(M_mix.detach(), (M_l + M_u) / 2, atol=0.02, rtol=0)
    soft = guidedmix.decouple(M_mix.detach(), M_l, 0.5)  # Eq. 8
    torch.testing.assert_close(soft, M_u / 2, atol=0.02, rtol=0)


# ---- rotation ------------------------------------------------------------------------------------

TURN = partial(guidedmix.rotate, degrees=10.0)


class Plain(common.Dataset):
    """Pictures of 60x80 in blocks of 20, each class in one color."""

    def __init__(self):
        ids = [f"picture_{i}" for i in range(8)]
        classes = {f"class {k}": (50 * k + 25,) * 3 for k in range(K)}
        files = {id: (id, id) for id in ids}
        super().__init__("plain", classes, ids, ids[:1], files, {k: k for k in range(K)})

    def label(self, id, full_size=False):
        rows, columns = np.mgrid[:60, :80]
        return ((rows // 20 * 2 + columns // 20) % K).astype(np.uint8)

    def image(self, id):
        return np.repeat(50 * self.label(id)[..., None] + 25, 3, 2).astype(np.uint8)


def inside_of_a_class(label):
    """Where all neighbors within two pixels are in the crop and have the same label."""
    x = label[None, None].float()
    alike = F.max_pool2d(x, 5, 1) == -F.max_pool2d(-x, 5, 1)
    return F.pad(alike[0, 0], (2, 2, 2, 2))


@pytest.mark.parametrize("crop", [(40, 48), (72, 96)])
def test_rotation_turns_picture_and_label_alike_and_what_is_beyond_is_unknown(crop):
    data, turned = Plain(), 0
    args = dataset_arguments(crop=crop, scale=(0.7, 1.1))
    mean = torch.tensor(common.MEAN_COLOR)[:, None]
    for kind in ("label", "truth"):
        labeled = kind == "label"
        stream = common.Stream(data, data.train, "labeled", args, labeled=labeled, cut=TURN)
        for position in range(20):
            sample = stream[position]
            image, label, valid = sample["image"].int(), sample[kind], sample["valid"]
            assert image.shape == (3, *crop) and label.shape == valid.shape == crop
            known = valid & inside_of_a_class(label)
            assert known.float().mean() > 0.1
            assert (image[0][known] == 50 * label[known].int() + 25).all()
            assert (label[~valid] == 255).all() and (label[valid] != 255).all()
            assert (image[:, ~valid] == mean).all()
            turned += 0 < int((~valid).sum()) < valid.numel()
            if crop == (72, 96):
                assert not valid.all()  # beyond the picture
    assert turned > 3


def test_angles_are_drawn_from_the_whole_range(monkeypatch):
    angles, rotate = [], guidedmix.V.rotate

    def watch(x, angle, *rest, **more):
        angles.append(angle)
        return rotate(x, angle, *rest, **more)

    monkeypatch.setattr(guidedmix.V, "rotate", watch)
    image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    for i in range(100):
        TURN(image, label, 0, 0, (8, 8), common.rng(i))
    assert len(set(angles)) == 100 and angles[::2] == angles[1::2]  # the picture and its maps
    assert -10 <= min(angles) < -9 and 9 < max(angles) <= 10


@pytest.mark.parametrize("crop", [(40, 48), (33, 90)])
def test_turned_by_nothing_it_is_the_plain_view(crop):
    data, args = Plain(), dataset_arguments(crop=crop, scale=(0.7, 1.1))
    plain = common.Stream(data, data.train, "labeled", args)
    still = partial(guidedmix.rotate, degrees=0.0)
    turned = common.Stream(data, data.train, "labeled", args, cut=still)
    for position in range(10):
        for key in ("image", "label", "valid"):
            assert torch.equal(plain[position][key], turned[position][key])


def test_a_quarter_turn():
    """A square picture with its crop in the middle, turned counterclockwise: this is exact."""
    image = torch.randint(256, (3, 21, 21), dtype=torch.uint8)
    label = torch.randint(5, (21, 21), dtype=torch.uint8)
    quarter = SimpleNamespace(uniform=lambda low, high: 90.0)
    x, y, valid = guidedmix.rotate(image, label, 5, 5, (11, 11), quarter, 90.0)
    assert torch.equal(x, image.rot90(1, (1, 2))[:, 5:16, 5:16])
    assert torch.equal(y, label.rot90(1)[5:16, 5:16]) and valid.all()


def test_a_loader_process_can_be_given_the_cut():
    again = pickle.loads(pickle.dumps(TURN))
    image = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    label = torch.randint(5, (30, 40), dtype=torch.uint8)
    ours = TURN(image, label, 3, 4, (16, 16), common.rng("cut"))
    theirs = again(image, label, 3, 4, (16, 16), common.rng("cut"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# ---- batch norm ----------------------------------------------------------------------------------


def test_blends_are_normalized_by_their_batch_and_do_not_enter_the_running_statistics():
    norms = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), common.FrozenBatchNorm(3))
    network = Scale(nn.Conv2d(3, 3, 3), *norms).train()
    network(torch.rand(2, 3, 8, 8))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    guide, image = torch.randint(80, (2, 2, 3, 8, 8), dtype=torch.uint8)
    _, x_mix, mask = blend(network, guide, image)
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())
    torch.testing.assert_close(mask, network(x_mix))  # the same statistics of the batch
    changed = {name for name, x in network.state_dict().items() if not torch.equal(before[name], x)}
    means = {name for name in changed if name.endswith("running_mean")}
    assert means == {"layers.1.running_mean", "layers.2.0.running_mean"}  # now they count


# ---- the paper's settings ------------------------------------------------------------------------


SIZES = {"vocaug": [10582], "cityscapes": [2975], "context": [4998, 4996], "streets": [256]}


def arguments(line):
    """The arguments of a command line, with the labels of each public size of the dataset."""
    args = common.parse_args(guidedmix.get_parser(), guidedmix.PAPER, line.split())
    share = args.labels
    for size in SIZES[args.dataset]:  # as common.split() counts them
        data = SimpleNamespace(name=args.dataset, train=range(size))
        args.labels = common.count_labels(share, data)
        yield args


SETTINGS = [
    ("vocaug", (321, 321), 12, 0.5, "similar", True),
    ("cityscapes", (513, 513), 8, 0.3, "random", False),
    ("context", (480, 480), 8, 0.4, "similar", True),
]


@pytest.mark.parametrize("dataset, crop, batch, cap, pairs, classifier", SETTINGS)
def test_the_papers_settings(dataset, crop, batch, cap, pairs, classifier):
    args = next(arguments(f"--dataset {dataset}"))
    assert args.crop == crop and args.batch_size == batch
    assert (args.lambda_cap, args.pairs, args.classifier) == (cap, pairs, classifier)
    assert (args.optimizer, args.lr, args.weight_decay) == ("sgd", 1e-3, 1e-4)
    assert args.iterations == 40_000 and args.scale == (0.5, 2.0) and args.rotation == 10
    assert args.backbone == "resnet101" and args.weights == "imagenet"
    assert (args.alpha, args.decoupling, args.warmup, args.ramp) == (1, "soft", 2000, 0.1)
    assert args.masks == "probabilities" and args.labeled_decoupling == "hard"
    assert args.usup_target == "decoupled" and args.labeled_stop_gradient and args.mitrans
    assert args.scales == [1.0] and not args.flip


def rows(flags, values, miou):
    return [(flags.format(value), expected) for value, expected in zip(values, miou)]


# All tables of the paper with its own numbers, as commands.
R50 = "vocaug --labels 1464"
CAPS_OF_TABLES = (0.1, 0.2, 0.3, 0.4, 0.5)
SHARES = ("1/8", "1/4", "1/2")
MS = "--scales .5 .75 1 1.25 1.5 1.75 --flip"
TABLES = {
    "1": rows(R50 + " --lambda-cap {}", CAPS_OF_TABLES, (67.9, 69.5, 70.7, 71.4, 73.7)),
    "2": [
        (R50 + " --pairs random", 71.9),
        (R50 + " --pairs similar", 73.7),
        (R50 + " --no-mitrans", 72.7),
        (R50 + " --mitrans", 73.7),
        (R50 + " --decoupling hard", 71.4),
        (R50 + " --decoupling soft", 73.7),
    ],
    "3": [(R50, 73.7)],
    "4": rows("vocaug --labels {}", (500, 1000, 1464), (65.4, 68.1, 73.7)),
    "5": rows("vocaug --labels {}", SHARES, (73.4, 75.5, 76.5)),
    "6": rows("cityscapes --lambda-cap {}", CAPS_OF_TABLES, (64.3, 64.0, 65.8, 65.5, 65.7)),
    "7": rows("cityscapes --labels {}", (100, *SHARES), (56.9, 65.8, 67.5, 69.8)),
    "8": rows("context --lambda-cap {}", CAPS_OF_TABLES, (37.6, 39.4, 39.8, 40.3, 40.1)),
    "9": rows("context --labels {}", SHARES[:2], (40.3, 41.7)),
    "10": rows("vocaug --crop 512 512 --labels {}", SHARES, (75.2, 76.5, 77.1)),
    "10, MS": rows("vocaug --crop 512 512 " + MS + " --labels {}", SHARES, (76.4, 77.8, 78.2)),
}


@pytest.mark.parametrize("table", TABLES)
def test_each_row_of_each_table_has_the_papers_number(table):
    for line, miou in TABLES[table]:
        for args in arguments(f"--dataset {line}"):
            assert guidedmix.paper_miou(args) == miou, line
            args.changed.append("split")  # the authors' list, of as many pictures
            assert guidedmix.paper_miou(args) == miou, line


@pytest.mark.parametrize(
    "line",
    [
        "vocaug --labels 1464 --pairs random --no-mitrans",
        "vocaug --labels 1464 --lambda-cap .25",
        "vocaug --labels 1464 --flip",
        "vocaug --labels 700",
        "vocaug --labels 1464 --backbone resnet101",
        "vocaug --labels 500 --backbone resnet101",
        "vocaug --labels 1/8 --backbone resnet50",
        "vocaug --labels 500/10582",
        "vocaug --supervised",
        "vocaug --masks logits",
        "vocaug --usup-target none",
        "vocaug --warmup 100",
        "cityscapes --crop 512 512",
        "vocaug --labels 1464 --iterations 10 --warmup 0",
        "streets",
    ],
)
def test_other_settings_have_no_number_of_the_paper(line):
    for args in arguments(f"--dataset {line}"):
        assert guidedmix.paper_miou(args) is None
