"""Your own pictures: --dataset folder, --check-data and --predict."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dars  # noqa: E402
import guidedmix  # noqa: E402
import mkd  # noqa: E402
import rml  # noqa: E402
import three_stage  # noqa: E402
from helpers import losses, records, strict  # noqa: E402

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(seed, height=60, width=90, channels=3):
    return np.random.RandomState(seed).randint(
        0, 256, (height, width, channels)[: 2 + (channels > 1)], dtype=np.uint8
    )


def mask(seed, height=60, width=90, classes=3):
    """Vertical stripes of the classes, and a row of 255."""
    label = np.tile((np.arange(width) * classes // width).astype(np.uint8), (height, 1))
    label[seed % height] = 255
    return label


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def own(tmp_path):
    """12 photos, 4 of them with masks, as a user would have them."""
    for i in range(12):
        save(
            tmp_path
            / f"own/{'images' if i < 4 else 'unlabeled'}/photo {i}.{'jpg' if i % 2 else 'png'}",
            noise(i, 60 + i, 90),
        )
        if i < 4:
            save(tmp_path / f"own/masks/photo {i}.png", mask(i, 60 + i, 90))
    return tmp_path / "own"


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(*argv, script=rml):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                f"{script.__name__}.py",
                "--dataset",
                "folder",
                "--data-root",
                str(tmp_path / "own"),
                "--preset",
                "tiny",
                *map(str, argv),
            ],
        )
        script.main()

    return start


# ---- the dataset ---------------------------------------------------------------------------------


def test_labeled_unlabeled_and_val_pictures(own, capsys):
    data = common.open_folder(own, None, None)
    assert (
        len(data.train) == 3
        and len(data.val) == 1
        and len(data.extra) == 8
        and data.names == ["class 0", "class 1", "class 2"]
    )
    assert set(data.train + data.val) == {f"images/photo {i}" for i in range(4)} and data.extra == [
        f"unlabeled/photo {i}" for i in (10, 11, 4, 5, 6, 7, 8, 9)
    ]
    assert data.image("images/photo 1").shape == (61, 90, 3) and np.array_equal(
        data.label("images/photo 1"), mask(1, 61)
    )
    assert (data.label("unlabeled/photo 5") == 255).all() and data.label(
        "unlabeled/photo 5"
    ).shape == (65, 90)
    said = capsys.readouterr().out
    assert (
        "1 of the 4 labeled pictures, held out by name" in said
        and "3, numbered from the masks" in said
    )
    assert common.open_folder(own, None, None).val == data.val  # always the same


def test_a_fifth_is_held_out_or_val_images_are_used(own):
    for i in range(4, 15):
        save(own / f"images/more {i}.png", noise(i))
        save(own / f"masks/more {i}.png", mask(i))
    data = common.open_folder(own, None, None)
    assert len(data.val) == 3 and len(data.train) == 12 and not set(data.val) & set(data.train)
    save(own / "val_images/a.jpg", noise(1))
    save(own / "val_masks/a.png", mask(1))
    data = common.open_folder(own, None, None)
    assert data.val == ["val_images/a"] and len(data.train) == 15


def test_classes_and_colors_of_a_list(own):
    (own / "classes.txt").write_text(
        "\ufeffroad 1 2 3\n\nside walk\n# a comment\ntree #ff8000\ncar, 4, 5, 6\nbus,#010203\n",
        encoding="utf-8",
    )
    assert common.open_folder(own, None, None).classes == {
        "road": (1, 2, 3),
        "side walk": (245, 130, 48),
        "tree": (255, 128, 0),
        "car": (4, 5, 6),
        "bus": (1, 2, 3),
    }


def test_masks_of_one_bit(own, main):
    for i in range(4):
        Image.fromarray(noise(i, 60 + i, 90, 1)).convert("1").save(own / f"masks/photo {i}.png")
    data = common.open_folder(own, None, None)
    assert len(data.names) == 2 and set(np.unique(data.label("images/photo 0"))) == {0, 1}
    main("--check-data")


def test_an_id_beyond_a_gap_is_out_of_range(own, capsys):
    label = mask(0, 60)
    label[5, 5] = 254
    save(own / "masks/photo 0.png", label)
    data = common.open_folder(own, None, None)
    assert len(data.names) == 3
    with pytest.raises(
        common.UserError, match=r"photo 0.png: label values \[254\] are outside the 3 classes"
    ):
        data.label("images/photo 0")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_any_mode_of_picture_is_read_as_rgb(own, mode):
    grey = noise(0, 60, 90, 1)
    picture = (
        Image.fromarray(grey.astype(np.uint16) * 256)
        if mode == "I;16"
        else Image.fromarray(noise(3)).convert(mode)
    )
    path = own / f"images/photo 0.{'jpg' if mode == 'CMYK' else 'png'}"
    (own / "images/photo 0.png").unlink()
    picture.save(path)
    read = common.open_folder(own, None, None).image("images/photo 0")
    assert read.shape == (60, 90, 3) and read.dtype == np.uint8
    assert np.array_equal(
        read,
        np.repeat(grey[..., None], 3, 2)
        if mode == "I;16"
        else np.asarray(Image.open(path).convert("RGB")),
    )
    assert np.array_equal(
        np.asarray(common.to_rgb(Image.open(path))), read
    )  # as --predict reads it


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(own, orientation, tmp_path):
    """Picture and mask are as a viewer shows the picture; without a mask the size is the same."""
    exif = Image.Exif()
    exif[274] = orientation
    upright = Image.fromarray(noise(5, 60, 90))
    upright.save(own / "images/photo 0.png", exif=exif)
    upright.save(own / "unlabeled/photo 4.png", exif=exif)
    data, turned = common.open_folder(own, None, None), orientation >= 5
    size = (90, 60) if turned else (60, 90)
    expected = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }[orientation](np.asarray(upright))
    assert (
        np.array_equal(data.image("images/photo 0"), expected)
        and data.label("unlabeled/photo 4").shape == size
    )
    if turned:
        with pytest.raises(
            common.UserError,
            match="mask is 90x60, its picture .* 60x90 .turned, as its EXIF orientation says",
        ):
            data.label("images/photo 0")
        save(own / "masks/photo 0.png", mask(0, 90, 60))
    assert data.label("images/photo 0").shape == size


def test_a_turned_photo_with_a_mask_deserves_a_check(own, main, capsys):
    """Upside down the mask has the right size, so nobody else would notice."""
    exif = Image.Exif()
    exif[274] = 3
    for part, i in (("images", 0), ("unlabeled", 4)):
        Image.fromarray(noise(i, 60 + i, 90)).save(own / f"{part}/photo {i}.png", exif=exif)
    main("--check-data")
    notes = [line for line in capsys.readouterr().out.splitlines() if "EXIF" in line]
    assert len(notes) == 1 and "images/photo 0.png" in notes[0] and "masks/photo 0.png" in notes[0]


def test_the_cache_belongs_to_the_file_and_the_classes(own, tmp_path):
    """Another file in its place counts, also an older one; with fewer classes it is read again."""
    import os

    for seed in (0, 1):
        save(own / "images/photo 0.png", noise(seed, 400, 200))
        save(own / "masks/photo 0.png", mask(seed, 400, 200, classes=5))
        os.utime(own / "images/photo 0.png", (1000 - seed, 1000 - seed))
        data = common.open_folder(own, (100,), tmp_path / "cache")
        expected = Image.fromarray(noise(seed, 400, 200)).resize(
            (50, 100), Image.Resampling.BILINEAR
        )
        assert np.array_equal(data.image("images/photo 0"), np.asarray(expected)) and set(
            range(5)
        ) <= set(np.unique(data.label("images/photo 0")))
    (own / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(common.UserError, match=r"\[3, 4\] are outside the 3 classes"):
        common.open_folder(own, (100,), tmp_path / "cache").label("images/photo 0")


def test_a_picture_without_a_mask_is_not_opened_again_for_one(own, monkeypatch):
    data = common.open_folder(own, (100,), own / "cache")
    monkeypatch.setattr(common, "open_picture", lambda *_, **__: pytest.fail("opened"))
    assert (common.truth_for_the_log(data, "unlabeled/photo 4", (30, 40)) == 255).all()


def test_the_longer_side_is_shrunk_and_never_grown(own, tmp_path):
    save(own / "images/photo 0.png", noise(0, 400, 200))
    save(own / "masks/photo 0.png", mask(0, 400, 200))
    data = common.open_folder(own, (100,), tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        assert data.image("images/photo 0").shape == (100, 50, 3) and data.label(
            "images/photo 0"
        ).shape == (100, 50)
        assert set(np.unique(data.label("images/photo 0"))) <= {0, 1, 2, 255}
    assert data.image("images/photo 1").shape == (61, 90, 3)
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 2
    assert (
        np.abs(
            data.image("images/photo 0").astype(float)
            - np.asarray(
                Image.fromarray(noise(0, 400, 200)).resize((50, 100), Image.Resampling.BILINEAR)
            )
        ).max()
        == 0
    )


# ---- what is wrong is named ----------------------------------------------------------------------


def spoil(own):
    """A folder of fifty pictures with each kind of bad file -> {kind: words that name it}."""
    shutil.rmtree(own)
    for i in range(50):
        part = "images" if i < 30 else "unlabeled"
        save(own / f"{part}/p{i:02d}.jpg", noise(i))
        if i < 30:
            save(own / f"masks/p{i:02d}.png", mask(i))
    whole = (own / "images/p00.jpg").read_bytes()
    (own / "images/p00.jpg").write_bytes(whole[: len(whole) // 2])
    (own / "unlabeled/p31.png").write_text("this is text")
    (own / "unlabeled/p31.jpg").unlink()
    Image.fromarray(mask(2).astype(np.uint16)).save(own / "masks/p02.png")
    Image.fromarray(mask(3)).convert("RGB").save(own / "masks/p03.png")
    save(own / "masks/p04.png", mask(4, 30, 45))
    wrong = mask(5)
    wrong[3, 3] = 254
    save(own / "masks/p05.png", wrong)
    (own / "unlabeled/p36.jpg").write_bytes(b"")
    (own / "masks/p07.png").unlink()
    save(own / "images/p08.png", noise(8))
    (own / "classes.txt").write_bytes(b"")
    return {
        "truncated JPEG": ("images/p00.jpg", "truncated"),
        "text named .png": ("unlabeled/p31.png", "not a readable picture"),
        "16-bit mask": ("masks/p02.png", "16-bit"),
        "RGB mask": ("masks/p03.png", "RGB"),
        "mask of another size": ("masks/p04.png", "45x30", "90x60"),
        "mask with 254": ("masks/p05.png", "254"),
        "empty file": ("unlabeled/p36.jpg", "empty file"),
        "missing partner": ("images/p07.jpg", "no mask", "p07.png"),
        "duplicate stem": ("p08", "name of"),
        "zero-byte list": ("classes.txt", "0 classes"),
    }


def test_every_kind_of_bad_file_is_named_in_one_run(own, main, capsys):
    kinds = spoil(own)
    with pytest.raises(
        common.UserError, match=f"named above: {len(kinds)}$"
    ):  # run_main() makes it exit status 2
        main("--check-data")
    lines = capsys.readouterr().out.split("would stop a run: ")[1].splitlines()[1:]
    for kind, words in kinds.items():
        assert sum(all(word in line for word in words) for line in lines) == 1, (kind, lines)
    assert len(lines) == len(kinds)


def test_each_kind_of_bad_file_stops_a_run_before_it_begins(own, main):
    """What --check-data calls a problem stops a run with one line."""
    kinds = spoil(own)
    remaining = set(kinds)
    while remaining:
        with pytest.raises(common.UserError) as error:
            main("--iterations", "1")
        text = str(error.value)
        (kind,) = [kind for kind in remaining if all(word in text for word in kinds[kind])]
        assert "\n" not in text and not Path("runs").exists()
        remaining.remove(kind)
        {
            "truncated JPEG": lambda: save(own / "images/p00.jpg", noise(0)),
            "text named .png": lambda: (own / "unlabeled/p31.png").unlink(),
            "16-bit mask": lambda: save(own / "masks/p02.png", mask(2)),
            "RGB mask": lambda: save(own / "masks/p03.png", mask(3)),
            "mask of another size": lambda: save(own / "masks/p04.png", mask(4)),
            "mask with 254": lambda: save(own / "masks/p05.png", mask(5)),
            "empty file": lambda: (own / "unlabeled/p36.jpg").unlink(),
            "missing partner": lambda: save(own / "masks/p07.png", mask(7)),
            "duplicate stem": lambda: (own / "images/p08.png").unlink(),
            "zero-byte list": lambda: (own / "classes.txt").unlink(),
        }[kind]()
    main("--check-data")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda own: shutil.rmtree(own / "images"), ("images", "masks/", "unlabeled/")),
        (
            lambda own: [path.unlink() for path in (own / "images").iterdir()],
            ("a mask without a picture",),
        ),
        (
            lambda own: [
                (own / f"{part}/photo {i}.{end}").unlink()
                for i, end in ((1, "jpg"), (2, "png"), (3, "jpg"))
                for part, end in (("images", end), ("masks", "png"))
            ],
            ("1 pictures with a mask",),
        ),
        (
            lambda own: (own / "classes.txt").write_text("road\nroad\n"),
            ("classes.txt", "'road'", "class 0"),
        ),
        (
            lambda own: (own / "classes.txt").write_text("road 300 0 0\nb\nc\n"),
            ("classes.txt", "'road 300 0 0'", "up to 255"),
        ),
        (lambda own: (own / "classes.txt").write_bytes(b"stra\xdfe"), ("classes.txt", "UTF-8")),
        (
            lambda own: (own / "classes.txt").write_text("road\n"),
            ("masks/photo", "[1, 2]", "1 classes"),
        ),
        (
            lambda own: [
                save(own / f"masks/photo {i}.png", mask(i, 60 + i, classes=1)) for i in range(4)
            ],
            ("own/masks", "0 and 255", "1, 2"),
        ),
        (
            lambda own: (
                [save(own / f"masks/photo {i}.png", mask(i, 60 + i, classes=1)) for i in range(4)]
                + [(own / "classes.txt").write_text("background\nobject\n")]
            ),
            ("0 and 255", "1, 2"),
        ),
        (
            lambda own: (own / "masks/photo 0.png").rename(own / "masks/photo 0.jpg"),
            ("photo 0.jpg", "PNG"),
        ),
        (
            lambda own: [
                path.rename(path.with_name(f"{path.stem}_mask.png"))
                for path in (own / "masks").iterdir()
            ],
            ("images/photo 0.png", "rename", "masks/photo 0_mask.png"),
        ),
        (
            lambda own: (own / "classes.txt").write_text("0 sky\n1: road\n2 car\n"),
            ("classes.txt", "numbers"),
        ),
        (
            lambda own: [
                save(
                    own / f"masks/photo {i}.png",
                    10 * mask(i, 60 + i, classes=9) * (mask(i, 60 + i, classes=9) < 255),
                )
                for i in range(4)
            ],
            ("masks", "0, 10, 20, 30", "gaps"),
        ),
        (lambda own: (own / "unlabeled/trip").mkdir(), ("unlabeled/trip", "move them")),
    ],
)
def test_a_folder_with_a_mistake(own, main, change, words):
    change(own)
    with pytest.raises(common.UserError) as error:
        main("--iterations", "1")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(
        error.value
    )
    with pytest.raises(common.UserError):  # and --check-data sees it too
        main("--check-data")


def test_the_mask_of_another_picture_is_not_proposed(own, main, capsys):
    (own / "masks/photo 1.png").unlink()
    for part in ("images", "masks"):
        (own / f"{part}/photo 2.png").rename(own / f"{part}/photo 10.png")
    save(own / "masks/stray.png", mask(0))
    with pytest.raises(common.UserError, match="named above: 2$"):
        main("--check-data")
    said = capsys.readouterr().out
    assert (
        "photo 1.jpg: has no mask" in said
        and "make one" in said
        and "stray.png: a mask without a picture" in said
        and "rename" not in said
    )


def test_without_unlabeled_pictures_the_ways_out_are_named(own, main):
    shutil.rmtree(own / "unlabeled")
    with pytest.raises(
        common.UserError,
        match="use fewer --labels, or --supervised, or add .* the folder unlabeled/",
    ):
        main()


def test_files_that_are_no_pictures_are_warned_of(own, capsys):
    (own / "unlabeled/IMG_1.HEIC").write_text("x")
    (own / "images/.DS_Store").write_text("x")
    common.open_folder(own, None, None)
    said = capsys.readouterr().err
    assert "IMG_1.HEIC" in said and "HEIC, to JPEG" in said and "DS_Store" not in said


def test_palettes_that_differ_deserve_a_check(own, main, capsys):
    for i in range(2):
        index = Image.fromarray(mask(i, 60 + i))
        index.putpalette([i, 2, 3] * 256)
        index.save(own / f"masks/photo {i}.png")
    main("--check-data")
    assert "2 different palettes" in capsys.readouterr().out


def test_pictures_that_a_prediction_does_not_read_are_warned_of(own, main, capsys):
    main(*SHORT[rml], "--batch-size", "2", "--size", "80", "--crop", "48", "48", "--out", "run")
    (own / "unlabeled/IMG_1.HEIC").write_text("x")
    main("--predict", own / "unlabeled", "--checkpoint", "run", "--out", "out")
    said = capsys.readouterr()
    assert "IMG_1.HEIC" in said.err and "8 of 8 pictures" in said.out


def test_other_classes_are_another_run(own, main, kill):
    kill(
        common.Run,
        "save",
        lambda run, *_, **__: run.steps == 2,
        *SHORT[rml],
        "--batch-size",
        "2",
        "--size",
        "80",
        "--crop",
        "48",
        "48",
    )
    (own / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(common.UserError, match="unfinished run with classes"):
        main(*SHORT[rml], "--batch-size", "2", "--size", "80", "--crop", "48", "48", "--out", "run")


# ---- --check-data --------------------------------------------------------------------------------


def table(text):
    """{class: numbers of its row}."""
    rows = [line.split() for line in text.splitlines()]
    begin = next(i for i, row in enumerate(rows) if row[:1] == ["class"])
    found = {}
    for row in rows[begin + 1 :]:
        if not row:
            break
        numbers = [float(cell) for cell in row if cell.replace(".", "").isdigit()]
        found[
            "unknown" if row[0] == "unknown" else row[1] + row[2] if row[1] == "class" else row[1]
        ] = numbers
    return found


def test_the_table_counts_pictures_sizes_modes_and_pixels(own, main, capsys):
    main("--check-data")
    said = capsys.readouterr().out
    assert (
        "3 labeled, 1 val, 8 unlabeled; folder, 3 classes" in said
        and "90x60 (1)" in said
        and "pictures RGB (12); masks L (4)" in said
        and "nothing would stop a run" in said
    )
    data = common.open_folder(own, None, None)
    pixels = np.bincount(
        np.concatenate([data.label(id).ravel() for id in data.train]), minlength=256
    )
    for k in range(3):
        share, pictures = table(said)[f"class{k}"][-4:-2]
        assert share == pytest.approx(100 * pixels[k] / pixels.sum(), abs=0.006) and pictures == 3
    assert table(said)["unknown"][-4:] == [
        pytest.approx(100 * pixels[255] / pixels.sum(), abs=0.006),
        3,
        pytest.approx(100 / len(data.image(data.val[0])), abs=0.006),
        1,
    ]


def test_absent_classes_and_duplicates_deserve_a_check(own, main, capsys):
    (own / "classes.txt").write_text("a\nb\nc\nunicorn\n")
    val = Path(common.open_folder(own, None, None).val[0]).name
    shutil.copy(
        next((own / "images").glob(f"{val}.*")),
        own / f"unlabeled/copy{next((own / 'images').glob(f'{val}.*')).suffix}",
    )
    main("--check-data")
    notes = capsys.readouterr().out.split("deserves a check")[1]
    assert (
        "in no mask of the labeled part: unicorn" in notes
        and "in no mask of the val part: unicorn" in notes
    )
    line = next(line for line in notes.splitlines() if "the same picture 2 times" in line)
    assert (
        "copy" in line
        and val in line
        and "(val)" in line
        and "(unlabeled)" in line
        and "too good" in line
    )


def test_a_label_count_that_cannot_be_is_a_problem_too(own, main, capsys):
    with pytest.raises(common.UserError, match="named above: 1$"):
        main("--check-data", "--labels", "99")
    assert "--labels 99" in capsys.readouterr().out


@pytest.mark.parametrize("script", [rml, dars, mkd, three_stage, guidedmix])
def test_every_script_checks(own, main, script, capsys, monkeypatch):
    main("--check-data", script=script)
    assert "nothing would stop a run" in capsys.readouterr().out


def test_a_public_dataset_is_checked_too(tmp_path, monkeypatch, capsys):
    for part, n in (("train", 4), ("val", 2)):
        for i in range(n):
            save(tmp_path / f"camvid/{part}/{i}.png", noise(i))
            save(tmp_path / f"camvid/{part}annot/{i}.png", mask(i, classes=11) % 12)
    broken = common.hash_order(0, [f"train/{i}" for i in range(4)])[1].removeprefix(
        "train/"
    )  # not the labeled one
    (tmp_path / f"camvid/trainannot/{broken}.png").write_text("broken")
    shutil.copy(tmp_path / "camvid/train/0.png", tmp_path / "camvid/val/0.png")
    argv = [
        "rml.py",
        "--check-data",
        "--dataset",
        "camvid",
        "--data-root",
        str(tmp_path / "camvid"),
        "--labels",
    ]
    monkeypatch.setattr(sys, "argv", argv + ["1"])
    rml.main()  # a broken mask of an unlabeled picture stops nothing
    said = capsys.readouterr().out
    assert (
        "1 labeled, 2 val, 3 unlabeled" in said
        and "deserves a check" in said
        and f"trainannot/{broken}.png" in said
        and "the same picture 2 times" in said
    )
    monkeypatch.setattr(sys, "argv", argv + ["4", "--supervised"])
    with pytest.raises(common.UserError, match="named above: 1$"):
        rml.main()


def test_streets_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rml.py", "--check-data"])
    rml.main()
    said = capsys.readouterr().out
    assert "8 labeled, 128 val, 248 unlabeled" in said and table(said)["road"][1:3][
        0
    ] == pytest.approx(28.97, abs=0.01)


# ---- from photos to overlays ---------------------------------------------------------------------

SHORT = {
    rml: ["--stages", "1", "--stage0-iterations", "2", "--iterations", "2"],
    dars: [
        "--rounds",
        "1",
        "--round0-iterations",
        "2",
        "--iterations",
        "2",
        "--alpha",
        ".5",
        "--beta-min",
        ".2",
        "--beta-max",
        ".2",
    ],
    mkd: ["--iterations", "4", "--warmup", "2"],
    three_stage: ["--stages", "2", "--stage1-iterations", "2", "--iterations", "2"],
    guidedmix: ["--iterations", "4", "--warmup", "2"],
}


@pytest.mark.parametrize("script", list(SHORT))
def test_from_photos_to_overlays(own, main, script, tmp_path, capsys):
    """Training on photos of several sizes, then a prediction of each photo.

    Classes, colors and size come from the checkpoint."""
    (own / "classes.txt").write_text("road 1 2 3\nsky 4 5 6\ntree 7 8 9\n")
    main(
        *SHORT[script],
        "--batch-size",
        "2",
        "--size",
        "80",
        "--crop",
        "48",
        "48",
        "--labels",
        "3",
        "--out",
        "run",
        script=script,
    )
    result = strict(Path("run/result.json").read_text())
    assert (
        list(result["per_class"]) == ["road", "sky", "tree"]
        and result["labels"] == 3
        and result["paper"] is None
    )
    assert (
        all(math.isfinite(value) for value in losses(Path("run")).values())
        and Path("run/pictures/losses.png").exists()
    )
    shutil.move(own, tmp_path / "gone")
    main(
        "--predict",
        tmp_path / "gone/unlabeled",
        "--checkpoint",
        "run",
        "--out",
        "overlays",
        script=script,
    )
    assert len(list(Path("overlays").iterdir())) == 4 * 8 + 1
    overview = Image.open("overlays/overview.jpg")
    assert overview.width == 4 * 484 and overview.height > 5 * 300  # five pictures in four columns
    index, color, overlay, confidence = (
        Image.open(f"overlays/photo 9{kind}.png")
        for kind in ("", "_color", "_overlay", "_confidence")
    )
    assert (
        index.mode == "P"
        and color.mode == overlay.mode == "RGB"
        and confidence.mode == "L"
        and {x.size for x in (index, color, overlay, confidence)} == {(90, 69)}
    )
    label = np.asarray(index)
    assert label.max() < 3 and np.array_equal(
        np.asarray(color), np.array([(1, 2, 3), (4, 5, 6), (7, 8, 9)], np.uint8)[label]
    )
    assert (
        np.array_equal(np.asarray(index.convert("RGB")), np.asarray(color))
        and np.asarray(confidence).min() >= 255 / 3 - 1
    )


def test_other_classes_than_those_of_the_checkpoint_are_named(own, main):
    main(*SHORT[rml], "--batch-size", "2", "--size", "80", "--crop", "48", "48", "--out", "run")
    main("--evaluate", "--checkpoint", "run")
    (own / "classes.txt").write_text("road\nsky\ntree\n")
    with pytest.raises(
        common.UserError,
        match="class 0, class 1, class 2, .*own has road, sky, tree; use the same classes.txt",
    ):
        main("--evaluate", "--checkpoint", "run")


def test_unlabeled_pictures_have_no_truth_and_that_is_no_number(own, main):
    main(
        *SHORT[rml],
        "--batch-size",
        "2",
        "--size",
        "80",
        "--crop",
        "48",
        "48",
        "--log-every",
        "1",
        "--out",
        "run",
    )
    assert (
        all(r["pseudo_miou_1"] is None for r in records(Path("run")) if "pseudo_miou_1" in r)
        and "NaN" not in Path("run/log.jsonl").read_text()
    )


# ---- --predict -----------------------------------------------------------------------------------


class Pointwise(torch.nn.Module):
    """Class probabilities that depend on one pixel: any tiles give what the picture gives."""

    stride, align_corners = 1, True
    seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        return torch.cat([4 * x, -4 * x[:, :1]], 1)


ARGS = SimpleNamespace(scales=[1.0], flip=False, base_size=0, precision="fp32", crop=(64, 64))


@pytest.mark.parametrize(
    "height, width, h, w",
    [
        (300, 400, 300, 400),
        (300, 400, 150, 200),
        (301, 403, 97, 130),
        (50, 700, 50, 700),
        (64, 64, 128, 128),
    ],
)
def test_tiles_and_bands_give_what_the_whole_picture_gives(height, width, h, w, monkeypatch):
    picture = Image.fromarray(noise(0, height, width)).resize((width, height))
    monkeypatch.setattr(Pointwise, "seen", [])
    small = common.to_float(
        torch.from_numpy(
            np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()
        )[None]
    )
    p = F.interpolate(
        Pointwise()(small).softmax(1), (height, width), mode="bilinear", align_corners=False
    )[0]
    label, confidence = common.predict_tiled(Pointwise(), picture, (h, w), ARGS, CPU, band=37)
    sure = p.sort(0).values[-1] - p.sort(0).values[-2] > 1e-4
    assert np.array_equal(label[sure], p.argmax(0)[sure].numpy()) and sure.float().mean() > 0.98
    assert np.abs(confidence.astype(float) - 255 * p.max(0).values.numpy()).max() < 0.6


def test_a_large_picture_is_seen_in_tiles_with_margins(monkeypatch):
    monkeypatch.setattr(Pointwise, "seen", [])
    array = np.random.RandomState(0).randint(0, 256, (1500, 2300, 3), dtype=np.uint8)
    label, confidence = common.predict_tiled(
        Pointwise(), Image.fromarray(array), (1500, 2300), ARGS, CPU
    )
    seen = Pointwise.seen[:]
    assert len(seen) == 2 * 3 and set(seen) == {
        (750 + 128, w) for w in (767 + 128, 767 + 2 * 128, 766 + 128)
    }  # 2 x 3 tiles, alike
    logits = Pointwise()(common.to_float(torch.from_numpy(array.transpose(2, 0, 1))[None]))[0]
    p = logits.softmax(0)
    top = p.sort(0).values
    sure = top[-1] - top[-2] > 1e-4
    assert (
        np.array_equal(label[sure], p.argmax(0)[sure].numpy())
        and np.abs(confidence.astype(float) - 255 * p.max(0).values.numpy()).max() < 0.6
    )


def test_tiles_of_a_picture_that_is_scaled():
    array = np.asarray(
        Image.fromarray(noise(2, 20, 30)).resize((2700, 1701), Image.Resampling.BICUBIC)
    )
    label, confidence = common.predict_tiled(
        Pointwise(), Image.fromarray(array), (1500, 2001), ARGS, CPU
    )
    small = common.to_float(
        torch.from_numpy(
            np.asarray(Image.fromarray(array).resize((2001, 1500), Image.Resampling.BILINEAR))
            .transpose(2, 0, 1)
            .copy()
        )[None]
    )
    p = F.interpolate(
        Pointwise()(small).softmax(1), (1701, 2700), mode="bilinear", align_corners=False
    )[0]
    sure = p.sort(0).values[-1] - p.sort(0).values[-2] > 1e-3
    assert (
        np.array_equal(label[sure], p.argmax(0)[sure].numpy())
        and np.abs(confidence.astype(float) - 255 * p.max(0).values.numpy()).max() < 0.7
    )


def test_every_pixel_has_its_margin(monkeypatch):
    """A network that sees 100 pixels far gives at each pixel what it gives on the picture."""

    class Far(torch.nn.Module):
        stride, align_corners = 1, True

        def forward(self, x):
            padded = F.pad(x.mean(1, keepdim=True), (100, 100, 100, 100), value=0.5)
            far = padded[:, :, 200:, 200:] - padded[:, :, :-200, :-200]
            return torch.cat([50 * far, torch.zeros_like(far)], 1)

    array = np.asarray(
        Image.fromarray(noise(1, 30, 46)).resize((2300, 1500), Image.Resampling.BICUBIC)
    )
    label, _ = common.predict_tiled(Far(), Image.fromarray(array), (1500, 2300), ARGS, CPU)
    logits = Far()(common.to_float(torch.from_numpy(array.transpose(2, 0, 1).copy())[None]))[0]
    sure = (logits[0].abs() > 0.01).numpy()
    assert np.array_equal(label[sure], logits.argmax(0).numpy()[sure]) and sure.mean() > 0.9


@pytest.mark.parametrize(
    "size, base_size, picture, expected",
    [
        (None, 0, (300, 200), (200, 300)),
        ((100,), 0, (300, 200), (67, 100)),
        ((400,), 0, (300, 200), (200, 300)),
        ((50, 999), 0, (300, 200), (50, 75)),
        (None, 150, (300, 200), (100, 150)),
        (None, 400, (300, 200), (200, 300)),
        ((50, 999), 150, (300, 200), (50, 75)),
        ((100,), 0, (3000, 9), (8, 100)),
    ],
)
def test_the_size_at_which_a_picture_is_shown(size, base_size, picture, expected):
    assert common.shown_size(size, base_size, Image.new("RGB", picture)) == expected


def test_a_picture_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        common.UserError,
        match="bomb.png: not a readable picture .* exceeds limit .*, or shrink it",
    ):
        common.open_picture(tmp_path / "bomb.png")


def test_a_picture_of_any_size_is_predicted(own, main, tmp_path, monkeypatch):
    main(*SHORT[rml], "--batch-size", "2", "--size", "80", "--crop", "48", "48", "--out", "run")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    main("--predict", own / "unlabeled/photo 4.png", "--checkpoint", "run", "--out", "out")
    assert Path("out/photo 4_confidence.png").exists()


# ---- tests/benchmark_memory.py -------------------------------------------------------------------


def test_the_memory_of_a_pass_is_what_autograd_keeps():
    import benchmark_memory

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1)
    )
    kept = benchmark_memory.saved_bytes(network, torch.zeros(2, 3, 8, 16), torch.float32)
    assert (
        kept == 4 * 2 * (3 + 4) * 8 * 16
    )  # the picture, and what ReLU gives: once, though ReLU and the second conv keep it


def test_the_memory_of_a_step_grows_with_its_pictures():
    import benchmark_memory

    two, four, six = (benchmark_memory.count(rml, "folder-cpu", "fp32", n) for n in (2, 4, 6))
    assert 0 < four - two == pytest.approx(six - four)


def test_the_memory_of_guidedmix_is_counted_on_either_backbone():
    import benchmark_memory
    import guidedmix

    large, light = (
        benchmark_memory.count(guidedmix, row, "bf16", 2) for row in ("folder-gpu", "folder-cpu")
    )
    assert large > 3 * light > 0
