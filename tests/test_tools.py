"""What other tools leave in folders and write as masks, and how they read predictions."""

import importlib.util
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import results_table
import rml
from helpers import strict
from test_data import make_camvid, make_cityscapes
from test_folder import SHORT, Pointwise, mask, noise, save
from test_folder import main, own  # noqa: F401, fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = [*SHORT[rml], "--batch-size", "2", "--size", "80", "--crop", "48", "48", "--out", "run"]


# ---- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, label_ids", [(2, False), (3, False), (16, False), (19, True)])
def test_other_tools_read_the_ids_of_a_prediction(classes, label_ids, tmp_path):
    """PIL writes a palette of 16 colors or fewer with 1 to 4 bits, which torchvision misreads."""
    label = noise(0, channels=1) % classes
    picture = Image.fromarray(noise(1))
    colors = noise(2, 1, classes)[0]
    ids, color, *_ = common.draw_prediction(picture, label, label, colors, label_ids)
    path = tmp_path / "ids.png"
    ids.save(path)
    assert path.read_bytes()[24] == 8  # bits
    expected = np.array(common.CITYSCAPES_IDS)[label] if label_ids else label
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert np.array_equal(torchvision.io.read_image(str(path))[0].numpy(), expected)
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(color))


# ---- other systems -------------------------------------------------------------------------------


def test_memory_is_in_megabytes_on_every_system(monkeypatch):
    """Windows has no module resource, and macOS counts bytes."""
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("common_on_windows", common.__file__)
    windows = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "common_on_windows", windows)
    spec.loader.exec_module(windows)
    assert windows.peak_memory(cpu) == 0
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(common, "resource", fake)
    for platform, megabytes in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert common.peak_memory(cpu) == megabytes


# ---- what lies in folders ------------------------------------------------------------------------


def litter(folder, name):
    """What macOS, Windows, a notebook and a Synology leave beside a picture of this name."""
    for path in (f"._{name}", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / path).write_bytes(b"no picture")
    for path in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (folder / path).mkdir()
        (folder / path / name).write_bytes(b"no picture")


def test_litter_of_systems_is_skipped(own, main, capsys):
    for part in ("images", "masks", "unlabeled"):
        litter(own / part, "photo 0.png")
    main("--check-data")
    assert len(common.plan_predictions(own / "unlabeled", own / "out", "folder")) == 8
    assert "warning" not in capsys.readouterr().err


def test_litter_in_public_datasets_is_skipped(tmp_path):
    camvid = make_camvid(tmp_path / "camvid", lists=False)
    cityscapes = make_cityscapes(tmp_path / "cityscapes")
    counts = []
    for is_littered in (False, True):
        if is_littered:
            for folder in (camvid / "train", camvid / "trainannot", camvid / "val"):
                litter(folder, "0001TP_006720.png")
            for folder in ("train", "train/jena"):
                litter(cityscapes / "leftImg8bit" / folder, "jena_000078_000019_leftImg8bit.png")
        data = common.open_listed("camvid", camvid, None, tmp_path / "cache")
        city = common.open_cityscapes(cityscapes, None, tmp_path / "cache")
        counts.append([len(ids) for each in (data, city) for ids in (each.train, each.val)])
    assert counts[0] == counts[1]


# ---- masks that teach nothing --------------------------------------------------------------------


def masks_are(own, *values):
    """The masks of the four pictures hold these values, in turn."""
    for i in range(4):
        save(own / f"masks/photo {i}.png", np.resize(np.uint8(values), (60 + i, 90)))


@pytest.mark.parametrize("values, word", [((0,), "class 0"), ((255,), "255 (unknown)")])
def test_masks_of_one_class_are_refused(own, main, capsys, values, word):
    masks_are(own, *values)
    words = [f"{own}/masks: the masks of the labeled pictures hold only {word}", "label pixels"]
    with pytest.raises(common.UserError) as error:
        main("--iterations", "1")
    assert all(word in str(error.value) for word in words)
    with pytest.raises(common.UserError, match="named above"):
        main("--check-data")
    said = capsys.readouterr().out
    assert all(word in said for word in words)


