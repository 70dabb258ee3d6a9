"""Datasets, splits, weak views and streams.

Alignment is checked by content: the pictures hold their coordinates."""

import hashlib
import math
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

CPU = torch.device("cpu")


def arguments(**changes):
    values = dict(
        dataset="streets",
        labels="4",
        split=None,
        split_seed=None,
        seed=0,
        supervised=False,
        size=None,
        crop=(32, 32),
        scale=(1.0, 1.0),
        batch_size=4,
        workers=0,
        cache="cache",
        data_root=None,
        extra=None,
        download=False,
    )
    return SimpleNamespace(**values | changes)


def save(path, array, mode=None, **options):
    """Write an array as a picture; mode "P" gives it a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode == "P":
        picture = picture.convert("P")
        picture.putdata(array.flatten().tolist())
        picture.putpalette([37 * i % 256 for i in range(3 * 256)])
    picture.save(path, **options)
    return str(path)


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def blocks(height, width, classes=5):
    """A label of 8x8 blocks; neighbors in a row or a column have different classes."""
    rows, columns = np.mgrid[:height, :width]
    return ((rows // 8 * 3 + columns // 8) % classes).astype(np.uint8)


class Coordinates(common.Dataset):
    """Pictures of 48x56: channels are 4 x row, 4 x column, 100 + number; labels are blocks."""

    def __init__(self, count=20):
        ids = [f"picture_{i:02d}" for i in range(count)]
        super().__init__(
            "coordinates",
            {f"class {k}": (k, k, k) for k in range(5)},
            ids,
            ids[:3],
            {id: (id, id) for id in ids},
            {k: k for k in range(5)},
        )

    def image(self, id):
        rows, columns = np.mgrid[:48, :56]
        return np.stack([4 * rows, 4 * columns, np.full_like(rows, 100 + int(id[-2:]))], 2).astype(
            np.uint8
        )

    def label(self, id, full_size=False):
        return blocks(48, 56)


def coordinate_map(number=0):
    """(3, 6, 7): the map at stride 8 of a Coordinates picture.

    It holds the row and the column of each cell's pixel, and 100 + number."""
    rows, columns = np.mgrid[:6, :7] * 8.0
    return torch.from_numpy(np.stack([rows, columns, np.full_like(rows, 100 + number)])).float()


# ---- seeds ---------------------------------------------------------------------------------------


def test_rng_is_the_same_on_every_machine_and_differs_by_every_key():
    assert common.rng("streets", "train_0000").randint(1 << 30, size=3).tolist() == [
        104889029,
        518783434,
        30712623,
    ]
    draws = {
        keys: tuple(common.rng(*keys).randint(1 << 30, size=4))
        for keys in [
            (0,),
            (1,),
            (0, "labeled"),
            (0, "unlabeled"),
            ("labeled", 0),
            (0, "labeled", 0),
            (0, "labeled", 1),
            (1, "labeled", 0),
        ]
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(common.rng(0, "labeled").randint(1 << 30, size=4)) == draws[0, "labeled"]


def test_rng_leaves_the_global_generators_alone():
    np.random.seed(3)
    expected = np.random.RandomState(3).uniform(size=2)
    np.testing.assert_array_equal(
        [np.random.uniform(), (common.rng(5).uniform(), np.random.uniform())[1]], expected
    )


# ---- streets -------------------------------------------------------------------------------------


def test_streets_is_a_function_of_the_id():
    first = [
        (image.copy(), label.copy())
        for image, label in map(common.draw_street, ("train_0000", "val_0003"))
    ]
    common.draw_street.cache_clear()
    np.random.seed(1)  # nothing global takes part
    again = [common.draw_street(id) for id in ("val_0003", "train_0000")][
        ::-1
    ]  # nor does the order
    for (image, label), (image_again, label_again) in zip(first, again):
        np.testing.assert_array_equal(image, image_again)
        np.testing.assert_array_equal(label, label_again)


def test_streets_has_ten_classes_with_a_long_tail():
    data = common.Streets()
    assert len(data.train) == 256 and len(data.names) == 10
    counts = sum(np.bincount(data.label(id).ravel(), minlength=256) for id in data.train)
    assert counts[10:].sum() == 0
    assert counts[:10].min() > 0
    assert counts[:10].max() >= 50 * counts[:10].min()
    assert (
        data.image("train_0000").shape == (64, 128, 3)
        and data.image("train_0000").dtype == np.uint8
    )


def test_streets_scenes_all_differ_between_and_within_train_and_val():
    data = common.Streets()
    assert not set(data.train) & set(data.val)
    assert len({data.image(id).tobytes() for id in data.train + data.val}) == len(data.train) + len(
        data.val
    )
    assert len({data.label(id).tobytes() for id in data.train + data.val}) == len(data.train) + len(
        data.val
    )


def test_streets_takes_no_other_size():
    """Its scenes are drawn at 64x128: another --size must not be accepted and then ignored."""
    data = common.Streets()
    with pytest.raises(common.UserError, match="256"):
        args = arguments(size=(256, 512), crop=(128, 256))
        common.split(args, common.open_dataset(args))
    assert data.image("train_0000").shape == (64, 128, 3)


# ---- reading -------------------------------------------------------------------------------------


def dataset(image, mask, size=None, cache=None, classes=4, values=None):
    names = {f"class {k}": (k, k, k) for k in range(classes)}
    return common.Dataset(
        "mine",
        names,
        ["a"],
        [],
        {"a": (image, mask)},
        values or {k: k for k in range(classes)} | {255: 255},
        size,
        cache,
    )


def test_png_and_jpeg_pictures_are_read_as_rgb(tmp_path):
    picture = noise(20, 30)
    np.testing.assert_array_equal(
        dataset(save(tmp_path / "a.png", picture), None).image("a"), picture
    )
    smooth = np.asarray(Image.fromarray(noise(3, 3)).resize((30, 20), Image.Resampling.BICUBIC))
    read = dataset(save(tmp_path / "a.jpg", smooth, quality=95, subsampling=0), None).image("a")
    assert read.shape == (20, 30, 3) and abs(read.astype(int) - smooth).mean() < 3
    gray = dataset(save(tmp_path / "gray.png", picture[..., 0]), None).image("a")
    np.testing.assert_array_equal(gray, np.repeat(picture[..., :1], 3, 2))


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_masks_of_every_mode_give_their_indices(tmp_path, mode):
    label = blocks(20, 30, 4)
    label[:3] = 255
    kind = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]
    path = save(tmp_path / ("mask.tif" if mode == "I" else "mask.png"), label.astype(kind), mode)
    with Image.open(path) as picture:
        assert picture.mode in (mode, "I")  # Pillow before 11 opens 16-bit PNGs as I
    read = dataset(save(tmp_path / "a.png", noise(20, 30)), path).label("a")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)


