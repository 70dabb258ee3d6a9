"""PASCAL VOC, its 10,582 pictures, Cityscapes' additional pictures and held-out test."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common  # noqa: E402
import rml  # noqa: E402
from test_data import TRAIN_IDS, arguments, make_cityscapes, noise, save  # noqa: E402

CPU = torch.device("cpu")
TRAIN, VAL = (
    ["2007_000032", "2007_000039", "2007_000063", "2008_000008"],
    ["2007_000033", "2007_000042"],
)
EXTRA = [
    "2008_000002",
    "2008_000003",
    "2010_000001",
    "2011_003276",
]  # of the 10,582, and not of the 1464
SIZES = {
    id: (40 + 7 * i, 76 - 5 * i) for i, id in enumerate(TRAIN + VAL + EXTRA)
}  # (H, W), all different, upright ones too


def mask_of(id, shift=0):
    """Values 0..20 and, as along the objects' rims, 255; differs by picture."""
    height, width = SIZES[id]
    label = (
        (np.arange(height)[:, None] // 4 + np.arange(width)[None] // 4 + int(id[-2:]) + shift) % 21
    ).astype(np.uint8)
    label[:3] = 255
    return label


def make_voc(root, augmented=False, lists="train_aug.txt", line="{0}\n"):
    """VOC's layout in the folder root: JPEGs, palette masks.

    augmented: also index masks, whose classes are shifted by one, and their list."""
    for i, id in enumerate(TRAIN + VAL + EXTRA * augmented):
        save(root / "JPEGImages" / f"{id}.jpg", noise(*SIZES[id], i))
        if id not in EXTRA:
            save(root / "SegmentationClass" / f"{id}.png", mask_of(id), "P")
        if augmented:
            save(root / "SegmentationClassAug" / f"{id}.png", mask_of(id, 1))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{id}\n" for id in TRAIN))
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"{id}\n" for id in VAL))
    if augmented:
        (root / "ImageSets/Segmentation" / lists).write_text(
            "".join(line.format(id) for id in sorted(TRAIN + EXTRA))
        )
    return root


def voc_arguments(root, **changes):
    return arguments(
        **dict(
            dataset="voc",
            data_root=str(root),
            labels="2",
            crop=(64, 64),
            scales=[1.0],
            flip=False,
            base_size=0,
            precision="fp32",
            full_size_labels=False,
        )
        | changes
    )


def opened(root, **changes):
    return common.open_dataset(voc_arguments(root, **changes))


