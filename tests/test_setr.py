"""SETR: the network by hand, its weights; rml.py with two different students (Table 5)."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import rml  # noqa: E402
from helpers import (
    head_parameters,
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

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**changes):
    return dict(network="setr", backbone="tiny", classes=10, style="torchvision", grid=14) | changes


@pytest.fixture
def tiny(seeded):
    return common.ViT(*common.VITS["tiny"]).eval()


# ---- the transformer -----------------------------------------------------------------------------


def test_positions_are_as_loaded_at_the_grid_they_belong_to(tiny):
    assert tiny.positions(14, 14) is tiny.encoder.pos_embedding
    same = F.interpolate(
        tiny.encoder.pos_embedding[:, 1:].transpose(1, 2).reshape(1, -1, 14, 14),
        (14, 14),
        mode="bicubic",
        align_corners=False,
    )
    # The short cut changes nothing.
    torch.testing.assert_close(same.flatten(2).transpose(1, 2), tiny.encoder.pos_embedding[:, 1:])


@pytest.mark.parametrize("h, w", [(16, 32), (8, 16), (28, 14), (5, 40), (14, 13)])
def test_positions_of_other_grids(tiny, h, w):
    """Interpolation keeps linear functions of the place, at the centres of the new patches.

    Channel 0 grows by one per patch downwards, channel 1 to the right; channel 2 is constant."""
    with torch.no_grad():
        grid = torch.zeros(14, 14, 64)
        grid[..., 0] = torch.arange(14.0)[:, None]
        grid[..., 1] = torch.arange(14.0)
        grid[..., 2] = 7
        tiny.encoder.pos_embedding[0, 0] = 100
        tiny.encoder.pos_embedding[0, 1:] = grid.reshape(196, 64)
        found = tiny.positions(h, w)
    assert found.shape == (1, 1 + h * w, 64)
    assert (found[0, 0] == 100).all()  # the class token's is not interpolated
    found, checked = found[0, 1:].reshape(h, w, 64), 0
    for y in range(h):
        for x in range(w):
            # The same place, counted in old patches.
            wanted = [(y + 0.5) * 14 / h - 0.5, (x + 0.5) * 14 / w - 0.5]
            assert found[y, x, 2] == pytest.approx(7, abs=1e-5)
            for k in range(2):
                # At the rim points are missing. Within, torch's cubic (a = -.75) swings around a
                # line by less than this.
                if 1 <= wanted[k] <= 12:
                    assert found[y, x, k] == pytest.approx(wanted[k], abs=0.06)
                    checked += 1
    assert checked > h * w


def test_it_is_torchvisions_transformer(seeded):
    """The same weights give the same tokens, at the size that torchvision's takes."""
    theirs = torchvision.models.VisionTransformer(
        image_size=112, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=256
    ).eval()
    ours = common.ViT(*common.VITS["tiny"]).eval()
    ours.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("heads.")}
    )
    image = torch.rand(2, 3, 112, 112)
    tokens = theirs.encoder(
        torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(image)], 1)
    )[:, 1:]
    assert torch.equal(ours(image), tokens.transpose(1, 2).reshape(2, 64, 14, 14))


def test_patches_keep_their_places(tiny):
    """Without attention a cell of the output depends on the pixels of one patch alone."""
    for layer in tiny.encoder.layers:
        nn.init.zeros_(layer.self_attention.out_proj.weight)
        nn.init.zeros_(layer.self_attention.out_proj.bias)
    image = torch.rand(1, 3, 24, 40)
    other = image.clone()
    other[:, :, 8:16, 32:40] += 0.5
    changed = (tiny(image) != tiny(other)).any(1)[0]
    assert changed.shape == (3, 5) and changed.nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("name", ["setr", "setr-naive"])