def test_a_val_part_without_a_labeled_pixel_is_refused(own, main, capsys):
    save(own / "val_images/a.png", noise(1))
    save(own / "val_masks/a.png", np.full((60, 90), 255, np.uint8))
    words = f"{own}/val_masks: the masks of the val pictures hold only 255"
    with pytest.raises(common.UserError, match=words):
        main("--iterations", "1")
    with pytest.raises(common.UserError, match="named above: 1$"):
        main("--check-data")
    assert words in capsys.readouterr().out


def test_a_result_without_a_number_is_null(tmp_path, capsys):
    """As that of a public dataset whose val masks are unknown everywhere."""
    arguments = {"changed": []}
    (tmp_path / "args.json").write_text(json.dumps({"arguments": arguments}))
    miou = {"student": common.mean_iou(torch.zeros(2, 2, dtype=torch.int64))}
    result = {"method": "mkd", "dataset": "camvid", "labels": 46, "seed": 0, "paper": None}
    text = json.dumps(common.strict(result | {"miou": miou, "headline": "student"}))
    assert strict(text)["miou"] == {"student": None}
    (tmp_path / "result.json").write_text(text)
    results_table.results(tmp_path)
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize("classes", ["", "background\nobject\n"])
@pytest.mark.parametrize("quality", [75, 100])
def test_a_mask_that_was_a_jpeg_is_called_so(own, main, quality, classes):
    """Naming more classes would not help: its values are all gray values near 0 and 255."""
    if classes:
        (own / "classes.txt").write_text(classes)
    for i in range(4):
        path = own / f"masks/photo {i}.png"
        label = np.kron(noise(i, 6, 9, 1) > 127, np.ones((10, 10)))[:, :90] * 255
        label = np.pad(label, [(0, i), (0, 0)]).astype(np.uint8)
        save(own / "x.jpg", label, quality=quality)
        Image.open(own / "x.jpg").save(path)
    with pytest.raises(common.UserError, match=r"masks/photo .* was a JPEG.*mask > 127"):
        main("--iterations", "1")


def test_gray_values_are_called_so(own, main):
    masks_are(own, 0, 127, 255)
    with pytest.raises(common.UserError, match=r"\[127\] are outside .* gray values .* 0, 1, 2"):
        main("--iterations", "1")


def test_classes_of_many_ids_are_no_jpeg(own):
    masks_are(own, *range(0, 182, 2), 181, 255)
    assert len(common.open_folder(own, None, None).names) == 182


# ---- masks as labeling tools export them ---------------------------------------------------------

COLORS = {(0, 128, 0): 0, (250, 50, 83): 1, (51, 221, 255): 2}


def in_colors(own, colors=COLORS):
    """The four masks in colors, RGB or RGBA, and the class ids that they mean."""
    expected = {}
    for i in range(4):
        code = np.random.RandomState(i).randint(len(colors), size=(60 + i, 90))
        picture = Image.fromarray(np.array(list(colors), np.uint8)[code])
        picture.convert("RGBA" if i % 2 else "RGB").save(own / f"masks/photo {i}.png")
        expected[f"images/photo {i}"] = np.array(list(colors.values()))[code]
    return expected


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,128,0::\ncat:250,50,83:ear,eye:\n"
            "dog:51,221,255::\n",
        ),
        ("classes.txt", "background 0 128 0\ncat #fa3253\ndog 51, 221, 255\n"),
    ],
)
def test_masks_in_colors_are_read_by_the_list(own, main, tmp_path, name, text):
    """As CVAT exports them."""
    (own / name).write_text(text)
    expected = in_colors(own)
    for size in (None, (80,)):
        data = common.open_folder(own, size, tmp_path / "cache")
        assert data.names == ["background", "cat", "dog"]
        assert data.classes["cat"] == (250, 50, 83)
        if size is None:
            assert all(np.array_equal(data.label(id), label) for id, label in expected.items())
        else:
            assert set(np.unique(data.label("images/photo 0"))) == {0, 1, 2}
    main("--check-data")