def refused(root, **changes):
    with pytest.raises(common.UserError) as caught:
        args = voc_arguments(root, **changes)
        common.split(args, common.open_dataset(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- voc -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["VOCdevkit/VOC2012", ""])
def test_voc_under_its_root_or_as_the_folder_itself(tmp_path, inner):
    make_voc(tmp_path / inner)
    data = opened(tmp_path)
    assert data.train == TRAIN and data.val == VAL and data.official == [] and data.size is None
    for id in TRAIN + VAL:
        np.testing.assert_array_equal(data.label(id), mask_of(id))
        assert data.image(id).shape == (*SIZES[id], 3)
    assert {20, 255} <= set(np.unique(data.label(TRAIN[0])))


def test_voc_has_its_classes_in_its_colors(tmp_path):
    """The color of class k is made of its bits, spread from the top (VOC's development kit)."""
    assert (
        list(common.VOC)
        == (
            "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
            "horse motorbike person pottedplant sheep sofa train tvmonitor"
        ).split()
    )
    for k, color in enumerate(common.VOC.values()):
        assert color == tuple(
            sum((k >> (3 * j + channel) & 1) << (7 - j) for j in range(3)) for channel in range(3)
        )


def test_an_incomplete_voc_is_warned_of(tmp_path, capsys):
    opened(make_voc(tmp_path))
    warnings = capsys.readouterr().err.splitlines()
    assert any("4 pictures" in line and "1464" in line for line in warnings) and any(
        "2 pictures" in line and "1449" in line for line in warnings
    )


def test_a_missing_voc_says_what_to_get(tmp_path):
    for root in (None, tmp_path, tmp_path / "nowhere"):
        for dataset in ("voc", "vocaug"):
            message = refused(root, dataset=dataset)
            assert all(
                word in message
                for word in (
                    "--download",
                    "VOCtrainval_11-May-2012.tar",
                    "robots.ox.ac.uk",
                    "JPEGImages",
                    "--data-root",
                )
            )
    make_voc(tmp_path / "VOCdevkit/VOC2012")
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass").rename(tmp_path / "elsewhere")
    assert "SegmentationClass" in refused(tmp_path)


def test_a_voc_list_that_does_not_fit_is_named(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages/2008_000008.jpg").unlink()
    assert "train.txt" in refused(tmp_path) and "2008_000008" in refused(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n")
    assert "train.txt" in refused(tmp_path) and "no picture in it" in refused(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000042\n")
    assert "2007_000042" in refused(tmp_path) and "val.txt" in refused(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").unlink()
    assert "train.txt" in refused(tmp_path)


def test_a_voc_mask_that_is_missing_or_wrong_is_named(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "SegmentationClass/2007_000042.png").unlink()
    assert "2007_000042.jpg" in refused(tmp_path) and "mask" in refused(tmp_path)
    save(
        tmp_path / "SegmentationClass/2007_000042.png", np.full(SIZES["2007_000042"], 21, np.uint8)
    )
    assert "[21]" in refused(tmp_path) and "0-20, 255" in refused(tmp_path)


class FakeDownload:
    """In place of torchvision's dataset: makes the tree, or fails as torchvision does."""

    calls, error = [], None

    def __init__(self, root, year, image_set, download):
        FakeDownload.calls.append((str(root), year, image_set, download))
        if FakeDownload.error:
            raise FakeDownload.error
        make_voc(Path(root) / "VOCdevkit/VOC2012")


def test_download_happens_once_and_by_the_main_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common.torchvision.datasets, "VOCSegmentation", FakeDownload)
    monkeypatch.setattr(FakeDownload, "calls", [])
    assert "--download" in refused(tmp_path) and FakeDownload.calls == []  # not without being asked
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert "VOC2012" in refused(tmp_path, download=True) and FakeDownload.calls == []
    monkeypatch.setattr(common, "rank", lambda: 0)
    for _ in range(2):
        assert opened(tmp_path, download=True).train == TRAIN
    assert opened(tmp_path / "VOCdevkit/VOC2012", download=True).train == TRAIN
    assert FakeDownload.calls == [(str(tmp_path), "2012", "train", True)]


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")]
)
def test_a_download_that_fails_says_how_to_do_it_by_hand(tmp_path, monkeypatch, error):
    monkeypatch.setattr(common.torchvision.datasets, "VOCSegmentation", FakeDownload)
    monkeypatch.setattr(FakeDownload, "error", error)
    message = refused(tmp_path, download=True)
    assert (
        str(error) in message
        and "--download" in message
        and "VOCtrainval_11-May-2012.tar" in message
    )


def test_flags_of_another_dataset_are_refused():
    for dataset in ("vocaug", "streets"):
        assert "--extra 3" in refused(None, dataset=dataset, extra="3") and "cityscapes" in refused(
            None, dataset=dataset, extra="3"
        )
    assert "--download" in refused(None, dataset="camvid", download=True)


# ---- vocaug --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lists, line",
    [
        ("train_aug.txt", "{0}\n"),
        ("trainaug.txt", "{0}\n"),
        ("trainaug.txt", "{0}\r\n"),
        ("train_aug.txt", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"),
        ("train_aug.txt", "JPEGImages/{0}.jpg\tSegmentationClassAug/{0}.png \n"),
    ],
)
def test_vocaug_and_the_forms_of_its_list(tmp_path, lists, line):
    make_voc(tmp_path / "VOCdevkit/VOC2012", True, lists, line)
    data = opened(tmp_path, dataset="vocaug")
    assert data.train == sorted(TRAIN + EXTRA) and data.val == VAL and data.official == TRAIN
    for id in data.train:
        np.testing.assert_array_equal(data.label(id), mask_of(id, 1))  # of SegmentationClassAug
    for id in VAL:
        np.testing.assert_array_equal(data.label(id), mask_of(id))  # of SegmentationClass


def test_vocaug_takes_val_masks_where_they_are(tmp_path):
    make_voc(tmp_path, True)
    (tmp_path / "SegmentationClass/2007_000042.png").unlink()
    data = opened(tmp_path, dataset="vocaug")
    np.testing.assert_array_equal(data.label("2007_000042"), mask_of("2007_000042", 1))
    np.testing.assert_array_equal(data.label("2007_000033"), mask_of("2007_000033"))
    for path in (tmp_path / "SegmentationClass").iterdir():
        path.unlink()
    (tmp_path / "SegmentationClass").rmdir()
    np.testing.assert_array_equal(
        opened(tmp_path, dataset="vocaug").label("2007_000033"), mask_of("2007_000033", 1)
    )


@pytest.mark.parametrize("lost", ["SegmentationClassAug", "ImageSets/Segmentation/train_aug.txt"])
def test_vocaug_without_its_masks_or_list_says_where_people_get_them(tmp_path, lost):
    (make_voc(tmp_path, True) / lost).rename(tmp_path / "elsewhere")
    message = refused(tmp_path, dataset="vocaug")
    assert lost in message and all(
        word in message
        for word in (
            "SegmentationClassAug.zip",
            "Hariharan",
            "DrSleep/tensorflow-deeplab-resnet",
            "train_aug.txt",
        )
    )


def test_as_many_labels_as_the_official_list_are_the_official_list(tmp_path):
    """DARS: 1464 labeled, the other 9,118 unlabeled; other numbers: the order of the hash."""
    make_voc(tmp_path, True)
    by_hash = {
        seed: sorted(
            TRAIN + EXTRA, key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).hexdigest()
        )
        for seed in range(3)
    }
    for seed in range(3):
        for labels in ("4", "1/2"):
            args = voc_arguments(tmp_path, dataset="vocaug", labels=labels, seed=seed)
            labeled, unlabeled = common.split(args, common.open_dataset(args))
            assert (
                labeled == TRAIN
                and unlabeled == [id for id in by_hash[seed] if id in EXTRA]
                and args.labels == 4
            )
        for n in (2, 3, 5):
            args = voc_arguments(tmp_path, dataset="vocaug", labels=n, seed=seed)
            assert common.split(args, common.open_dataset(args)) == (
                by_hash[seed][:n],
                by_hash[seed][n:],
            )
    assert any(set(by_hash[seed][:4]) != set(TRAIN) for seed in range(3))


# ---- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "{0}\n",
        "{0}\r\n",
        "  {0}  \n",
        "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n",
        "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png \n",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n",
        "/JPEGImages/{0}.jpg\t/SegmentationClassAug/{0}.png\r\n",
        "{0}.jpg\n",
    ],
)
def test_public_lists_of_voc(tmp_path, line):
    make_voc(tmp_path, True)
    for name, ids in (("labeled.txt", TRAIN[:2]), ("unlabeled.txt", EXTRA[1:])):
        (tmp_path / name).write_bytes(
            "".join(line.format(id) for id in ids).encode().rstrip()
        )  # some end without a newline
    args = voc_arguments(
        tmp_path,
        dataset="vocaug",
        split=[str(tmp_path / "labeled.txt"), str(tmp_path / "unlabeled.txt")],
    )
    assert common.split(args, common.open_dataset(args)) == (TRAIN[:2], EXTRA[1:])
    args = voc_arguments(tmp_path, split=[str(tmp_path / "labeled.txt")])
    assert common.split(args, common.open_dataset(args)) == (TRAIN[:2], TRAIN[2:])


