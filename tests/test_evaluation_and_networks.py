"""Evaluation against naive counts, networks as the papers state them, weights in every layout."""

import math
import re
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import rml  # noqa: E402
from helpers import head_parameters  # noqa: E402

CPU = torch.device("cpu")


def arguments(**changes):
    values = dict(
        scales=[1.0],
        flip=False,
        base_size=0,
        precision="fp32",
        full_size_labels=False,
        network="deeplabv2",
        backbone="resnet50",
        head="bottleneck",
        aspp_branches=4,
        output_stride=None,
        batch_norm="frozen",
        weights="none",
        input_style=None,
        seed=0,
    )
    return SimpleNamespace(**values | changes)


def classes(count):
    return SimpleNamespace(names=[f"class {k}" for k in range(count)])


# ---- evaluation ----------------------------------------------------------------------------------


def count_naively(label, prediction, K):
    table = np.zeros((K, K), np.int64)
    for l, p in zip(np.ravel(label), np.ravel(prediction)):
        if l != 255:
            table[l, p] += 1
    return table


def iou_naively(table):
    values = []
    for k in range(len(table)):
        hit = table[k, k]
        false_positive = table[:, k].sum() - hit
        false_negative = table[k].sum() - hit
        union = hit + false_positive + false_negative
        values.append(100 * hit / union if union else float("nan"))
    return np.array(values)


def random_labels(shape, K, seed, ignored=0.2):
    r = np.random.RandomState(seed)
    return np.where(r.uniform(size=shape) < ignored, 255, r.randint(0, K, shape)).astype(np.int64)


def test_confusion_matrix_counts_rows_by_label_and_leaves_255_out():
    label, prediction = random_labels((2, 9, 7), 5, 0), random_labels((2, 9, 7), 5, 1, ignored=0)
    table = common.confusion_matrix(torch.from_numpy(label), torch.from_numpy(prediction), 5)
    assert table.dtype == torch.int64
    np.testing.assert_array_equal(table, count_naively(label, prediction, 5))
    assert table.sum() == (label != 255).sum()


def test_confusion_matrix_leaves_out_what_a_pseudo_label_ignores():
    label, pseudo_label = random_labels((40, 40), 3, 0), random_labels((40, 40), 3, 1)
    both = (label != 255) & (pseudo_label != 255)
    table = common.confusion_matrix(torch.from_numpy(label), torch.from_numpy(pseudo_label), 3)
    np.testing.assert_array_equal(table, count_naively(label[both], pseudo_label[both], 3))


def test_confusion_matrix_of_ignored_pixels_alone_is_zero():
    label, prediction = torch.full((1, 4, 4), 255), torch.zeros(1, 4, 4, dtype=torch.int64)
    assert common.confusion_matrix(label, prediction, 3).sum() == 0


def test_iou_and_mean_iou():
    label, prediction = random_labels((30, 30), 4, 2), random_labels((30, 30), 4, 3, ignored=0)
    table = count_naively(label, prediction, 4)
    np.testing.assert_allclose(common.iou(torch.from_numpy(table)), iou_naively(table))
    assert common.mean_iou(torch.from_numpy(table)) == pytest.approx(iou_naively(table).mean())


def test_a_class_that_is_only_predicted_counts_as_zero_and_one_that_is_nowhere_is_skipped():
    table = torch.zeros(4, 4, dtype=torch.int64)
    table[0, 0] = 6
    table[1, 1] = table[1, 2] = 3  # class 2 is predicted and never true, class 3 is neither
    assert common.iou(table)[:3].tolist() == [100, 50, 0] and common.iou(table)[3].isnan()
    assert common.mean_iou(table) == 50


class Colors(nn.Module):
    """A network of patches of 4 x 4 pixels; its logits are asymmetric, for wrong flips."""

    stride, align_corners = 4, False

    def __init__(self, K=4):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 4, stride=4, bias=False)
        self.dropout = nn.Dropout(0.5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.conv.weight, 0, 1.0)

    def forward(self, x):
        return self.dropout(self.conv(x - 0.5))


class Pictures:
    """Pictures of several sizes with random labels of four classes."""

    names = ["a", "b", "c", "d"]
    val = [f"val_{i}" for i in range(7)]

    def image(self, id):
        i = int(id[-1])
        return np.random.RandomState(i).randint(0, 256, (16 + 4 * i, 24, 3)).astype(np.uint8)

    def label(self, id, full_size=False):
        height, width = self.image(id).shape[:2]
        return random_labels(
            (height * 2, width * 2) if full_size else (height, width), 4, int(id[-1])
        ).astype(np.uint8)