def test_values_are_mapped_and_a_missing_mask_is_all_ignored(tmp_path):
    image = save(tmp_path / "a.png", noise(20, 30))
    mask = save(tmp_path / "mask.png", np.where(blocks(20, 30, 2) == 0, 7, 11).astype(np.uint8))
    read = dataset(image, mask, values={7: 3, 11: 255}).label("a")
    np.testing.assert_array_equal(read, np.where(blocks(20, 30, 2) == 0, 3, 255))
    none = dataset(image, None).label("a")
    assert none.shape == (20, 30) and (none == 255).all()


def test_resize_averages_pictures_and_picks_labels(tmp_path):
    image, label = noise(40, 60), blocks(40, 60, 2) * 3
    data = dataset(
        save(tmp_path / "a.png", image),
        save(tmp_path / "mask.png", label),
        (20, 30),
        tmp_path / "cache",
    )
    small = data.label("a")
    np.testing.assert_array_equal(
        small, label[1::2, 1::2]
    )  # nearest: of two rows the one at 2i + 1, and never a class between
    np.testing.assert_array_equal(data.label("a", full_size=True), label)
    averaged = image.astype(float).reshape(20, 2, 30, 2, 3).mean((1, 3))
    assert data.image("a").shape == (20, 30, 3)
    assert abs(data.image("a") - averaged).mean() < abs(image[1::2, 1::2] - averaged).mean() / 2
    larger = dataset(data.files["a"][0], data.files["a"][1], (80, 120), tmp_path / "cache2")
    np.testing.assert_array_equal(larger.label("a"), label.repeat(2, 0).repeat(2, 1))


def test_big_pictures_are_kept_at_size_and_read_again_equal(tmp_path):
    data = dataset(
        save(tmp_path / "a.png", noise(40, 60)),
        save(tmp_path / "mask.png", blocks(40, 60, 4)),
        (20, 30),
        tmp_path / "cache",
    )
    image, label = data.image("a"), data.label("a")
    kept = sorted((tmp_path / "cache").rglob("*.png"))
    assert len(kept) == 2 and all(Image.open(path).size == (30, 20) for path in kept)
    np.testing.assert_array_equal(data.image("a"), image)
    np.testing.assert_array_equal(data.label("a"), label)
    other = dataset(
        *data.files["a"], (10, 15), tmp_path / "cache"
    )  # another size does not read the first one's files
    assert other.image("a").shape == (10, 15, 3)