@pytest.mark.parametrize(
    "line",
    [
        "/images/train/{1}.png\t/segmentation/train/{1}_gtFine.png\n",
        "leftImg8bit/train/{0}/{1}_leftImg8bit.png\n",
        "leftImg8bit/train/{0}/{1}_leftImg8bit.png "
        "gtFine/train/{0}/{1}_gtFine_labelTrainIds.png \r\n",
        "/leftImg8bit/train/{0}/{1}_leftImg8bit.png\n",
        "{0}/{1}_leftImg8bit.png\n",
        "{1}\n",
    ],
)
def test_public_lists_of_cityscapes(tmp_path, line):
    data = common.open_cityscapes(make_cityscapes(tmp_path), None, tmp_path / "cache")
    (tmp_path / "list.txt").write_bytes(
        "".join(line.format(*id.split("/")) for id in data.train[1:]).encode()
    )
    assert common.read_split([tmp_path / "list.txt"], data) == (data.train[1:], data.train[:1])


def test_a_list_of_vocaug_on_voc_says_which_dataset_it_needs(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "list.txt").write_text("2008_000002\n")
    assert "list.txt:1" in refused(
        tmp_path, split=[str(tmp_path / "list.txt")]
    ) and "vocaug" in refused(tmp_path, split=[str(tmp_path / "list.txt")])