def evaluate_naively(network, data, full_size=False):
    table = np.zeros((4, 4), np.int64)
    for id in data.val:
        image, label = data.image(id), data.label(id, full_size)
        logits = network.eval()(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        upsampled = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        upsampled = F.interpolate(upsampled, label.shape, mode="bilinear", align_corners=False)
        table += count_naively(label, upsampled.argmax(1)[0], 4)
    return table


@pytest.mark.parametrize("full_size", [False, True])
def test_evaluate_against_a_naive_count(full_size):
    network, data = Colors(), Pictures()
    tables = common.evaluate(
        {"student": network.train(), "other": Colors().eval()},
        data,
        arguments(full_size_labels=full_size),
        CPU,
    )
    with torch.no_grad():
        np.testing.assert_array_equal(
            tables["student"], evaluate_naively(Colors(), data, full_size)
        )
    assert torch.equal(tables["student"], tables["other"])  # dropout is off
    assert tables["student"].sum() == sum(
        (data.label(id, full_size) != 255).sum() for id in data.val
    )


def test_evaluate_leaves_each_network_in_its_mode():
    networks = {"trains": Colors().train(), "predicts": Colors().eval()}
    common.evaluate(networks, Pictures(), arguments(), CPU)
    assert (
        networks["trains"].training
        and networks["trains"].dropout.training
        and not networks["predicts"].training
    )


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_the_shares_of_processes_count_every_picture_once(processes, monkeypatch):
    network, data = Colors(), Pictures()
    whole = common.evaluate({"n": network}, data, arguments(), CPU)["n"]
    monkeypatch.setattr(common, "world_size", lambda: processes)
    shares = []
    for process in range(processes):
        monkeypatch.setattr(common, "rank", lambda: process)
        shares.append(common.evaluate({"n": network}, data, arguments(), CPU)["n"])
    assert torch.equal(sum(shares), whole)
    assert all(not torch.equal(share, whole) for share in shares)


def resize_naively(x, height, width):
    """Bilinear, cell centres aligned: (K, h, w) -> (K, height, width)."""

    def weights(n_out, n_in):
        table = np.zeros((n_out, n_in))
        for i in range(n_out):
            place = min(max((i + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
            low = int(place)
            high = min(low + 1, n_in - 1)
            table[i, low] += 1 - (place - low)
            table[i, high] += place - low
        return table

    return np.einsum("ih,khw,jw->kij", weights(height, x.shape[1]), x, weights(width, x.shape[2]))


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("extra", [0, 1])  # caffe's backbones have a row more where sides are even
def test_a_cell_lies_on_pixel_stride_times_its_number_at_every_size(stride, extra):
    for size in range(32, 521):
        cells = math.ceil(size / stride) + extra
        probe = stride * torch.arange(cells).float()
        maps = torch.stack([probe[:, None].expand(cells, 7), probe[:, None].expand(cells, 7)])[None]
        found = common.upsample(maps, (size, 13), stride)[0, 0]
        expected = torch.arange(size).clamp(max=stride * (cells - 1))  # the border is continued
        assert found.shape == (size, 13) and torch.equal(found[:, 0], expected.float()), size
        found = common.upsample(maps.transpose(2, 3), (13, size), stride)[0, 1]
        assert torch.equal(found[12], expected.float()), size


@pytest.mark.parametrize("stride", [2, 16])
def test_a_patch_lies_in_the_middle_of_its_pixels_at_every_size(stride):
    for size in range(32, 521):
        cells = math.ceil(size / stride)
        middle = stride * torch.arange(cells) + (stride - 1) / 2
        found = common.upsample(middle.view(1, 1, 1, -1), (1, size), stride, False)[0, 0, 0]
        expected = torch.arange(size).clamp(middle[0], middle[-1])
        torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backbone, deep_stem, caffe", [
    ("tiny", False, False), ("resnet50", False, False), ("resnet50", False, True),
    ("resnet50", 64, False)])
def test_a_cell_sees_as_far_on_both_sides_of_its_pixel(backbone, deep_stem, caffe, monkeypatch):
    """So cell i is centred on pixel stride * i, whatever the size of the picture."""
    monkeypatch.setattr(common, "group_norm", nn.Identity)  # it sees the whole picture
    network = common.make_backbone(backbone, "train", caffe, deep_stem).eval()
    network.layer2 = network.layer2[:1]  # shallow: what it sees ends within the picture
    network.layer3 = network.layer4 = nn.Identity()
    if backbone != "tiny":  # a maximum passes its gradient to one of equal pixels
        network.maxpool = nn.AvgPool2d(3, 2, 1, ceil_mode=network.maxpool.ceil_mode)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    stride = network.stride
    for size in (200, 201, 204):
        image = torch.ones(1, 3, size, size, requires_grad=True)
        middle = size // 2 // stride
        network(image)[0, 0, middle, middle].backward()
        seen = image.grad[0, 0].sum(0).nonzero()[:, 0]
        assert seen[0] + seen[-1] == 2 * stride * middle


@pytest.mark.parametrize("size", [64, 65, 127, 321])
def test_maps_of_a_decoder_meet_at_the_same_pixels(size):
    """DeepLabv3+: what layer4 says about pixel 16 i stands at cell 4 i of layer1."""
    spec = dict(backbone="resnet50", classes=3, batch_norm="train", style="torchvision")
    network = common.make_network(spec | {"network": "deeplabv3plus", "aspp_branches": 4})
    pixels = [stride * torch.arange(math.ceil(size / stride)).float() for stride in (4, 16)]
    layer1, layer4 = (row.expand(1, 1, len(row), -1) for row in pixels)
    network.backbone.layers = lambda x: (None, layer1, None, None, layer4)
    for name in ("bottleneck", "low", "decoder"):
        setattr(network, name, nn.Identity())
    network.branches = nn.ModuleList([nn.Identity()])
    network.pool = nn.AdaptiveAvgPool2d(1)
    context, high, low = network.features(torch.zeros(1, 3, size, size))[0]
    assert torch.equal(high, low.clamp(max=layer4.max()))
    assert torch.equal(context[0], layer4.mean().expand(len(pixels[0])))


def test_predict_averages_probabilities_over_scales_and_mirrored_pictures():
    network = Colors().eval()
    image = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (2, 3, 16, 24)).astype(np.uint8)
    )
    args = arguments(scales=[0.5, 1.0, 1.5], flip=True)
    p = common.predict(network, image, args, (32, 48))
    assert p.shape == (2, 4, 32, 48) and p.dtype == torch.float32
    for b in range(2):
        views = []
        for scale in args.scales:
            for mirrored in (False, True):
                x = resize_naively(image[b].numpy() / 255.0, int(16 * scale), int(24 * scale))
                x = x[:, :, ::-1].copy() if mirrored else x
                with torch.no_grad():
                    logits = network(torch.from_numpy(x)[None].float())[0].double().numpy()
                logits = resize_naively(logits, *x.shape[1:])
                logits = resize_naively(logits, 32, 48)
                logits = logits[:, :, ::-1] if mirrored else logits
                views.append(np.exp(logits) / np.exp(logits).sum(0))
        np.testing.assert_allclose(p[b], np.mean(views, 0), atol=1e-5)
    single = common.predict(network, image, arguments(), (32, 48))
    assert (single - p).abs().max() > 0.05  # scales and flips do something