def test_the_kept_picture_is_used_until_its_source_is_newer(tmp_path):
    data = dataset(save(tmp_path / "a.png", noise(40, 60)), None, (20, 30), tmp_path / "cache")
    before = data.image("a")
    (kept,) = (tmp_path / "cache").rglob("*.png")
    save(kept, np.full((20, 30, 3), 9, np.uint8))
    assert (data.image("a") == 9).all()
    save(tmp_path / "a.png", noise(40, 60, seed=1))
    later = kept.stat().st_mtime + 10
    os.utime(tmp_path / "a.png", (later, later))
    after = data.image("a")
    assert not (after == 9).all() and not np.array_equal(after, before)
    os.utime(tmp_path / "a.png", (later - 20, later - 20))
    np.testing.assert_array_equal(data.image("a"), after)  # and the new one is kept now


def test_a_kept_label_goes_through_a_weak_view_without_a_warning(tmp_path, recwarn):
    """An array that PIL owns is read-only: torch would warn in the middle of the progress line."""
    data = dataset(
        save(tmp_path / "a.png", noise(40, 60)),
        save(tmp_path / "mask.png", blocks(40, 60, 4)),
        (20, 30),
        tmp_path / "cache",
    )
    for _ in range(2):
        common.weak_view(data.image("a"), data.label("a"), common.rng(0), (16, 16))
    assert [str(w.message) for w in recwarn] == []


# ---- camvid and cityscapes -----------------------------------------------------------------------


def make_camvid(root, suffix=".png", lists=True):
    for part, names in (
        ("train", ["0001TP_006690", "0001TP_006720", "Seq05VD_f00000"]),
        ("val", ["0016E5_07959"]),
    ):
        for i, name in enumerate(names):
            save(root / part / (name + suffix), noise(24, 32, i))
            label = blocks(24, 32, 12)  # 11 is void
            label[0, 0] = 11
            save(root / f"{part}annot" / f"{name}.png", label)
        if lists:
            (root / f"{part}.txt").write_text(
                "".join(
                    f"/SegNet/CamVid/{part}/{n}.png /SegNet/CamVid/{part}annot/{n}.png\n"
                    for n in names
                )
            )
    return root


@pytest.mark.parametrize("suffix, lists", [(".png", True), (".jpg", True), (".png", False)])
def test_camvid(tmp_path, suffix, lists):
    root = make_camvid(tmp_path, suffix, lists)
    data = common.open_listed("camvid", root, None, tmp_path / "cache")
    assert data.train == [
        "train/0001TP_006690",
        "train/0001TP_006720",
        "train/Seq05VD_f00000",
    ] and data.val == ["val/0016E5_07959"]
    assert data.names == [
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ]
    label = blocks(24, 32, 12)
    label[0, 0] = 11
    np.testing.assert_array_equal(data.label("val/0016E5_07959"), np.where(label == 11, 255, label))
    assert data.image("train/0001TP_006720").shape == (24, 32, 3)