# ---- pictures of differing sizes -----------------------------------------------------------------


def test_a_crop_larger_than_the_picture_is_padded_with_unknown(tmp_path):
    data, padded = opened(make_voc(tmp_path)), 0
    for i, id in enumerate(TRAIN):
        for seed in range(5):
            image, label, valid, _ = common.weak_view(
                data.image(id), data.label(id), common.rng(seed), (64, 80)
            )
            assert image.shape == (3, 64, 80) and label.shape == valid.shape == (64, 80)
            height, width = min(64, SIZES[id][0]), min(80, SIZES[id][1])
            assert int(valid.sum()) == height * width
            assert (label[~valid] == 255).all() and (
                image[:, ~valid] == torch.tensor(common.MEAN_COLOR)[:, None]
            ).all()
            assert (label[valid] != 255).float().mean() > 0.9  # only the rim
            padded += int((~valid).any())
    assert padded == 20


def test_batches_of_differing_sizes(tmp_path):
    args = voc_arguments(make_voc(tmp_path, True), dataset="vocaug", scale=(0.5, 2.0))
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    for stream in (
        common.Stream(data, labeled, "labeled", args),
        common.Stream(data, unlabeled, "unlabeled", args, labeled=False),
    ):
        for batch in common.batches(stream, args, CPU, 0, 4):
            assert batch["image"].shape == (4, 3, 64, 64) and batch["valid"].shape == (4, 64, 64)