def test_a_side_that_patches_do_not_divide_is_padded_with_the_mean_color(name, seeded):
    network = common.make_network(spec(network=name)).eval()
    image = torch.rand(2, 3, 60, 121)
    padded = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).repeat(2, 1, 64, 128)
    padded[:, :, :60, :121] = image
    h, w = math.ceil(60 / network.stride), math.ceil(121 / network.stride)
    with torch.no_grad():
        answer = network(image)
        torch.testing.assert_close(answer, network(padded)[:, :, :h, :w])
    assert answer.shape == (2, 10, h, w) and network.stride == 2
    assert network(torch.rand(1, 3, 3, 5)).shape == (1, 10, 2, 3)  # smaller than a patch


@pytest.mark.parametrize("name", ["setr", "setr-naive"])
@pytest.mark.parametrize("side", [321, 333, 375, 500, 512])
def test_an_answer_stays_where_its_patch_is(name, side):
    """Tokens that say where they are, upsampled to the picture: right to a pixel at any side."""

    class Where(nn.Module):
        widths, stride = [1], 16

        def forward(self, x):
            count = math.ceil(x.shape[3] / 16)
            centres = 16 * torch.arange(count) + 7.5  # of the patches, in pixels
            return centres.expand(1, 1, 2, count)

    network = common.SETR(Where(), 1, name == "setr-naive", 1, norm=lambda width: nn.Identity())
    for m in network.modules():
        if isinstance(m, nn.Conv2d):  # each becomes the identity
            nn.init.zeros_(m.weight)
            m.weight.data[0, 0, m.weight.shape[2] // 2, m.weight.shape[3] // 2] = 1
    logits = network(torch.zeros(1, 3, 32, side))
    found = common.upsample(logits, (32, side), network.stride, network.align_corners)[0, 0, 16]
    error = (found - torch.arange(side)).abs()
    assert error[16:-16].max() < 1.01  # at the rim there is less to interpolate from


# torchvision's numbers without the classifier.
@pytest.mark.parametrize(
    "backbone, encoder, width", [("vit_b_16", 85_798_656, 768), ("vit_l_16", 303_301_632, 1024)]
)
@pytest.mark.parametrize("name", ["setr", "setr-naive"])
def test_parameter_counts(name, backbone, encoder, width):
    with torch.device("meta"):
        network = common.make_network(spec(network=name, backbone=backbone, classes=19))
    last = 256 * 19 + 19
    decoder = (
        width * 256 + 2 * 256
        if name == "setr-naive"
        else width * 256 * 9 + 3 * 256 * 256 * 9 + 4 * 2 * 256
    )
    assert sum(p.numel() for p in network.parameters()) == encoder + decoder + last
    assert sum(p.numel() for p in head_parameters(network)) == decoder + last
    counted = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.meta["num_params"]
    assert encoder == counted - 1000 * width - 1000


def test_the_last_upsampling_may_come_after_the_classifier(seeded):
    """PUP's fourth x 2 and the 1x1 conv may swap: both are linear."""
    network = common.make_network(spec()).eval()
    with torch.no_grad():
        features = network.features(torch.rand(1, 3, 64, 128))
        late = common.upsample(network.classifier(features), (64, 128), 2, align_corners=False)
        early = network.last(
            F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        )
    torch.testing.assert_close(late, early)
    convs = [
        m
        for m in common.make_network(spec(backbone="vit_b_16")).decoder
        if isinstance(m, nn.Conv2d)
    ]
    assert len(convs) == 4 and all(
        conv.kernel_size == (3, 3) and conv.out_channels == 256 for conv in convs
    )


def test_features_and_classifier_are_the_network(seeded):
    network, image = common.make_network(spec()).eval(), torch.rand(1, 3, 64, 128)
    features = network.features(image)
    assert features.shape == (1, network.feature_channels, 32, 64)
    assert torch.equal(network.classifier(features), network(image))
    assert {id(p) for p in network.parameters()} == {
        id(p) for p in [*network.backbone.parameters(), *head_parameters(network)]
    }


# ---- weights -------------------------------------------------------------------------------------


def arguments(**changes):
    return SimpleNamespace(
        **dict(
            network="setr",
            backbone="vit_b_16",
            head="bottleneck",
            aspp_branches=4,
            output_stride=None,
            batch_norm="frozen",
            weights="none",
            input_style=None,
            seed=0,
        )
        | changes
    )


@pytest.fixture
def small_vit(monkeypatch):
    """vit_b_16 with a layer of 16 channels."""
    monkeypatch.setitem(common.VITS, "vit_b_16", (16, 1, 2, 16))


def vit_layout(old=True, grid=14):
    """As torchvision's files have it: the MLP's layers under their old names."""
    torch.manual_seed(1)
    state = torchvision.models.VisionTransformer(grid * 16, 16, 1, 2, 16, 64).state_dict()
    return {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        if old
        else key: value
        for key, value in state.items()
    }


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("grid", [14, 24])
def test_torchvisions_weights_are_loaded(small_vit, old, grid, tmp_path, capsys):
    """Also those of larger pictures, whose position embeddings belong to 24 x 24 patches."""
    path, state = tmp_path / "vit.pth", vit_layout(old, grid)
    torch.save(state, path)
    network = common.build_network(
        arguments(weights=str(path)), SimpleNamespace(names=range(19)), CPU
    )
    report = capsys.readouterr().out
    assert (
        f"{len(state) - 2} loaded, skipped 2 (heads.head.weight, heads.head.bias)" in report
        and "warning" not in report
    )
    found = network.backbone.state_dict()
    for key, value in vit_layout(old=False, grid=grid).items():
        if not key.startswith("heads"):
            assert torch.equal(found[key], value), key
    assert network.backbone.grid == grid
    assert network(torch.rand(1, 3, 64, 32)).shape == (1, 19, 32, 16)
    again = common.make_network(network.spec)  # from a checkpoint's description
    again.load_state_dict(network.state_dict())


def test_imagenet_weights_are_torchvisions(small_vit, tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url.split("/")[-1], hash_prefix))
        torch.save(vit_layout(), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    network = common.build_network(
        arguments(weights="imagenet"), SimpleNamespace(names=range(3)), CPU
    )
    assert asked == [("vit_b_16-c867db91.pth", "c867db91")]
    assert torch.equal(
        network.backbone.encoder.pos_embedding, vit_layout()["encoder.pos_embedding"]
    )


def test_weights_of_another_backbone_are_refused(small_vit, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(vit_layout(), path)
    with pytest.raises(common.UserError, match="vit.pth: is not for --backbone vit_l_16"):
        common.build_network(
            arguments(weights=str(path), backbone="vit_l_16"), SimpleNamespace(names=range(3)), CPU
        )
    with pytest.raises(common.UserError, match="vit.pth: is not for --backbone resnet50"):
        common.build_network(
            arguments(weights=str(path), backbone="resnet50", network="deeplabv2"),
            SimpleNamespace(names=range(3)),
            CPU,
        )


# ---- what rml.py does with it --------------------------------------------------------------------


def test_stochastic_depth_drops_both_branches_of_a_block(seeded):
    network = common.make_network(spec()).train()
    rml.add_model_noise(network, 0.0, 1.0)
    block, tokens = network.backbone.encoder.layers[0], torch.rand(3, 5, 64)
    assert torch.equal(block(tokens), tokens)  # every branch is dropped
    block.eval()
    assert not torch.equal(block(tokens), tokens)
    network = common.make_network(spec()).train()
    rml.add_model_noise(network, 0.5, 0.8, linear=True)
    block = network.backbone.encoder.layers[0]
    drops = [layer.stochastic_depth.p for layer in network.backbone.encoder.layers]
    assert drops == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert network.dropout.p == 0.5
    block.train()  # a picture is dropped as a whole, and others stay
    rows = [
        tuple((block.dropout(torch.ones(8, 5, 64)) > 0).flatten(1).float().mean(1).tolist())
        for _ in range(20)
    ]
    assert all(set(row) <= {0.0, 1.0} for row in rows)
    assert len(set(rows)) > 10


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stride, cell", [(2, 8), (4, 8), (8, 8), (2, 2)])
def test_fine_features_are_means_around_cells(seeded, stride, cell, aligned):
    """The mean of features that say where they are is where the cell is, and then the pixel."""
    height, width = 52, 77
    network = SimpleNamespace(
        eval=lambda: None, classifier=lambda features: 2 * features,
        stride=stride, cell=cell, align_corners=aligned,
    )  # fmt: skip
    offset = 0 if aligned else (stride - 1) / 2
    y = stride * torch.arange(math.ceil(height / stride)) + offset
    x = stride * torch.arange(math.ceil(width / stride)) + offset
    features = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None].float()
    network.features = lambda image: features
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    args = SimpleNamespace(precision="fp32")
    pooled, logits = rml.features_and_logits(network, image, args)
    assert torch.equal(logits, 2 * pooled)
    assert pooled.shape == (1, 2, math.ceil(height / cell), math.ceil(width / cell))
    found = common.upsample(pooled, (height, width), cell, aligned)[0]
    wanted = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    # At the rim there is less to interpolate from.
    error = (found - wanted)[:, cell : -2 * cell, cell : -2 * cell].abs()
    assert error.max() < 1e-3


def test_pooled_features_are_means_of_their_window(seeded):
    features = torch.rand(2, 3, 8, 12)
    network = SimpleNamespace(
        eval=lambda: None, features=lambda image: features, classifier=lambda features: features,
        stride=2, cell=8, align_corners=False,
    )  # fmt: skip
    image = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    args = SimpleNamespace(precision="fp32")
    pooled, _ = rml.features_and_logits(network, image, args)
    for y in range(2):
        for x in range(3):
            window = features[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            torch.testing.assert_close(pooled[:, :, y, x], window.mean((2, 3)))
    network.align_corners = True
    pooled, _ = rml.features_and_logits(network, image, args)
    for y in range(2):
        for x in range(3):  # windows are cut at the rim
            rows = slice(max(0, 4 * y - 2), 4 * y + 3)
            columns = slice(max(0, 4 * x - 2), 4 * x + 3)
            window = features[:, :, rows, columns]
            torch.testing.assert_close(pooled[:, :, y, x], window.mean((2, 3)))


def parse(*argv):
    return common.parse_args(rml.get_parser(), rml.PAPER, list(argv))


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", ["deeplabv2 tiny", "deeplabv2 tiny"]),
        ("--network setr", ["setr tiny", "setr tiny"]),
        ("--network deeplabv2,setr", ["deeplabv2 tiny", "setr tiny"]),
        ("--network setr-naive --supervised", ["setr-naive tiny"]),
        (
            "--network deeplabv2,setr --dataset cityscapes",
            ["deeplabv2 resnet101", "setr vit_b_16"],
        ),
        (
            "--network setr,pspnet --backbone vit_l_16,resnet50 --dataset cityscapes",
            ["setr vit_l_16", "pspnet resnet50"],
        ),
        (
            "--backbone resnet50,resnet101 --dataset cityscapes",
            ["deeplabv2 resnet50", "deeplabv2 resnet101"],
        ),
    ],
)
def test_students_may_have_different_networks(argv, expected):
    students = rml.arguments_of_students(parse(*argv.split()))
    assert [f"{student.network} {student.backbone}" for student in students] == expected