def make_cityscapes(root, kind="labelIds", fill=None):
    """A tree in the real layout. Masks hold the values `fill`, in turn."""
    fill = list(fill) if fill is not None else list(range(34)) + [255]
    for part, names in (
        ("train", ["jena_000078_000019", "jena_000002_000019", "aachen_000010_000019"]),
        ("val", ["munster_000000_000019"]),
    ):
        for i, name in enumerate(names):
            city = name.split("_")[0]
            save(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", noise(20, 40, i))
            mask = np.resize(np.array(fill, np.uint8), (20, 40))
            save(root / "gtFine" / part / city / f"{name}_gtFine_{kind}.png", mask)
            (root / "gtFine" / part / city / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


# The 19 training classes of Cityscapes by their id in the labelIds files (the dataset's table).
TRAIN_IDS = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    data = common.open_cityscapes(make_cityscapes(tmp_path), None, tmp_path / "cache")
    assert data.train == [
        "aachen/aachen_000010_000019",
        "jena/jena_000002_000019",
        "jena/jena_000078_000019",
    ]  # sorted
    assert data.val == ["munster/munster_000000_000019"]
    assert (
        data.names[0] == "road"
        and data.names[13] == "car"
        and data.names[18] == "bicycle"
        and len(data.names) == 19
    )
    label = data.label(data.val[0]).ravel()
    for i, value in enumerate(
        list(range(34)) + [255]
    ):  # void classes, and 255 where a licence plate may stand, are unknown
        assert label[i] == TRAIN_IDS.get(value, 255), value


def test_cityscapes_label_train_ids_are_accepted_as_they_are(tmp_path):
    values = list(range(19)) + [255]
    data = common.open_cityscapes(
        make_cityscapes(tmp_path, "labelTrainIds", values), None, tmp_path / "cache"
    )
    np.testing.assert_array_equal(data.label("jena/jena_000002_000019").ravel()[:20], values)
    assert data.names[data.label("jena/jena_000002_000019")[0, 8]] == "vegetation"


def test_cityscapes_label_ids_win_where_both_are_there(tmp_path):
    make_cityscapes(tmp_path, "labelTrainIds", range(19))
    data = common.open_cityscapes(make_cityscapes(tmp_path), None, tmp_path / "cache")
    assert data.label(data.val[0]).ravel()[7] == 0


def test_stray_files_among_the_cities_do_no_harm(tmp_path):
    make_cityscapes(tmp_path)
    for folder in ("leftImg8bit/train/jena", "leftImg8bit/train"):
        (tmp_path / folder / ".DS_Store").write_bytes(b"x")
    assert len(common.open_cityscapes(tmp_path, None, tmp_path / "cache").train) == 3


# ---- splits --------------------------------------------------------------------------------------


def ids_only(name, ids):
    return common.Dataset(
        name, {"a": (0, 0, 0)}, list(ids), [], {id: (id, id) for id in ids}, {0: 0}
    )


@pytest.mark.parametrize(
    "name, total, labels, expected",
    [
        ("cityscapes", 2975, "1/30", 100),
        ("cityscapes", 2975, "1/8", 372),
        ("cityscapes", 2975, "1/4", 744),
        ("cityscapes", 2975, "1/1", 2975),
        ("cityscapes", 2975, "372", 372),
        ("cityscapes", 2975, 100, 100),
        ("camvid", 367, "1/8", 46),
        ("camvid", 367, "367", 367),
        ("camvid", 367, "1/30", 12),
        ("streets", 256, "1/64", 4),
    ],
)
def test_count_labels(name, total, labels, expected):
    assert (
        common.count_labels(labels, ids_only(name, [f"{i:04d}" for i in range(total)])) == expected
    )


def streets_split(**changes):
    return common.split(arguments(**changes), common.Streets())


def test_the_seeded_split_is_stable_over_versions():
    assert streets_split(labels="6")[0] == [
        "train_0079",
        "train_0221",
        "train_0209",
        "train_0177",
        "train_0235",
        "train_0064",
    ]
    assert streets_split(labels="6", seed=7)[0] == [
        "train_0025",
        "train_0027",
        "train_0116",
        "train_0049",
        "train_0159",
        "train_0145",
    ]
    assert (
        streets_split(labels="6", seed=1, split_seed=7)[0] == streets_split(labels="6", seed=7)[0]
    )


def test_the_split_is_the_hash_order_that_the_docstring_states():
    ids = common.Streets().train
    expected = sorted(ids, key=lambda id: hashlib.sha256(f"3/{id}".encode()).hexdigest())
    assert streets_split(seed=3, labels="9") == (expected[:9], expected[9:])


def test_more_labels_keep_the_fewer_and_labeled_and_unlabeled_are_the_whole():
    few, many = streets_split(labels="4"), streets_split(labels="1/4")
    assert len(few[0]) == 4 and len(many[0]) == 64
    assert many[0][:4] == few[0]
    for labeled, unlabeled in (few, many):
        assert sorted(labeled + unlabeled) == sorted(common.Streets().train)


def test_split_resolves_the_number_of_labels():
    args = arguments(labels="1/32")
    common.split(args, common.Streets())
    assert args.labels == 8


def test_the_cityscapes_split_is_frenchs_permutation_of_the_sorted_names(monkeypatch):
    names = [f"city/city_{i:06d}_000019" for i in range(2975)]
    data = ids_only("cityscapes", names[::-1])
    monkeypatch.setattr(common, "check_before_training", lambda *_: None)
    labeled, unlabeled = common.split(arguments(labels="1/30"), data)
    assert [int(id[10:16]) for id in labeled[:6]] == [
        1687,
        2342,
        392,
        1338,
        76,
        42,
    ]  # RandomState(12345).permutation(2975)
    assert len(labeled) == 100 and sorted(labeled + unlabeled) == names
    assert common.split(arguments(labels="372"), data)[0][:100] == labeled
    assert [
        int(id[10:16]) for id in common.split(arguments(labels="100", seed=1), data)[0][:3]
    ] == [1490, 930, 2124]  # 23456
    assert common.split(arguments(labels="100", seed=5), data)[0] == labeled  # five splits, in turn
    assert (
        common.split(arguments(labels="100", split_seed=23456), data)[0]
        == common.split(arguments(labels="100", seed=1), data)[0]
    )


CITYSCAPES = [
    "jena/jena_000078_000019",
    "jena/jena_000065_000019",
    "hamburg/hamburg_000000_080169",
    "hamburg/hamburg_000000_032719",
    "aachen/aachen_000005_000019",
    "aachen/aachen_000010_000019",
    "strasbourg/strasbourg_000001_026106",
    "hanover/hanover_000000_044085",
]
VOC = [
    "2007_000032",
    "2007_000515",
    "2007_000733",
    "2010_004493",
    "2007_000039",
    "2011_000068",
    "2008_004588",
]
# Two lines of every public list, as their authors wrote them, and the pictures that they mean.
LISTS = {
    "CPS VOC": (b"2007_000032\n2007_000515\n", [0, 1]),
    "CPS VOC, CRLF": (b"2007_000733\r\n2010_004493\r\n", [2, 3]),
    "CPS Cityscapes, tab and leading slash": (
        b"/images/train/jena_000078_000019.png\t"
        b"/segmentation/train/jena_000078_000019_gtFine.png\n"
        b"/images/train/jena_000065_000019.png\t"
        b"/segmentation/train/jena_000065_000019_gtFine.png\n",
        [0, 1],
    ),
    "U2PL VOC": (b"2011_000068\n2008_004588\n", [5, 6]),
    "U2PL Cityscapes": (
        b"leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png\n"
        b"leftImg8bit/train/hamburg/hamburg_000000_032719_leftImg8bit.png",
        [2, 3],
    ),
    "UniMatch VOC": (
        b"JPEGImages/2007_000733.jpg SegmentationClass/2007_000733.png\n"
        b"JPEGImages/2010_004493.jpg SegmentationClass/2010_004493.png\n",
        [2, 3],
    ),
    "UniMatch Cityscapes": (
        b"leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png "
        b"gtFine/train/jena/jena_000078_000019_gtFine_labelTrainIds.png\n"
        b"leftImg8bit/train/aachen/aachen_000005_000019_leftImg8bit.png "
        b"gtFine/train/aachen/aachen_000005_000019_gtFine_labelTrainIds.png\n",
        [0, 4],
    ),
    "DARS VOC, trailing spaces": (
        b"JPEGImages/2007_000032.jpg SegmentationClassAug/2007_000032.png \n"
        b"JPEGImages/2007_000039.jpg SegmentationClassAug/2007_000039.png \n",
        [0, 4],
    ),
    "DARS Cityscapes": (
        b"leftImg8bit/train/aachen/aachen_000005_000019_leftImg8bit.png "
        b"gtFine/train/aachen/aachen_000005_000019_gtFine_labelTrainIds.png\n"
        b"leftImg8bit/train/aachen/aachen_000010_000019_leftImg8bit.png "
        b"gtFine/train/aachen/aachen_000010_000019_gtFine_labelTrainIds.png\n",
        [4, 5],
    ),
    "GuidedMix VOC, leading slash": (
        b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
        b"/JPEGImages/2007_000039.jpg /SegmentationClassAug/2007_000039.png\n",
        [0, 4],
    ),
    "GuidedMix Cityscapes": (
        b"strasbourg/strasbourg_000001_026106_leftImg8bit.png\n"
        b"hanover/hanover_000000_044085_leftImg8bit.png\n",
        [6, 7],
    ),
    "byte order mark, empty lines": (b"\xef\xbb\xbf2007_000032\n\n2007_000515\n\n", [0, 1]),
}


@pytest.mark.parametrize("form", list(LISTS))
def test_every_public_list_is_read(form, tmp_path):
    text, expected = LISTS[form]
    (tmp_path / "list.txt").write_bytes(text)
    ids = CITYSCAPES if "Cityscapes" in form else VOC
    data = ids_only("cityscapes" if "Cityscapes" in form else "voc", ids)
    labeled, unlabeled = common.read_split([tmp_path / "list.txt"], data)
    assert labeled == [ids[i] for i in expected]
    assert unlabeled == [id for i, id in enumerate(ids) if i not in expected]


def test_camvid_lists_in_the_segnet_form_are_read(tmp_path):
    root = make_camvid(tmp_path)
    data = common.open_listed("camvid", root, None, tmp_path / "cache")
    (tmp_path / "few.txt").write_text(
        "/SegNet/CamVid/train/0001TP_006720.png /SegNet/CamVid/trainannot/0001TP_006720.png\n"
    )
    assert common.read_split([tmp_path / "few.txt"], data) == (
        ["train/0001TP_006720"],
        ["train/0001TP_006690", "train/Seq05VD_f00000"],
    )


def test_a_second_list_names_the_unlabeled_pictures_and_nothing_else_is_used(tmp_path, capsys):
    (tmp_path / "labeled.txt").write_text("2007_000032\n2007_000515\n")
    (tmp_path / "unlabeled.txt").write_text("2011_000068\n2008_004588\n")
    assert common.read_split(
        [tmp_path / "labeled.txt", tmp_path / "unlabeled.txt"], ids_only("voc", VOC)
    ) == (VOC[:2], VOC[5:])
    assert capsys.readouterr().err == ""


def test_a_picture_in_both_lists_is_warned_of_and_counts_as_labeled_only(tmp_path, capsys):
    (tmp_path / "labeled.txt").write_text("2007_000032\n2007_000515\n")
    (tmp_path / "unlabeled.txt").write_text("2007_000515\n2011_000068\n")
    assert common.read_split(
        [tmp_path / "labeled.txt", tmp_path / "unlabeled.txt"], ids_only("voc", VOC)
    ) == (VOC[:2], ["2011_000068"])
    warning = capsys.readouterr().err
    assert warning.startswith("warning:") and "2007_000515" in warning and warning.count("\n") == 1


def test_a_pickled_order_of_all_pictures_decides_which_labels_come_first(tmp_path):
    data = common.Streets()
    order = np.random.RandomState(0).permutation(256)
    for value in (order, order.tolist(), list(order)):
        (tmp_path / "split_0.pkl").write_bytes(pickle.dumps(value))
        args = arguments(split=[str(tmp_path / "split_0.pkl")], labels="1/32")
        labeled, unlabeled = common.split(args, data)
        assert labeled == [data.train[i] for i in order[:8]] and args.labels == 8
        assert unlabeled == [data.train[i] for i in order[8:]]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("value, reason", [
    (Harm(), "it holds posix.mkdir"),
    ([0, 1, Harm()], "it holds posix.mkdir"),
    ([0, 1, 2], "expected one file with the numbers 0 to 255"),
    (np.arange(256) // 2, "expected one file with the numbers 0 to 255"),
    (np.array([Harm()] * 256), "it holds posix.mkdir"),
])
def test_a_pickle_runs_nothing(value, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("split.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(common.UserError, match=reason):
        common.split(arguments(split=["split.pkl"], labels="8"), common.Streets())
    assert not Path("harm").exists()


def test_a_file_that_is_no_pickle_is_named(tmp_path):
    path = tmp_path / "split.pkl"
    for content in (b"", b"2007_000032\n", pickle.dumps(np.arange(256))[:90]):
        path.write_bytes(content)
        with pytest.raises(common.UserError, match="not a pickled list of numbers"):
            common.split(arguments(split=[str(path)], labels="8"), common.Streets())


def test_the_part_of_a_crop_that_shows_the_picture_is_told_in_numbers():
    s = stream(scale=(0.5, 0.7))
    for batch in common.batches(s, arguments(), CPU, 0, 6):
        for (top, bottom, left, right), valid in zip(batch["inside"], batch["valid"]):
            expected = torch.zeros_like(valid)
            expected[top:bottom, left:right] = True
            assert torch.equal(valid, expected)


def test_a_list_decides_over_the_number_of_labels(tmp_path):
    (tmp_path / "list.txt").write_text("train_0003\ntrain_0001\n")
    args = arguments(split=[str(tmp_path / "list.txt")], labels="4")
    labeled, unlabeled = common.split(args, common.Streets())
    assert labeled == ["train_0003", "train_0001"] and len(unlabeled) == 254 and args.labels == 2


# ---- weak views ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crop, scale",
    [
        ((32, 32), (1.0, 1.0)),
        ((32, 40), (0.5, 1.5)),
        ((64, 64), (0.5, 1.5)),
        ((64, 32), (0.7, 0.7)),
        ((48, 56), (1.0, 1.5)),
    ],
)
def test_image_label_and_map_move_together(crop, scale):
    data, flips, padded = Coordinates(), set(), 0
    compared = 0
    for seed in range(40):
        image, label, valid, view = common.weak_view(
            data.image("picture_07"), data.label("picture_07"), common.rng(seed), crop, scale
        )
        assert (
            image.shape == (3, *crop)
            and label.shape == valid.shape == crop
            and image.dtype == label.dtype == torch.uint8
        )
        row, column = image[0].float() / 4, image[1].float() / 4  # where each pixel comes from
        assert torch.equal(valid, image[2] == 107)
        assert torch.equal(
            label == 255, ~valid
        )  # padding is unknown, never class 0; and nothing else is
        # The label's block, wherever the pixel is not at a block's edge.
        inner = valid.clone()
        for place, size in ((row, 48), (column, 56)):
            to_edge = (place + 0.5) % 8
            inner &= to_edge.minimum(8 - to_edge) > 1.3
        block = (
            torch.div(row + 0.5, 8, rounding_mode="floor") * 3
            + torch.div(column + 0.5, 8, rounding_mode="floor")
        ) % 5
        assert torch.equal(label[inner].float(), block[inner])
        # The map at stride 8: a cell is that of its pixel.
        soft = common.crop_map(coordinate_map(7), (48, 56), view, crop, 8)
        cells = torch.stack([row, column, image[2].float()])[:, ::8, ::8]
        whole = valid[::8, ::8] & (cells[0] > 0.5) & (cells[0] < 39.5)
        whole &= (cells[1] > 0.5) & (cells[1] < 47.5)  # beyond the last cells the map is constant
        assert (soft - cells).abs().amax(0)[whole].max().item() < 0.6 if whole.any() else True
        compared += int(whole.sum()) * int(inner.any())
        # Flip: columns fall instead of rise.
        flips.add(bool(view[4]))
        steps = column.diff(dim=1)[valid[:, 1:] & valid[:, :-1]]
        assert (steps <= 0).all() if view[4] else (steps >= 0).all()
        padded += int((~valid).any())
    assert compared > 100 and flips == {True, False}
    assert (padded > 0) == (crop[0] > 48 * scale[0] or crop[1] > 56 * scale[0])


def test_at_scale_one_every_bit_stays():
    image, label = noise(48, 56), blocks(48, 56)
    places = set()
    for seed in range(20):
        x, y, valid, (top, left, bottom, right, flip) = common.weak_view(
            image, label, common.rng(seed), (32, 40)
        )
        rows, columns = (
            slice(round(top * 48), round(bottom * 48)),
            slice(round(left * 56), round(right * 56)),
        )
        expected_x, expected_y = image[rows, columns], label[rows, columns]
        if flip:
            expected_x, expected_y = expected_x[:, ::-1], expected_y[:, ::-1]
        np.testing.assert_array_equal(x.permute(1, 2, 0), expected_x)
        np.testing.assert_array_equal(y, expected_y)
        assert valid.all()
        places.add((rows.start, columns.start))
    assert len(places) > 10


def test_crops_reach_every_edge():
    places = [
        common.weak_view(noise(10, 12), blocks(10, 12), common.rng(seed), (8, 8))[3]
        for seed in range(200)
    ]
    assert {round(top * 10) for top, *_ in places} == {0, 1, 2}
    assert {round(left * 12) for _, left, *_ in places} == {0, 1, 2, 3, 4}
    assert 60 < sum(view[4] for view in places) < 140


@pytest.mark.parametrize("stride", [1, 8])
def test_the_map_of_the_whole_picture_is_itself_and_flips_exactly(stride):
    soft = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0))
    size = (5 * stride + 1, 6 * stride + 1)  # cells lie on the border, so on cells when mirrored
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    whole = (0.0, 0.0, 1.0, 1.0, False)
    close(common.crop_map(soft, size, whole, size, stride), soft)
    flipped = (0.0, 0.0, 1.0, 1.0, True)
    close(common.crop_map(soft, size, flipped, size, stride), soft.flip(-1))
    upper = (2 * stride + 1, size[1])
    half = (0.0, 0.0, upper[0] / size[0], 1.0, False)
    close(common.crop_map(soft, size, half, upper, stride), soft[:, :3])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("width", [56, 57, 61])
def test_cells_of_a_mirrored_crop_lie_on_its_own_grid(width, align_corners):
    """Cell j of the crop is on its pixel 8 j, which is pixel width - 1 - 8 j of the picture."""
    offset = 0 if align_corners else 3.5
    places = 8 * torch.arange(math.ceil(width / 8)) + offset
    soft = places.expand(1, 3, -1)
    view = (0.0, 0.0, 1.0, 1.0, True)
    found = common.crop_map(soft, (20, width), view, (20, width), 8, align_corners)[0, 0]
    expected = (width - 1 - places).clamp(places[0], places[-1])
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)


# ---- streams -------------------------------------------------------------------------------------

NAMES = [
    "labeled 0, stage 0",
    "labeled 1, stage 0",
    "labeled, stage 1",
    "unlabeled, stage 1",
    "partner, stage 1",
    "labeled, stage 2",
]


def stream(name="labeled", seed=0, count=20, **options):
    data = Coordinates(count)
    return common.Stream(data, data.train, name, arguments(seed=seed), **options)


def draw(s, positions):
    """(picture, row and column of the upper left corner, flipped) at each position.

    All is read from the picture's content."""
    images = [s[p]["image"] for p in positions]
    return [
        (
            int(x[2, 0, 0]) - 100,
            int(x[0, 0, 0]) // 4,
            int(x[1, 0].min()) // 4,
            bool(x[1, 0, 0] > x[1, 0, 1]),
        )
        for x in images
    ]


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a
    )