def test_the_cache_of_masks_in_colors_belongs_to_the_list(own, tmp_path):
    in_colors(own)
    labels = []
    for first, second in (("a 0 128 0", "b 250 50 83"), ("b 250 50 83", "a 0 128 0")):
        text = f"{first}\n{second}\nc 51 221 255\n"
        (own / "classes.txt").write_text(text)
        labels.append(common.open_folder(own, (80,), tmp_path / "cache").label("images/photo 0"))
    assert np.array_equal(np.array([1, 0, 2])[labels[0]], labels[1])


def test_unknown_pixels_have_a_color_too(own):
    (own / "classes.txt").write_text("a 0 128 0\nb 250 50 83\n__ignore__ 51 221 255\n")
    expected = in_colors(own, COLORS | {(51, 221, 255): 255})
    data = common.open_folder(own, None, None)
    assert data.names == ["a", "b"]
    assert all(np.array_equal(data.label(id), label) for id, label in expected.items())


@pytest.mark.parametrize(
    "text, words",
    [
        ("a 0 128 0\nb 250 50 83\n", ["% of its pixels have the color 51 221 255", "add it"]),
        ("a 0 128 0\nb 51 221 255\nc 51 221 255\nd 250 50 83\n", ["color 51 221 255", "more"]),
        ("a\nb\nc\n", ["no colors of classes are known", "labelmap.txt"]),
        ("", ["no colors of classes are known", "classes.txt"]),
    ],
)
def test_a_color_that_is_no_class_is_named(own, main, text, words):
    if text:
        (own / "classes.txt").write_text(text)
    in_colors(own)
    with pytest.raises(common.UserError) as error:
        main("--iterations", "1")
    assert all(word in str(error.value) for word in ["masks/photo", *words])


def test_a_list_of_labelme_does_not_shift_the_names(own):
    """Its labels.txt begins with __ignore__, which is 255 in its masks, and no class."""
    (own / "classes.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    assert common.open_folder(own, None, None).names == ["_background_", "cat", "dog"]


def test_the_regions_of_label_studio_are_named_once(own, main, capsys):
    for i in range(4):
        (own / f"masks/photo {i}.png").unlink()
        for k in range(3):
            save(own / f"masks/task-{i}-annotation-{i}-by-1-tag-cat-{k}.png", mask(0))
    with pytest.raises(common.UserError):
        main("--check-data")
    assert capsys.readouterr().out.count("one of 12 masks that Label Studio wrote") == 1


# ---- a test set of one's own ---------------------------------------------------------------------


def val_line(capsys):
    """The line that says what was evaluated, and the numbers of mIoU."""
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if line.startswith("val   ")]
    (miou,) = [line.split()[1:] for line in lines if line.startswith("mIoU")]
    return said, miou