# ---- networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnets():
    """The backbones of both sizes, in torchvision's and in the caffe style; each is built once."""
    return {
        (name, caffe): common.make_backbone(name, caffe=caffe).eval()
        for name in ("resnet50", "resnet101")
        for caffe in (False, True)
    }


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# torchvision states 25,557,032 and 44,549,160 for its ResNets, with their layer 2048 -> 1000.
BACKBONE = {"resnet50": 25_557_032 - 2_049_000, "resnet101": 44_549_160 - 2_049_000}


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
@pytest.mark.parametrize("branches", [2, 4])
def test_parameters_of_deeplab_on_resnets(resnets, name, branches):
    backbone = resnets[name, False]
    assert (
        parameters(backbone)
        == BACKBONE[name]
        == {"resnet50": 23_508_032, "resnet101": 42_500_160}[name]
    )
    rates = (6, 12, 18, 24)[:branches]
    plain = common.DeepLabV2(backbone, 19, "plain", rates)
    assert parameters(plain) == BACKBONE[name] + branches * (2048 * 19 * 9 + 19)
    bottleneck = common.DeepLabV2(backbone, 19, "bottleneck", rates)
    total = 256 * (branches + 1)
    head = 2048 * 256 + 256 + 2 * 256  # a conv with biases, a group norm
    head += branches * (2048 * 256 * 9 + 256 + 2 * 256)
    head += total * (total // 16) + total // 16  # squeeze
    head += total // 16 * total + total  # excitation
    head += (total * 256 * 9 + 256 + 2 * 256) + 256 * 19
    assert parameters(bottleneck) == BACKBONE[name] + head
    if branches == 4:
        assert parameters(plain) == {"resnet50": 24_908_940, "resnet101": 43_901_068}[name]
        assert parameters(bottleneck) == {"resnet50": 46_071_440, "resnet101": 65_063_568}[name]


def spec(**changes):
    return (
        dict(
            network="deeplabv2",
            backbone="tiny",
            head="bottleneck",
            aspp_branches=4,
        output_stride=None,
            batch_norm="frozen",
            style="torchvision",
            classes=10,
        )
        | changes
    )


def test_parameters_of_tiny():
    assert parameters(common.make_network(spec())) == 308_058
    assert parameters(common.make_network(spec(head="plain"))) == parameters(
        common.make_backbone("tiny")
    ) + 4 * (64 * 10 * 9 + 10)


@pytest.mark.parametrize("caffe", [False, True])
@pytest.mark.parametrize("name, depths", [("resnet50", [3, 4, 6, 3]), ("resnet101", [3, 4, 23, 3])])
def test_strides_and_dilations_of_every_block(resnets, name, depths, caffe):
    backbone = resnets[name, caffe]
    assert backbone.maxpool.ceil_mode == caffe
    for number, (layer, depth) in enumerate(
        zip([backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4], depths), 1
    ):
        assert len(layer) == depth
        dilation = {1: 1, 2: 1, 3: 2, 4: 4}[number]
        for b, block in enumerate(layer):
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert block.conv1.dilation == block.conv3.dilation == (1, 1)
            halves = number == 2 and b == 0
            assert block.conv1.stride == ((2, 2) if halves and caffe else (1, 1))
            assert block.conv2.stride == ((2, 2) if halves and not caffe else (1, 1))
            assert (block.downsample is not None) == (b == 0)
            if b == 0:
                assert block.downsample[0].stride == ((2, 2) if halves else (1, 1))


def test_strides_and_dilations_of_tiny():
    backbone = common.make_backbone("tiny")
    for layer, dilation in (
        (backbone.layer1, 1),
        (backbone.layer2, 1),
        (backbone.layer3, 2),
        (backbone.layer4, 4),
    ):
        assert len(layer) == 2
        for block in layer:
            assert (
                block.conv1.dilation
                == block.conv2.dilation
                == block.conv1.padding
                == block.conv2.padding
                == (dilation, dilation)
            )


def test_a_dilated_block_is_the_undilated_one_on_every_fourth_cell(resnets):
    block = resnets["resnet50", False].layer4[0]
    undilated = torchvision.models.resnet.Bottleneck(
        1024, 512, downsample=block.downsample, norm_layer=common.FrozenBatchNorm
    ).eval()
    undilated.load_state_dict(block.state_dict())
    x = torch.randn(1, 1024, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            block(x)[:, :, ::4, ::4], undilated(x[:, :, ::4, ::4]), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["resnet50", "tiny"])
@pytest.mark.parametrize("head", ["plain", "bottleneck"])
def test_output_stride_is_8_or_4_and_logits_are_the_classifier_of_the_features(resnets, name, head):
    backbone = common.make_backbone("tiny") if name == "tiny" else resnets[name, False]
    network = common.DeepLabV2(backbone, 5, head, (1, 2, 4, 6), width=64).eval()
    assert network.stride == (4 if name == "tiny" else 8)
    for size, expected in (((64, 96), (8, 12)), ((33, 65), (5, 9))):
        expected = {8: expected, 4: tuple(math.ceil(n / 4) for n in size)}[network.stride]
        image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = network.features(image)
            logits = network(image)
            assert features.shape == (2, network.feature_channels, *expected)
            assert logits.shape == (2, 5, *expected)
            assert torch.equal(logits, network.classifier(features))
            assert torch.equal(logits, network(image))  # nothing random in eval mode
    assert network.feature_channels == (
        64 if head == "bottleneck" else {"tiny": 64, "resnet50": 2048}[name]
    )


@pytest.mark.parametrize(
    "size, expected", [((65, 65), (9, 9)), ((64, 128), (9, 17)), ((321, 17), (41, 3))]
)
def test_caffe_style_rounds_up_in_max_pooling(resnets, size, expected):
    """ceil_mode adds a cell at even sizes: 64 -> 32 -> 17 -> 9.

    What is combined with these features must take their size from them."""
    with torch.no_grad():
        assert resnets["resnet50", True](torch.zeros(1, 3, *size)).shape[2:] == expected


def test_heads_as_the_papers_have_them():
    plain = common.make_network(spec(backbone="tiny", head="plain", classes=7))
    assert [conv.dilation for conv in plain.branches] == [conv.padding for conv in plain.branches]
    x = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sum(
            F.conv2d(x, c.weight, c.bias, padding=c.padding, dilation=c.dilation)
            for c in plain.branches
        )
        torch.testing.assert_close(plain.classifier(x), expected)
    for conv in plain.branches:  # N(0, .01)
        assert abs(float(conv.weight.detach().std()) - 0.01) < 0.001


def test_aspp_branches_are_all_four_or_the_first_ones(monkeypatch):
    slim_resnets(monkeypatch)
    # ProDA's head has a 1x1 branch before the dilated ones.
    for head, extra in (("plain", 0), ("bottleneck", 1)):
        for branches in (1, 2, 4):
            network = common.make_network(
                spec(backbone="resnet50", head=head, aspp_branches=branches)
            )
            rates = [
                m.dilation[0]
                for m in network.branches.modules()
                if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
            ]
            assert rates == [6, 12, 18, 24][:branches] and len(network.branches) == branches + extra


def test_frozen_batch_norm_never_changes_and_gets_no_gradient(monkeypatch):
    slim_resnets(monkeypatch)
    network = common.make_network(spec(backbone="resnet50"))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], 0.1, weight_decay=0.1
    )
    network.train()(torch.rand(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert all(
        not norm.training and norm.weight.grad is None and norm.bias.grad is None for norm in norms
    )
    after = network.state_dict()
    frozen = [k for k in before if re.search(r"bn\d\.|downsample\.1\.", k)]
    assert len(frozen) == 53 * 5 and all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(
        before["backbone.layer4.0.conv2.weight"], after["backbone.layer4.0.conv2.weight"]
    )
    trained = common.make_network(spec(backbone="resnet50", batch_norm="train")).train()
    trained(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert (
        trained.backbone.bn1.running_mean.abs().sum() > 0
        and trained.backbone.bn1.weight.grad is not None
    )


def test_batch_norm_whose_affine_part_is_frozen_moves_its_statistics(monkeypatch):
    slim_resnets(monkeypatch)
    network = common.make_network(spec(backbone="resnet50", batch_norm="affine-frozen"))
    network.train()(torch.rand(2, 3, 32, 32) + 3).square().mean().backward()
    norms = [m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53
    for norm in norms:
        assert norm.weight.grad is None and norm.bias.grad is None
        assert norm.training and norm.running_mean.abs().sum() > 0
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) or norm.weight.eq(0).all()
    assert network.backbone.conv1.weight.grad is not None


def test_a_new_frozen_batch_norm_is_frozen_before_any_call_of_train_or_eval():
    norm = common.FrozenBatchNorm(3)
    norm(torch.randn(2, 3, 4, 4) + 5)
    assert (
        not norm.training
        and torch.equal(norm.running_mean, torch.zeros(3))
        and norm.num_batches_tracked == 0
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_backbones_and_heads_learn_at_their_rates(optimizer):
    """Every trained parameter once; frozen batch norm not at all; of an ensemble, and a branch."""
    ensemble = nn.ModuleList(common.make_network(spec(backbone="tiny")) for _ in range(2))
    branch = nn.Conv2d(3, 3, 1)
    branch.bias.requires_grad_(False)
    ensemble[0].backbone.conv1.requires_grad_(False)
    args = SimpleNamespace(optimizer=optimizer, weight_decay=0.1, head_lr=10.0)
    made = common.make_optimizer(args, 0.5, ensemble, branch)
    backbone, heads = ([id(p) for p in group["params"]] for group in made.param_groups)
    expected = [p for network in ensemble for p in network.backbone.parameters()]
    assert backbone == [id(p) for p in expected if p.requires_grad]
    expected = [p for network in ensemble for p in head_parameters(network)]
    assert heads == [id(p) for p in [*expected, branch.weight]]
    assert [group["lr"] for group in made.param_groups] == [0.5, 5.0]
    for factor in (0.5, 0.1):
        common.decay_lr(made, factor)
        assert [group["lr"] for group in made.param_groups] == [0.5 * factor, 5.0 * factor]
    made = common.make_optimizer(args, 0.5, ensemble, head_lr=2.0)
    assert [group["lr"] for group in made.param_groups] == [0.5, 1.0]


class Seen(nn.Module):
    """A backbone that returns its input."""

    widths, stride = [3], 8

    def layers(self, x):
        return [x]


@pytest.mark.parametrize(
    "style, expected",
    [
        (
            "torchvision",
            [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (200 / 255 - 0.406) / 0.225],
        ),
        ("caffe-rgb", [10 - 122.679, 20 - 116.669, 200 - 104.007]),  # 0..255 minus the mean
    ],
)
def test_input_styles_by_content(style, expected):
    network = common.DeepLabV2(Seen(), 2, "plain", style=style)
    color = torch.tensor([10, 20, 200], dtype=torch.uint8)  # RGB
    image = common.to_float(color.view(1, 3, 1, 1).expand(1, 3, 4, 4))
    expected = torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(network.features(image), expected, atol=1e-4, rtol=1e-5)


def test_members_differ_and_the_same_member_of_the_same_seed_is_the_same():
    def build(seed, member):
        args = arguments(backbone="tiny", seed=seed)
        network = common.build_network(args, classes(10), CPU, member)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    torch.manual_seed(0)
    first = build(0, 0)
    torch.rand(5)
    assert torch.equal(build(0, 0), first)
    for other in (build(0, 1), build(1, 0)):
        assert not torch.equal(other, first)
        # The last classifier, which weights do not set.
        assert not torch.equal(other[-640:], first[-640:])


def test_building_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = torch.rand(1)
    common.build_network(arguments(backbone="tiny"), classes(10), CPU)
    assert torch.equal(torch.cat([one, torch.rand(1)]), expected)


def test_frozen_batch_norm_without_weights_is_warned_of(capsys, monkeypatch):
    slim_resnets(monkeypatch)
    common.build_network(arguments(), classes(3), CPU)
    assert "warning: --weights none" in capsys.readouterr().err
    common.build_network(arguments(backbone="tiny"), classes(3), CPU)
    assert capsys.readouterr().err == ""


# ---- weights -------------------------------------------------------------------------------------


def slim_resnets(monkeypatch):
    """ResNets of an eighth of the width under the same names: small files, the same entries."""
    full = common.make_backbone

    def slim(name, batch_norm="frozen", caffe=False, deep_stem=False, output_stride=8):
        if name == "tiny":
            return full(name)
        norms = {"frozen": common.FrozenBatchNorm, "affine-frozen": common.affine_frozen}
        norm = norms.get(batch_norm, nn.BatchNorm2d)
        return common.ResNet(
            torchvision.models.resnet.Bottleneck,
            {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}[name],
            norm,
            slim=8,
            caffe=caffe,
            deep_stem=deep_stem,
            output_stride=output_stride,
        )

    monkeypatch.setattr(common, "make_backbone", slim)


@pytest.fixture
def slim(monkeypatch):
    slim_resnets(monkeypatch)


def torchvision_layout(name="resnet50", counters=True):
    """{torchvision's key: random tensor} of a slim ResNet after a training, with the last layer."""
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else torch.tensor(17)
        for k, v in common.make_backbone(name).state_dict().items()
        if counters or not k.endswith("num_batches_tracked")
    }
    return state | {
        "fc.weight": torch.rand(1000, 256, generator=generator),
        "fc.bias": torch.rand(1000, generator=generator),
    }


def aspp(K=21):
    generator = torch.Generator().manual_seed(1)
    return {
        f"layer5.conv2d_list.{i}.{part}": torch.rand(
            (K, 256, 3, 3) if part == "weight" else (K,), generator=generator
        )
        for i in range(4)
        for part in ("weight", "bias")
    }


def hung_layout(name="resnet50"):
    state = torchvision_layout(name, counters=False)
    return {k: v for k, v in state.items() if not k.startswith("fc.")} | aspp()


def with_prefix(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def build(path, K=21, capsys=None, **changes):
    """The network with the weights at path; with capsys also (loaded, skipped, missing), line."""
    network = common.build_network(
        arguments(weights=str(path), **{"head": "plain"} | changes), classes(K), CPU
    )
    if capsys is None:
        return network
    (line,) = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
    return (
        network,
        [int(n) for n in re.search(r"(\d+) loaded, skipped (\d+).*, missing (\d+)", line).groups()],
        line,
    )


LAYOUTS = {
    "torchvision": (lambda: torchvision_layout(), "torchvision", False),
    "torchvision, module.": (
        lambda: with_prefix("module.", torchvision_layout()),
        "torchvision",
        False,
    ),
    "torchvision, old, without counters": (
        lambda: torchvision_layout(counters=False),
        "torchvision",
        False,
    ),
    "torchvision, in state_dict": (
        lambda: {"epoch": 3, "state_dict": with_prefix("module.", torchvision_layout())},
        "torchvision",
        False,
    ),
    "Hung": (hung_layout, "caffe-rgb", True),
    "Hung, module.": (lambda: with_prefix("module.", hung_layout()), "caffe-rgb", True),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_loads_every_value(layout, slim, tmp_path, capsys):
    make, style, has_head = LAYOUTS[layout]
    torch.save(make(), tmp_path / "weights.pth")
    network, (loaded, skipped, missing), line = build(tmp_path / "weights.pth", 21, capsys)
    counters = "torchvision" in layout and "without" not in layout
    found, expected = network.state_dict(), torchvision_layout(counters=counters)
    for key, value in expected.items():
        if not key.startswith("fc."):
            assert torch.equal(found["backbone." + key], value), key
    if has_head:
        for key, value in aspp().items():
            assert torch.equal(found[key.replace("layer5.conv2d_list", "branches")], value), key
    assert network.spec["style"] == style
    assert network.backbone.layer2[0].conv1.stride == ((1, 1) if style == "torchvision" else (2, 2))
    assert loaded == len(expected) - 2 + 8 * has_head
    assert (skipped, missing) == ((0, 0) if has_head else (2, 8))
    assert ("fc.weight" in line) == (not has_head)


def test_a_head_of_another_number_of_classes_is_skipped_and_reported(slim, tmp_path, capsys):
    torch.save(hung_layout(), tmp_path / "weights.pth")
    network, (loaded, skipped, missing), _ = build(tmp_path / "weights.pth", 19, capsys)
    fresh = common.build_network(arguments(head="plain"), classes(19), CPU)
    assert (loaded, skipped, missing) == (len(hung_layout()) - 8, 8, 8)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(network.branches, fresh.branches))
    assert torch.equal(
        network.backbone.layer4[2].conv3.weight, hung_layout()["layer4.2.conv3.weight"]
    )


def test_fewer_branches_and_the_other_head_take_what_they_have(slim, tmp_path, capsys):
    torch.save(hung_layout(), tmp_path / "weights.pth")
    network, counts, _ = build(tmp_path / "weights.pth", 21, capsys, aspp_branches=2)
    assert counts == [len(hung_layout()) - 4, 4, 0]
    assert torch.equal(network.branches[1].bias, aspp()["layer5.conv2d_list.1.bias"])
    network, (loaded, skipped, missing), _ = build(
        tmp_path / "weights.pth", 21, capsys, head="bottleneck"
    )
    assert (loaded, skipped) == (len(hung_layout()) - 8, 8) and missing == len(
        list(head_parameters(network))
    )


def test_the_input_style_can_be_set_where_the_layout_does_not_tell(slim, tmp_path):
    torch.save(torchvision_layout(), tmp_path / "caffe_resnet.pth")
    network = build(tmp_path / "caffe_resnet.pth", input_style="caffe-rgb")
    assert network.backbone.layer2[0].conv1.stride == (2, 2)
    assert torch.equal(network.backbone.conv1.weight, torchvision_layout()["conv1.weight"])


def test_torchvisions_own_resnet_loads_whole(capsys):
    """At full width, by the names and shapes that torchvision really has."""
    foreign = torchvision.models.resnet50(weights=None)
    network = common.make_network(spec(backbone="resnet50", classes=19))
    network.spec = spec(backbone="resnet50")
    weights, style = common.convert_weights(foreign.state_dict())
    report = common.load_weights(network, weights, "file")
    assert style == "torchvision" and "318 loaded, skipped 2 (fc.weight, fc.bias)" in report
    assert all(
        torch.equal(value, network.backbone.state_dict()[key])
        for key, value in foreign.state_dict().items()
        if not key.startswith("fc.")
    )


def last_pt(path, headline="teacher_1", **changes):
    """A checkpoint of this project with two networks."""
    networks = {}
    for i, name in enumerate(("student_1", "teacher_1")):
        networks[name] = common.build_network(
            arguments(backbone="tiny", **changes), classes(6), CPU, member=i + 5
        )
    torch.save(
        {
            "method": "rml",
            "headline": headline,
            "models": {name: n.state_dict() for name, n in networks.items()},
            "networks": {name: n.spec for name, n in networks.items()},
        },
        path,
    )
    return networks


def test_a_checkpoint_of_this_project_gives_its_headline_network(tmp_path, capsys):
    networks = last_pt(tmp_path / "last.pt", input_style="caffe-rgb")
    network, counts, _ = build(tmp_path / "last.pt", 6, capsys, backbone="tiny", head="bottleneck")
    assert counts == [len(network.state_dict()), 0, 0] and network.spec["style"] == "caffe-rgb"
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), networks["teacher_1"].state_dict().values())
    )
    assert not torch.equal(network.last.weight, networks["student_1"].last.weight)
    network, counts, line = build(
        tmp_path / "last.pt", 9, capsys, backbone="tiny", head="bottleneck"
    )
    assert counts == [len(network.state_dict()) - 1, 1, 1] and "last.weight" in line
    assert torch.equal(network.backbone.conv1.weight, networks["teacher_1"].backbone.conv1.weight)


def test_members_share_the_weights_and_have_different_heads(slim, tmp_path, capsys):
    torch.save(torchvision_layout(), tmp_path / "weights.pth")
    members = [
        common.build_network(
            arguments(weights=str(tmp_path / "weights.pth")), classes(5), CPU, member
        )
        for member in (0, 1)
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(members[0].backbone.parameters(), members[1].backbone.parameters())
    )
    assert not torch.equal(members[0].last.weight, members[1].last.weight)
    assert capsys.readouterr().out.count("weights ") == 1  # reported once


def bad_file(path, kind):
    if kind == "a text file":
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:41f33a49\nsize 176000000\n"
        )
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html><body>404</body></html>\n")
    elif kind == "a table of numbers":
        path.write_text("0.1 0.2 0.3\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "an unknown layout":
        torch.save({"blocks.0.weight": torch.zeros(3), "decoder.bias": torch.zeros(3)}, path)
    elif kind == "MS-DeepLab's layout":
        torch.save(with_prefix("Scale.", hung_layout()), path)
    elif kind == "kazuto1011's layout":
        torch.save({"layer2.block1.reduce.conv.weight": torch.zeros(3)}, path)
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    elif kind == "numbers as keys":
        torch.save({0: torch.zeros(3), 1: torch.zeros(3)}, path)
    elif kind == "a last.pt of another project":
        torch.save({"models": {"a": {"w": torch.zeros(3)}}}, path)
    elif kind == "a whole pickled module":
        torch.save({"model": nn.Linear(2, 2)}, path)
    elif kind == "another backbone":
        torch.save(torchvision_layout("resnet101"), path)
    elif kind == "a smaller backbone":
        torch.save(
            {k: v for k, v in torchvision_layout().items() if not k.startswith("layer3.5")}, path
        )
    elif kind == "tiny's last.pt":
        last_pt(path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "a text file",
        "a web page",
        "a table of numbers",
        "empty",
        "an unknown layout",
        "MS-DeepLab's layout",
        "kazuto1011's layout",
        "a list",
        "numbers as keys",
        "a last.pt of another project",
        "a whole pickled module",
        "another backbone",
        "a smaller backbone",
        "tiny's last.pt",
    ],
)
def test_a_bad_weights_file_is_named(kind, slim, tmp_path):
    path = bad_file(tmp_path / "weights.pth", kind)
    with pytest.raises(common.UserError) as error:
        build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if "backbone" in kind:
        assert "--backbone resnet50" in str(error.value)
    if kind == "an unknown layout":
        assert "blocks.0.weight" in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_weights_file_is_named_wherever_it_ends(zipped, slim, tmp_path):
    """Hung's file and torchvision's older ones are no zip files; a download can end anywhere."""
    whole, path = tmp_path / "whole.pth", tmp_path / "weights.pth"
    torch.save(
        {"conv1.weight": torch.rand(4, 3), "bn1.weight": torch.rand(4)},
        whole,
        _use_new_zipfile_serialization=zipped,
    )
    data = whole.read_bytes()
    for size in [*range(0, min(len(data), 700), 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(common.UserError) as error:
            common.load_torch(path)
        assert str(path) in str(error.value), size
    assert common.load_torch(whole).keys() == {"conv1.weight", "bn1.weight"}


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(common.UserError, match="nowhere.pth.*no such file"):
        build(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("weights", ["imagenet", "coco"])
def test_tiny_has_no_pretrained_weights(weights):
    with pytest.raises(common.UserError, match=f"--weights {weights}.*tiny"):
        common.build_network(arguments(weights=weights, backbone="tiny"), classes(3), CPU)


@pytest.mark.parametrize(
    "weights, backbone, file",
    [
        ("imagenet", "resnet50", "resnet50-0676ba61.pth"),
        ("imagenet", "resnet101", "resnet101-63fe2227.pth"),
        ("coco", "resnet101", "resnet101COCO-41f33a49.pth"),
    ],
)
@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        RuntimeError("invalid hash value"),
        TimeoutError("timed out"),
    ],
)
def test_without_network_the_url_and_the_place_are_named(
    weights, backbone, file, failure, tmp_path, monkeypatch
):
    asked = []

    def fail(url, *_, **__):
        asked.append(url)
        raise failure

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(common.UserError) as error:
        common.build_network(arguments(weights=weights, backbone=backbone), classes(3), CPU)
    assert asked[0].endswith(file)
    assert (
        asked[0] in str(error.value)
        and str(tmp_path / "checkpoints" / file) in str(error.value)
        and "\n" not in str(error.value)
    )


def test_what_was_downloaded_once_is_used_again(slim, tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append(hash_prefix)
        torch.save(torchvision_layout(), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        network = common.build_network(arguments(weights="imagenet"), classes(3), CPU)
        assert torch.equal(network.backbone.conv1.weight, torchvision_layout()["conv1.weight"])
    assert asked == ["0676ba61"]


def test_coco_weights_exist_for_resnet101_alone(slim, tmp_path, monkeypatch):
    """The error comes before 170 MB are downloaded for nothing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads")
    )
    with pytest.raises(common.UserError, match="resnet101"):
        common.build_network(arguments(weights="coco", backbone="resnet50"), classes(3), CPU)


def test_the_whole_method_runs_on_a_caffe_style_network(slim, tmp_path, monkeypatch):
    """Features have one row and column more than the crop's eighth.

    Soft labels and prototypes must meet them there."""

    class FewStreets(common.Streets):
        def __init__(self):
            super().__init__()
            self.train, self.val = self.train[:4], self.val[:1]

    flags = (
        "--backbone resnet50 --weights none --input-style caffe-rgb --labels 2 --batch-size 2 "
        "--crop 32 64 --stage0-iterations 1 --iterations 1 --stages 1 --stage0-lr 1e-5 --lr 1e-5 "
        "--out run"
    )
    monkeypatch.setattr(common, "Streets", FewStreets)
    monkeypatch.setattr(sys, "argv", ["rml.py", *flags.split()])
    monkeypatch.chdir(tmp_path)
    rml.main()
    assert (tmp_path / "run/result.json").exists()