def batches(s, start=0, stop=6, **changes):
    return list(common.batches(s, arguments(**changes), CPU, start, stop))


def test_a_position_depends_on_seed_name_and_position_alone():
    places = [33, 2, 61, 2]
    forward, again = stream(), stream()
    for p in range(30):
        again[p]  # what was drawn before does not matter
    np.random.seed(5), torch.manual_seed(5)
    assert draw(forward, places) == draw(again, places)
    assert draw(stream(seed=1), range(20)) != draw(stream(), range(20))


def test_two_names_never_share_an_order_or_crops():
    drawn = {name: draw(stream(name), range(60)) for name in NAMES}
    for i, a in enumerate(NAMES):
        for b in NAMES[i + 1 :]:
            same_picture = np.mean([x[0] == y[0] for x, y in zip(drawn[a], drawn[b])])
            same_crop = np.mean([x[1:3] == y[1:3] for x, y in zip(drawn[a], drawn[b])])
            assert same_picture < 0.25 and same_crop < 0.1, (a, b)  # by chance 1/20 and 1/425


def test_every_epoch_holds_every_picture_once_in_another_order():
    pictures = [place[0] for place in draw(stream(), range(100))]
    epochs = [tuple(pictures[i : i + 20]) for i in range(0, 100, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_a_picture_is_cropped_anew_in_every_epoch():
    s = stream(count=1)
    assert len(set(draw(s, range(20)))) > 15


def test_batches_are_the_same_with_and_without_workers():
    alone, helped = batches(stream()), batches(stream(), workers=2)
    assert len(alone) == len(helped) == 6
    assert all(equal(a, b) for a, b in zip(alone, helped))


def test_a_stream_can_be_sent_to_a_loader_process():
    """Where processes are spawned (macOS, and Linux from Python 3.14 on) it is pickled."""
    s = stream()
    assert draw(pickle.loads(pickle.dumps(s)), range(5)) == draw(s, range(5))


def test_batches_go_on_where_they_were_left():
    assert all(
        equal(a, b)
        for a, b in zip(batches(stream(), 0, 9)[4:], batches(stream(), 4, 9), strict=True)
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_processes_make_up_the_batch_of_one(processes, monkeypatch):
    whole = batches(stream())
    shares = []
    for process in range(processes):
        monkeypatch.setattr(common, "world_size", lambda: processes)
        monkeypatch.setattr(common, "rank", lambda: process)
        shares.append(batches(stream()))
    for t, batch in enumerate(whole):
        assert all(len(share[t]["image"]) == 4 // processes for share in shares)
        for key in ("image", "label", "valid"):
            assert torch.equal(torch.cat([share[t][key] for share in shares]), batch[key])
        assert (
            sum((share[t]["position"] for share in shares), [])
            == batch["position"]
            == list(range(4 * t, 4 * t + 4))
        )


def test_an_unlabeled_stream_has_truth_and_no_label():
    labeled, unlabeled = batches(stream(), stop=1)[0], batches(stream(labeled=False), stop=1)[0]
    assert "truth" not in labeled and "label" not in unlabeled
    assert (
        labeled["label"].dtype == unlabeled["truth"].dtype == torch.int64
        and labeled["image"].dtype == torch.uint8
    )
    assert torch.equal(labeled["label"], unlabeled["truth"])


def test_to_float():
    assert torch.equal(
        common.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1.0])
    )


# ---- soft labels ---------------------------------------------------------------------------------


def test_soft_labels_are_kept_in_half_precision(tmp_path):
    p = torch.rand(5, 6, 7).softmax(0)
    common.write_soft_label(tmp_path / "new folder", "city/name", p)
    read = common.read_soft_label(tmp_path / "new folder", "city/name")
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, p.half().numpy())
    assert len(list((tmp_path / "new folder").iterdir())) == 1  # no temporary file stays behind


def test_each_picture_comes_with_its_map_and_both_move_together(tmp_path):
    data = Coordinates()
    for i, id in enumerate(data.train):
        common.write_soft_label(tmp_path / "model 1", id, coordinate_map(i))
        common.write_soft_label(tmp_path / "model 2", id, coordinate_map(i).flip(0))
    s = common.Stream(
        data,
        data.train,
        "unlabeled",
        arguments(scale=(1.0, 1.5)),
        labeled=False,
        soft_labels={tmp_path / "model 1": True, tmp_path / "model 2": True},
    )
    compared = 0
    for batch in common.batches(s, arguments(), CPU, 0, 10):
        assert batch["soft_0"].shape == (4, 3, 4, 4)
        cells = batch["image"][:, :, ::8, ::8].float()
        cells[:, :2] /= 4
        inner = (cells[:, 0] > 0.5) & (cells[:, 0] < 39.5)
        inner &= (cells[:, 1] > 0.5) & (cells[:, 1] < 47.5)
        assert (batch["soft_0"] - cells).abs().amax(1)[inner].max() < 0.6
        assert (batch["soft_1"].flip(1) - cells).abs().amax(1)[inner].max() < 0.6
        compared += int(inner.sum())
    assert compared > 200