def test_evaluation_on_a_test_set(own, main, tmp_path, monkeypatch, capsys):
    main(*TRAIN)
    miou = strict((tmp_path / "run/result.json").read_text())["miou"]
    shutil.copytree(own, tmp_path / "copy")  # a copy on another computer
    sets = {name: tmp_path / name for name in ("images", "val_images")}
    for part, root in sets.items():
        for i in range(6):  # the last class is in no mask; a name can be that of a known picture
            save(root / part / f"photo {i}.png", noise(100 + i))
            masks = root / part.replace("images", "masks")
            save(masks / f"photo {i}.png", mask(i, classes=2))

    def evaluate(root):
        argv = ["rml.py", "--evaluate", "--data-root", str(root), "--checkpoint", "run"]
        monkeypatch.setattr(sys, "argv", argv)
        rml.main()
        return val_line(capsys)

    capsys.readouterr()
    for root in (own, tmp_path / "copy"):
        said, numbers = evaluate(root)
        assert "1 pictures" in said and "without 3 that the checkpoint learned from" in said
        assert numbers == [f"{value:.2f}" for value in miou.values()]
    results = [evaluate(root) for root in sets.values()]
    assert all("6 pictures" in said and "without" not in said for said, _ in results)
    assert results[0][1] == results[1][1]
    for path in (sets["images"] / "masks").iterdir():
        save(path, np.full((60, 90), 255, np.uint8))
    with pytest.raises(common.UserError, match="hold only 255"):
        evaluate(sets["images"])
    with pytest.raises(common.UserError, match="unlabeled: no picture with a mask to evaluate"):
        evaluate(own / "unlabeled")


def test_the_report_marks_classes_that_val_does_not_have(capsys):
    """Three stray pixels of such a class change mIoU from 100 to 67."""
    data = SimpleNamespace(names=["road", "sky", "unicorn"], val=["a"], name="folder")
    args = SimpleNamespace(scales=[1.0], flip=False)
    for stray, number in ((0, "100.00"), (3, "66.67")):
        table = torch.diag(torch.tensor([10**6, 10**6, 0]))
        table[0, 2] = stray
        common.report({"student": table}, "student", data, args)
        said = capsys.readouterr().out
        assert f"mIoU{number:>{len('unicorn *') + 2 - 4 + 13}}" in said
        assert "unicorn *" in said and "road *" not in said
        assert "makes its IoU 0" in said
    table = torch.diag(torch.tensor([1, 1, 1]))
    common.report({"student": table}, "student", data, args)
    assert "*" not in capsys.readouterr().out


# ---- files that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images/photo 0.png", "masks/photo 0.png", "classes.txt"])
def test_a_pipe_does_not_make_a_run_wait(own, main, name):
    (own / name).unlink(missing_ok=True)
    os.mkfifo(own / name)
    with pytest.raises(common.UserError, match=f"{name}: is "):
        main("--iterations", "1")
    with pytest.raises(common.UserError, match="named above"):
        main("--check-data")


def test_other_files_that_are_pipes_or_folders(own, main, tmp_path):
    for name in ("pipe.txt", "pipe.pkl", "pipe.pt"):
        os.mkfifo(tmp_path / name)
    for name in ("folder.txt", "folder.pkl"):
        (tmp_path / name).mkdir()
    for name in ("pipe.txt", "pipe.pkl", "folder.txt", "folder.pkl"):
        with pytest.raises(common.UserError, match=f"{name}: is a folder, a pipe"):
            main("--iterations", "1", "--split", tmp_path / name)
    for read in (common.load_torch, common.open_picture):
        with pytest.raises(common.UserError, match="pipe.pt: is a folder, a pipe"):
            read(tmp_path / "pipe.pt")
    os.mkfifo(own / "unlabeled/pipe.jpg")
    jobs = common.plan_predictions(own / "unlabeled", tmp_path / "out", "folder")
    assert "pipe.jpg" in {path.name for path, *_ in jobs}  # it is named among the unreadable ones


def test_lists_in_encodings_of_windows(own, tmp_path):
    data = common.open_folder(own, None, None)
    names = [id.removeprefix("images/") for id in data.train[:2]]
    path = tmp_path / "list.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("\n".join(names), encoding=encoding)  # with spaces in the names
        assert common.read_split([path], data)[0] == data.train[:2]
    for content in ("photo 0".encode("utf-16-le"), b"ph\xf6to 0"):
        path.write_bytes(content)
        with pytest.raises(common.UserError, match="list.txt: cannot be read .* saved as UTF-8"):
            common.read_split([path], data)


