"""PASCAL-Context: its layouts, its two kinds of masks, and its errors. The trees are made here."""

from pathlib import Path

import numpy as np
import pytest

import common
import guidedmix
from helpers import strict
from test_data import noise, save
from test_voc import refused as voc_refused, voc_arguments

TRAIN, VAL = ["2008_000002", "2008_000003", "2010_000001"], ["2008_000007", "2009_000012"]
SIZES = {id: (50 + 6 * i, 90 - 8 * i) for i, id in enumerate(TRAIN + VAL)}  # (H, W)


def mask_of(id, classes=60):
    """Every class; of 60, 0 is background, of 59 that is 255 and the others begin at 0."""
    height, width = SIZES[id]
    label = (
        (np.arange(height)[:, None] // 5 * 7 + np.arange(width)[None] // 5 + int(id[-2:])) % 60
    ).astype(np.uint8)
    return label if classes == 60 else (label - 1).astype(np.uint8)  # 0 - 1 is 255


def make_context(root, classes=60, mode=None):
    for i, id in enumerate(TRAIN + VAL):
        save(root / "JPEGImages" / f"{id}.jpg", noise(*SIZES[id], i))
        save(root / "SegmentationClassContext" / f"{id}.png", mask_of(id, classes), mode)
    lists = root / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (lists / "val.txt").write_text("\n".join(VAL))
    return root


def context_arguments(root, **changes):
    return voc_arguments(root, dataset="context", crop=(33, 33), **changes)


def opened(root, **changes):
    return common.open_dataset(context_arguments(root, **changes))


def refused(root, **changes):
    return voc_refused(root, dataset="context", **changes)


@pytest.mark.parametrize("inner", ["VOC2010", "VOCdevkit/VOC2010", ""])
@pytest.mark.parametrize("mode", [None, "P"])
def test_60_classes_in_every_layout(tmp_path, inner, mode, capsys):
    make_context(tmp_path / inner, mode=mode)
    data = opened(tmp_path)
    assert (
        data.train == TRAIN
        and data.val == VAL
        and data.names[:3] == ["background", "aeroplane", "bag"]
        and data.names[-1] == "wood"
        and len(set(data.names)) == 60
    )
    for id in TRAIN + VAL:
        np.testing.assert_array_equal(data.label(id), mask_of(id))
        assert data.image(id).shape == (*SIZES[id], 3)
    assert set(np.unique(data.label(TRAIN[0]))) == set(range(60))
    warnings = capsys.readouterr().err
    assert (
        "3 pictures, the whole dataset has 4998 or 4996" in warnings
        and "2 pictures, the whole dataset has 5105 or 5104" in warnings
        and "59 classes" not in warnings
    )


def test_59_classes_where_background_is_unknown(tmp_path, capsys):
    make_context(tmp_path / "VOC2010", 59)
    data = opened(tmp_path)
    assert (
        len(data.names) == 59
        and data.names[0] == "aeroplane"
        and data.names[-1] == "wood"
        and "59 classes, background is unknown" in capsys.readouterr().err
    )
    for id in TRAIN + VAL:
        np.testing.assert_array_equal(
            data.label(id), np.where(mask_of(id) == 0, 255, mask_of(id) - 1.0)
        )
    assert data.classes == {
        name: color
        for name, color in opened(make_context(tmp_path / "other")).classes.items()
        if name != "background"
    }  # the same colors


def test_classes_have_vocs_colors_and_all_differ():
    assert (
        list(common.CONTEXT.values())[:21] == list(common.VOC.values())
        and len(set(common.CONTEXT.values())) == 60
    )


def test_masks_of_both_kinds_together_are_refused(tmp_path):
    make_context(tmp_path)
    save(tmp_path / f"SegmentationClassContext/{TRAIN[1]}.png", mask_of(TRAIN[1], 59))
    message = refused(tmp_path, labels="3", supervised=True)
    assert f"{TRAIN[1]}.png" in message and "[255]" in message and "0-59" in message


def test_a_whole_dataset_is_not_warned_of(tmp_path, capsys, monkeypatch):
    make_context(tmp_path)
    for part, ids in (("train", TRAIN), ("val", VAL)):
        lists, masks, _ = common.LISTED["context"][part]
        monkeypatch.setitem(common.LISTED["context"], part, (lists, masks, [9, len(ids)]))
    assert opened(tmp_path).train == TRAIN
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["trainval", "VOC2010/SegmentationClassContext"])
def test_masks_of_459_classes_say_how_to_convert_them(tmp_path, place):
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (tmp_path / "VOC2010" / folder).mkdir(parents=True)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "2008_000002.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    message = refused(tmp_path)
    assert str(tmp_path / "VOC2010/SegmentationClassContext") in message
    for word in ("459 classes", "0..59", "pascal_context.py", "trainval_merged.json"):
        assert word in message


def test_a_missing_context_says_what_to_get(tmp_path):
    for root in (None, tmp_path, tmp_path / "nowhere"):
        message = refused(root)
        assert all(
            word in message
            for word in (
                "--data-root",
                "SegmentationClassContext",
                "VOCtrainval_03-May-2010.tar",
                "ImageSets/SegmentationContext",
            )
        )


def test_what_does_not_fit_is_named(tmp_path):
    make_context(tmp_path)
    lists = tmp_path / "ImageSets/SegmentationContext"
    (lists / "train.txt").write_text("\n".join(TRAIN + VAL[:1]))
    assert VAL[0] in refused(tmp_path) and "training on val" in refused(tmp_path)
    (lists / "train.txt").write_text("2008_000002\n2007_123456\n")
    assert "train.txt" in refused(tmp_path) and "2007_123456" in refused(tmp_path)
    (lists / "train.txt").write_text("\n".join(TRAIN))
    (tmp_path / f"SegmentationClassContext/{VAL[1]}.png").unlink()
    assert f"{VAL[1]}.jpg" in refused(tmp_path) and "mask is missing" in refused(tmp_path)


def test_the_classifier_learns_no_background(tmp_path, monkeypatch):
    """A run on each kind of masks: the classifier has 59 outputs for 60 and for 59 classes."""
    monkeypatch.chdir(tmp_path)
    for classes in (60, 59):
        make_context(tmp_path / str(classes), classes)
        monkeypatch.setattr(
            "sys.argv",
            [
                "guidedmix.py",
                "--dataset",
                "context",
                "--data-root",
                str(tmp_path / str(classes)),
                "--labels",
                "2",
                "--crop",
                "33",
                "33",
                "--batch-size",
                "2",
                "--backbone",
                "tiny",
                "--weights",
                "none",
                "--batch-norm",
                "frozen",
                "--iterations",
                "2",
                "--warmup",
                "0",
                "--workers",
                "0",
                "--log-every",
                "1",
                "--out",
                f"run{classes}",
            ],
        )
        guidedmix.main()
        log = [strict(line) for line in Path(f"run{classes}/log.jsonl").read_text().splitlines()]
        assert all(
            0 < r[name] < 100
            for r in log[:2]
            for name in ("loss_labeled", "loss_cla", "loss_dec", "loss_usup")
        )
        models = common.load_torch(f"run{classes}/last.pt")["models"]["student"]
        assert len(models["presence.weight"]) == 59 and len(models["last.weight"]) == classes