def test_students_may_have_different_weights(tmp_path):
    def weights(text):
        students = rml.arguments_of_students(parse("--weights", str(text)))
        return [student.weights for student in students]

    assert weights("a.pth,b.pth") == ["a.pth", "b.pth"]
    path = tmp_path / "a,b.pth"
    path.touch()
    assert weights(path) == [str(path)] * 2


def test_the_weights_of_each_student_are_reported(small_vit, tmp_path, capsys):
    torch.save(vit_layout(), tmp_path / "one.pth")
    torch.save(vit_layout(grid=10), tmp_path / "two.pth")
    for member, name in enumerate(("one", "two", "two")):
        common.build_network(
            arguments(weights=str(tmp_path / f"{name}.pth")),
            SimpleNamespace(names=range(3)),
            CPU,
            member,
        )
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights")]
    assert len(said) == 2
    assert "one.pth" in said[0]
    assert "two.pth" in said[1]


# ---- whole runs ----------------------------------------------------------------------------------

SHORT = "--network deeplabv2,setr --labels 4 --batch-size 2 --stage0-iterations 2 --iterations 3 "
SHORT += "--stages 1 --log-every 1 --save-every 1 --eval-every 100"
SHORT = SHORT.split()
KEYS = ["models", "optimizer_1", "optimizer_2", "prototypes", "scaler"]