def test_a_name_that_is_not_in_utf8_is_named(own, main):
    os.rename(own / "unlabeled/photo 4.png", os.fsencode(own / "unlabeled") + b"/ph\xf6.png")
    words = r"ph\\udcf6.png': its name is not in UTF-8"
    with pytest.raises(common.UserError, match=words) as error:
        main("--iterations", "1")
    str(error.value).encode()  # can be printed


def test_a_spoiled_cache_is_made_again(own, tmp_path):
    save(own / "images/photo 0.png", noise(0, 120, 200))
    save(own / "masks/photo 0.png", mask(0, 120, 200))
    data = common.open_folder(own, (100,), tmp_path / "cache")
    read = (data.image, data.label)
    expected = [load("images/photo 0") for load in read]
    for spoiled in (noise(1, 60, 100), noise(1, 60, 100, 1), noise(1, 30, 100), noise(1, 9, 9, 1)):
        for path in (tmp_path / "cache").rglob("*.png"):
            save(path, spoiled)
        for load, array in zip(read, expected):
            if load == data.image and spoiled.shape == array.shape:
                continue  # no one can tell
            assert np.array_equal(load("images/photo 0"), array)


def test_a_picture_of_one_row_is_predicted_at_a_sane_size():
    for picture in (Image.new("RGB", (20000, 1)), Image.new("RGB", (1, 20000))):
        for size, base_size in (((64, 128), 0), ((640,), 0), (None, 0), ((64, 128), 2048)):
            height, width = common.shown_size(size, base_size, picture)
            assert height * width <= 8 * 20000
    assert common.shown_size((64, 128), 0, Image.new("RGB", (400, 100))) == (64, 256)
    cell = torch.zeros(3, 20000, 1, dtype=torch.uint8)
    assert np.prod(common.draw_cell(cell, noise(0, 1, 3)[0]).size) < 10**6


def predict_with_pointwise(folder, out):
    state = {"classes": {"a": (0, 0, 0), "b": (9, 9, 9)}, "dataset": "folder"}
    args = SimpleNamespace(predict=folder, out=out, size=(640,), base_size=0)
    args.__dict__.update(scales=[1.0], flip=False, precision="fp32", crop=(64, 64))
    common.predict_pictures(Pointwise(), state, args, torch.device("cpu"))


def test_a_picture_of_one_column_is_predicted(tmp_path):
    """Its row in overview.jpg has no million pixels either."""
    save(tmp_path / "thin/a.png", noise(0, 20000, 1))
    save(tmp_path / "thin/b.png", noise(0, 1, 20000))
    predict_with_pointwise(tmp_path / "thin", tmp_path / "out")
    assert Image.open(tmp_path / "out/b.png").size == (20000, 1)
    assert np.prod(Image.open(tmp_path / "out/overview.jpg").size) < 10**7


def test_a_picture_whose_name_is_not_in_utf8_is_predicted(tmp_path, capsys):
    save(tmp_path / "photos/a.png", noise(0))
    os.rename(tmp_path / "photos/a.png", os.fsencode(tmp_path / "photos") + b"/ph\xf6.png")
    predict_with_pointwise(tmp_path / "photos", tmp_path / "out")
    capsys.readouterr().out.encode()  # can be printed
    assert os.path.exists(os.fsencode(tmp_path / "out") + b"/ph\xf6_overlay.png")


# ---- tests/figure_methods.py ---------------------------------------------------------------------


def test_a_street_as_each_method_sees_it(tmp_path, monkeypatch):
    import figure_methods

    columns = figure_methods.views()
    (image, truth), *methods = columns.values()
    assert len(methods) == 5
    for view, label in methods:
        assert view.shape == image.shape == (3, 64, 128) and view.dtype == torch.uint8
        assert label.shape == truth.shape
        assert (view != image).float().mean() > 0.2
    monkeypatch.setattr(sys, "argv", ["figure_methods.py", "--out", str(tmp_path / "a.png")])
    figure_methods.main()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 6 * 260