def test_evaluation_takes_each_picture_at_its_own_size(tmp_path):
    args = voc_arguments(make_voc(tmp_path))
    data = common.open_dataset(args)

    class Constant(torch.nn.Module):
        stride, align_corners = 8, True

        def forward(self, x):
            return (
                torch.nn.functional.one_hot(
                    torch.full((1, x.shape[2] // 8, x.shape[3] // 8), 3), 21
                )
                .permute(0, 3, 1, 2)
                .float()
            )

    table = common.evaluate({"n": Constant()}, data, args, CPU)["n"]
    expected = sum(np.bincount(mask_of(id)[mask_of(id) != 255], minlength=21) for id in VAL)
    np.testing.assert_array_equal(table[:, 3], expected)
    assert int(table.sum()) == expected.sum()


def test_a_panel_holds_pictures_of_differing_sizes():
    colors = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    images = [torch.full((3, h, w), h // 2, dtype=torch.uint8) for h, w in ((300, 250), (250, 400))]
    panel = np.asarray(common.draw_panel({"left": images, "right": images}, ["a", "b"], colors))
    for value, count in (
        (150, 2 * 300 * 250),
        (125, 2 * 250 * 400),
    ):  # each whole, none over another
        assert (panel == value).all(2).sum() >= count


# ---- the scripts ---------------------------------------------------------------------------------


def run_rml(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["rml.py", *map(str, argv)])
    rml.main()


SHORT = [
    "--stage0-iterations",
    1,
    "--iterations",
    1,
    "--stages",
    1,
    "--labels",
    2,
    "--batch-size",
    2,
    "--workers",
    0,
]


def test_a_method_without_numbers_for_a_dataset_names_those_it_has(monkeypatch):
    with pytest.raises(
        common.UserError,
        match="this paper has no numbers for context; choose among camvid, cityscapes, folder, "
        "streets, voc, vocaug$",
    ):
        run_rml(monkeypatch, "--dataset", "context")


def test_a_run_on_pictures_of_differing_sizes(tmp_path, monkeypatch, capsys):
    """From training to evaluation and prediction; the crop is larger than many pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rml.PAPER, "vocaug", rml.PAPER["streets"] | dict(size=None, crop=(64, 64)))
    common_part = ["--dataset", "vocaug", "--data-root", make_voc(tmp_path / "voc", True)]
    run_rml(monkeypatch, *common_part, *SHORT, "--out", "run")
    result = json.loads(Path("run/result.json").read_text())
    assert (
        len(result["per_class"]) == 21
        and not list(Path("runs").rglob("cache/*"))
        and len(list(Path("run/pictures").iterdir())) > 2
    )
    capsys.readouterr()
    run_rml(monkeypatch, *common_part, "--evaluate", "--checkpoint", "run")
    assert f"{result['miou']['teacher_1']:.2f}" in capsys.readouterr().out
    run_rml(monkeypatch, "--predict", "voc/JPEGImages", "--checkpoint", "run")
    for id in TRAIN:
        assert Image.open(f"predictions/{id}.png").size == SIZES[id][::-1]


# ---- cityscapes: additional pictures -------------------------------------------------------------

ADDITIONAL = [
    f"{city}/{city}_{i:06d}_{7 * i:06d}" for city in ("augsburg", "wurzburg") for i in range(4)
]


@pytest.fixture
def cityscapes(tmp_path):
    root = make_cityscapes(tmp_path / "cityscapes")
    for i, id in enumerate(ADDITIONAL):
        save(root / "leftImg8bit/train_extra" / f"{id}_leftImg8bit.png", noise(20, 40, 50 + i))
    return root


def city_arguments(root, **changes):
    return voc_arguments(root, **dict(dataset="cityscapes", labels="1", crop=(16, 16)) | changes)


@pytest.mark.parametrize("extra, seed", [("3", 0), ("3", 1), ("8", 0), ("all", 2), (None, 0)])
def test_extra_pictures_are_unlabeled_ones(cityscapes, extra, seed):
    args = city_arguments(cityscapes, extra=extra, seed=seed)
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    order = sorted(ADDITIONAL, key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).hexdigest())
    chosen = [] if extra is None else order[: 8 if extra == "all" else int(extra)]
    assert len(data.train) == 3 and sorted(labeled + unlabeled) == sorted(data.train + chosen)
    assert unlabeled[2:] == chosen and args.labels == 1
    for id in chosen:
        assert data.files[id][1] is None and data.image(id).shape == (20, 40, 3)
        assert data.label(id).shape == (20, 40) and (data.label(id) == 255).all()
    batches = list(
        common.batches(
            common.Stream(data, chosen or unlabeled, "unlabeled", args, labeled=False),
            args,
            CPU,
            0,
            2,
        )
    )
    assert chosen == [] or all((batch["truth"] == 255).all() for batch in batches)


def test_the_split_seed_chooses_the_extra_pictures_too(cityscapes):
    assert (
        opened(cityscapes, dataset="cityscapes", extra="3", split_seed=5, seed=1).extra
        == opened(cityscapes, dataset="cityscapes", extra="3", seed=5).extra
    )


def test_with_extra_pictures_all_training_pictures_may_be_labeled(cityscapes, tmp_path):
    args = city_arguments(cityscapes, labels="3", extra="5")
    labeled, unlabeled = common.split(args, common.open_dataset(args))
    assert (
        len(labeled) == 3 and unlabeled == common.open_dataset(args).extra and len(unlabeled) == 5
    )
    assert "--extra" in refused(cityscapes, dataset="cityscapes", labels="3", crop=(16, 16))
    (tmp_path / "list.txt").write_text("jena_000078_000019\n")
    args = city_arguments(cityscapes, split=[str(tmp_path / "list.txt")], extra="2")
    assert common.split(args, common.open_dataset(args))[1] == [
        "aachen/aachen_000010_000019",
        "jena/jena_000002_000019",
        *unlabeled[:2],
    ]


def test_an_extra_picture_that_a_list_names_as_labeled_is_not_unlabeled_too(cityscapes, tmp_path):
    args = city_arguments(cityscapes, extra="all")
    data = common.open_dataset(args)
    (tmp_path / "list.txt").write_text("\n".join([data.train[0], data.extra[2]]) + "\n")
    args.split = [str(tmp_path / "list.txt")]
    labeled, unlabeled = common.split(args, data, read=False)
    assert labeled == [data.train[0], data.extra[2]] and len(set(unlabeled)) == len(unlabeled)
    assert set(unlabeled) == set(data.train + data.extra) - set(labeled)


def test_an_extra_pictures_label_at_the_training_size(cityscapes, tmp_path):
    data = opened(
        cityscapes, dataset="cityscapes", extra="1", size=(10, 20), cache=str(tmp_path / "cache")
    )
    assert data.image(data.extra[0]).shape == (10, 20, 3) and data.label(data.extra[0]).shape == (
        10,
        20,
    )


@pytest.mark.parametrize("extra", ["9", "0", "-1", "many", "1/2", "2.0", ""])
def test_a_number_of_extra_pictures_that_cannot_be(cityscapes, extra):
    message = refused(cityscapes, dataset="cityscapes", extra=extra)
    assert f"--extra {extra}:" in message and "1 to 8" in message and "all" in message


def test_missing_extra_pictures_say_what_to_get(tmp_path):
    message = refused(make_cityscapes(tmp_path), dataset="cityscapes", extra="all")
    assert "leftImg8bit/train_extra" in message and "leftImg8bit_trainextra.zip" in message


def test_the_picture_that_is_corrupt_in_the_archive_is_named_before_the_training(cityscapes):
    path = cityscapes / "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG\r\n")
    assert str(path) in refused(
        cityscapes, dataset="cityscapes", extra="all", labels="1", crop=(16, 16)
    )


def test_a_run_with_extra_pictures_where_all_others_are_labeled(cityscapes, tmp_path, monkeypatch):
    """No pixel has a truth for the log then: its record says null, since JSON has no NaN."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        rml.PAPER, "cityscapes", rml.PAPER["streets"] | dict(size=(20, 40), crop=(16, 32))
    )
    run_rml(
        monkeypatch,
        "--dataset",
        "cityscapes",
        "--data-root",
        cityscapes,
        *SHORT,
        "--labels",
        3,
        "--extra",
        5,
        "--out",
        "run",
    )
    assert len(json.loads(Path("run/args.json").read_text())["unlabeled"]) == 5
    records = [
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
        for line in Path("run/log.jsonl").read_text().splitlines()
    ]
    assert any(record.get("pseudo_miou_1", 0) is None for record in records)


# ---- cityscapes: the held-out test ---------------------------------------------------------------


@pytest.fixture
def trained(cityscapes, tmp_path, monkeypatch):
    """predict(folder, ..) with a checkpoint that was trained on Cityscapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        rml.PAPER, "cityscapes", rml.PAPER["streets"] | dict(size=(20, 40), crop=(16, 32))
    )
    run_rml(
        monkeypatch,
        "--dataset",
        "cityscapes",
        "--data-root",
        cityscapes,
        "--supervised",
        *SHORT,
        "--out",
        "run",
    )
    return lambda *argv: run_rml(monkeypatch, "--checkpoint", "run", "--predict", *argv)


def test_pictures_of_the_held_out_test_get_label_ids_under_the_servers_names(
    trained, tmp_path, capsys
):
    test = tmp_path / "leftImg8bit/test"
    names = ["berlin_000000_000019", "bonn_000000_000019", "bonn_000001_000019"]
    for i, name in enumerate(names):
        save(test / name.split("_")[0] / f"{name}_leftImg8bit.png", noise(50, 100, i))
    save(test / "photo.jpg", noise(50, 100))
    capsys.readouterr()
    trained(test, "--out", "out")
    out = tmp_path / "out"
    for name in names:
        (only,) = out.glob(f"{name}*.png")  # the server looks for this, and refuses two
        assert (
            only.name == f"{name}_labelIds.png"
            and (out / f"{name}_leftImg8bit_overlay.jpg").exists()
        )
        picture = Image.open(only)
        values, palette = (
            np.unique(np.asarray(picture)),
            np.array(picture.getpalette()).reshape(-1, 3),
        )
        assert (
            picture.mode == "P"
            and picture.size == (100, 50)
            and set(values.tolist()) <= set(TRAIN_IDS)
        )
        for value in values:
            assert tuple(palette[value]) == list(common.CITYSCAPES.values())[TRAIN_IDS[value]]
    assert (
        np.asarray(Image.open(out / "photo.png")).max() < 19
        and (out / "photo_overlay.png").exists()
    )
    output = capsys.readouterr().out
    assert (
        "4 of 4" in output and "0 road" in output and "7 road" in output and "33 bicycle" in output
    )

    trained(test / "bonn", "--out", "city")  # the same, whatever else is predicted
    assert (tmp_path / "city/bonn_000001_000019_labelIds.png").read_bytes() == (
        out / "bonn_000001_000019_labelIds.png"
    ).read_bytes()
    assert "0 road" not in capsys.readouterr().out
    trained(test / "bonn/bonn_000001_000019_leftImg8bit.png", "--out", "one")
    assert [path.name for path in sorted((tmp_path / "one").iterdir())] == [
        "bonn_000001_000019_labelIds.png",
        *(
            f"bonn_000001_000019_leftImg8bit_{kind}.jpg"
            for kind in ("color", "confidence", "overlay")
        ),
        "overview.jpg",
    ]


def test_label_ids_are_the_train_ids_of_the_same_prediction(trained, tmp_path):
    save(tmp_path / "a/berlin_000000_000019_leftImg8bit.png", noise(50, 100))
    save(tmp_path / "a/other.png", noise(50, 100))
    trained(tmp_path / "a", "--out", "out")
    ids, train_ids = (
        np.asarray(Image.open(tmp_path / "out" / name))
        for name in ("berlin_000000_000019_labelIds.png", "other.png")
    )
    np.testing.assert_array_equal(np.vectorize(TRAIN_IDS.get)(ids), train_ids)


def test_another_datasets_checkpoint_keeps_its_class_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_rml(monkeypatch, "--supervised", *SHORT, "--out", "run")
    save(tmp_path / "a/berlin_000000_000019_leftImg8bit.png", noise(50, 100))
    run_rml(monkeypatch, "--checkpoint", "run", "--predict", "a", "--out", "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"berlin_000000_000019_leftImg8bit{kind}.png"
        for kind in ("", "_color", "_overlay", "_confidence")
    } | {"overview.jpg"}


def test_predictions_never_meet_pictures_or_each_other(trained, tmp_path):
    for i, name in enumerate(["a/x.png", "b/x.png", "b/x.jpg", "b/y.png"]):
        save(tmp_path / "in" / name, noise(20, 40, i))
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.*")}
    for out in ("in", "in/a", "in/new"):
        with pytest.raises(common.UserError, match=f"--out {out}:"):
            trained("in", "--out", out)
    with pytest.raises(common.UserError, match="--out in/b:"):
        trained("in/b/y.png", "--out", "in/b")
    trained("in", "--out", "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}{end}.png"
        for name in ("a_x.png", "b_x.png", "b_x.jpg", "y")
        for end in ("", "_color", "_overlay", "_confidence")
    } | {"overview.jpg"}
    assert before == {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.*")}
    save(tmp_path / "in/b/y_overlay.png", noise(20, 40))
    with pytest.raises(common.UserError, match="out2/y_overlay.png"):
        trained("in", "--out", "out2")
    assert not (tmp_path / "out2").exists()


def test_a_picture_that_is_read_twice_counts_once(cityscapes):
    """The first picture without a mask is read in any case, and may be among the first ones too."""
    data = common.open_dataset(city_arguments(cityscapes))
    id = data.train[0]
    data.files[id] = (data.files[id][0], None)
    with pytest.raises(common.UserError, match=r"mask is missing.*\(1 in all"):
        common.check_before_training(data, [id], data.train[1:])


VOC_FOLDERS = ["JPEGImages", "ImageSets/Segmentation", "SegmentationClass"]


@pytest.mark.parametrize("missing", [*VOC_FOLDERS, None])
def test_voc_is_fetched_if_one_of_its_folders_is_missing(missing, tmp_path, monkeypatch):
    for folder in VOC_FOLDERS:
        if folder != missing:
            (tmp_path / "VOCdevkit/VOC2012" / folder).mkdir(parents=True)
    calls = []
    monkeypatch.setattr(
        common.torchvision.datasets, "VOCSegmentation", lambda *names, **_: calls.append(names)
    )
    common.download_voc(tmp_path)
    assert len(calls) == (missing is not None)