def start(*argv):
    run_on_few_streets(rml, *SHORT, *argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two students that differ, from beginning to end: the folder, and the shapes of p^0."""
    folder, shapes, real = tmp_path_factory.mktemp("whole") / "run", {}, common.write_soft_label
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common,
            "write_soft_label",
            lambda folder, id, p: (
                shapes.setdefault(folder.name, set()).add(tuple(p.shape)) or real(folder, id, p)
            ),
        )
        start("--out", folder)
    return folder, shapes


def test_two_students_that_differ(whole):
    folder, shapes = whole
    state = last(folder)
    result = strict((folder / "result.json").read_text())
    networks = {name: spec["network"] for name, spec in state["networks"].items()}
    expected = {"student_1": "deeplabv2", "student_2": "setr"}
    assert networks == expected | {"teacher_1": "deeplabv2", "teacher_2": "setr"}
    assert result["network"] == "deeplabv2,setr"
    assert result["backbone"] == "tiny"
    assert set(result["miou"]) == set(networks)
    # p^0 is at stride 4, though SETR's features are at 2.
    assert shapes == {"stage_1_model_1": {(10, 16, 32)}, "stage_1_model_2": {(10, 16, 32)}}
    eta_1, eta_2 = state["prototypes"].values()
    for eta in (eta_1, eta_2):
        assert eta.shape == (10, 32)
        assert eta.isfinite().any()
    assert not torch.allclose(eta_1, eta_2)  # of two feature spaces
    labeled = {f"loss_labeled_{j}" for j in (1, 2)}
    assert terms(folder) == labeled | {f"loss_pseudo_{j}_from_{i}" for j in (1, 2) for i in (1, 2)}
    assert all(math.isfinite(value) and value > 0 for value in losses(folder).values())
    for name, network in state["networks"].items():
        assert common.make_network(network).load_state_dict(state["models"][name])


def test_setr_learns_at_another_rate(whole):
    folder, _ = whole
    state = last(folder)
    row = rml.PAPER["streets"]
    rates = []
    for name in ("optimizer_1", "optimizer_2"):
        rates.append([group["lr"] for group in state[name]["param_groups"]])
    assert row["setr_lr"] != 1
    assert rates[0] == pytest.approx([row["lr"] * (1 - 2 / 3) ** 0.9] * 2)
    assert rates[1] == pytest.approx([row["setr_lr"] * rate for rate in rates[0]])
    assert all(("lr_2" in record) == ("lr" in record) for record in records(folder))
    assert records(folder)[-2]["lr_2"] == rates[1][0]


def test_the_pictures_of_two_that_differ(whole):
    for name in ("pseudo_stage_1_000003", "strong_stage_1_000003", "val_stage_1_000003"):
        assert min(Image.open(whole[0] / f"pictures/{name}.png").size) > 100


def test_stage_0_of_setr_learns_at_another_rate(main):
    rates = "--setr-lr .25 --stage0-lr .004 --stage0-head-lr 3"
    main("--out", "run", *rates.split(), "--stage0-iterations", "1", "--stages", "0")
    state = last(Path("run"))
    groups = [state[f"optimizer_{number}"]["param_groups"] for number in (1, 2)]
    assert [group["lr"] for group in groups[0]] == pytest.approx([0.004, 0.012])
    assert [group["lr"] for group in groups[1]] == pytest.approx([0.001, 0.003])


@pytest.mark.parametrize(
    "name, number", [("save", 2), ("save", 3), ("step", 2), ("step", 4), ("evaluate", 1)]
)
def test_killed_and_resumed_ends_with_the_same_bits(whole, kill, main, name, number):
    """In stage 0, at its end, and in stage 1 before and after its first checkpoint."""
    calls = []
    kill(common.Run, name, lambda *_, **__: calls.append(1) or len(calls) == number)
    main("--out", "run")
    assert same_checkpoint(Path("run"), whole[0], [*KEYS, "step", "stage", "iteration"])
    assert untimed(Path("run")) == untimed(whole[0])
    assert result_of(Path("run")) == result_of(whole[0])


def test_two_processes_give_one_processs_losses(tmp_path, main):
    flags = [
        "--optimizer",
        "sgd",
        "--lr",
        ".005",
        "--stage0-lr",
        ".005",
        "--drop-path",
        "0",
        "--dropout",
        "0",
    ]  # noise is drawn in each process
    processes = two_processes(rml, tmp_path, *SHORT, *flags, "--out", "two")
    main(*flags, "--out", "one")
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


def test_evaluate_and_predict(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(common.Streets().image("train_0")).resize((150, 61)).save(
        "photo.png"
    )  # no multiple of a patch
    run_on_few_streets(rml, "--evaluate", "--checkpoint", whole[0])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")]
    assert [float(x) for x in line.split()[1:]] == [
        round(x, 2) for x in strict((whole[0] / "result.json").read_text())["miou"].values()
    ]
    run_on_few_streets(
        rml, "--predict", "photo.png", "--checkpoint", whole[0], "--out", "predicted"
    )
    assert Image.open("predicted/photo.png").size == (150, 61)


@pytest.mark.parametrize(
    "flags",
    [
        "--network setr --supervised",
        "--network setr --crop 40 56",
        "--network setr-naive,setr",
        "--network setr,deeplabv3plus --no-rectify",
        "--network pspnet,setr --mutual direct",
        "--network deeplabv2,setr-naive --scale .5 1.5",
    ],
)
def test_other_pairs_and_crops(main, flags):
    main("--out", "run", *flags.split())
    assert all(math.isfinite(value) for value in losses(Path("run")).values())
    assert records(Path("run"))[-1]["step"] == 5


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--network setr,deeplabv2,setr", ("--network setr,deeplabv2,setr", "two students")),
        ("--backbone tiny,", ("--backbone", "'tiny,'", "''", "vit_b_16")),
        ("--network deeplabv2,setr --supervised", ("--network deeplabv2,setr", "one student")),
        ("--network segformer", ("--network", "'segformer'", "setr-naive", "pspnet")),
        ("--network deeplabv2,", ("--network", "'deeplabv2,'", "''")),
        (
            "--network deeplabv2,setr --backbone vit_b_16",
            ("--backbone vit_b_16", "deeplabv2", "resnet101"),
        ),
        (
            "--network setr --backbone resnet50",
            ("--backbone resnet50", "setr", "vit_b_16", "vit_l_16"),
        ),
        ("--network setr --backbone tiny --weights imagenet", ("--weights imagenet", "tiny")),
        ("--network deeplabv2 --backbone resnet18", ("--backbone", "'resnet18'", "tiny")),
        ("--setr-lr 0", ("--setr-lr 0", "above 0")),
    ],
)
def test_what_does_not_fit_is_named(error, argv, words):
    text = error("--out", "run", *argv.split())
    assert all(word in text for word in words), text
    assert not Path("run").exists()
