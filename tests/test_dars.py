"""The equations of DARS against naive loops, its networks, windows and tables by content."""

import json
import math
import shutil
import sys
from collections import defaultdict
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import dars
from helpers import at_pixels, head_parameters
import figure_dars

K = 5
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")
VALUES = np.arange(dars.CODES, dtype=np.uint16).view(np.float16).astype(float)  # of each code


# ---- pseudo-labels: Eqs. 3, 4 and Algorithm 1 ----------------------------------------------------


def naive_dars(pictures, labels, alpha, method):
    """From the paper: sort all pixels' confidences.

    pictures: [(label (H, W), code (H, W)), ..]; labels: labeled pixels by class. Returns for each
    class the threshold (a confidence; None: there is none), pixels kept by it and pixels wanted;
    and for each picture the initial pseudo-label of line 3, as a nested list.
    """
    pixels = [
        (int(j), float(VALUES[c]))
        for label, code in pictures
        for j, c in zip(label.ravel(), code.ravel())
    ]
    threshold = [None] * K
    kept = [0] * K
    wanted = [0] * K
    share = Fraction(str(alpha))  # exact: .2 is a fifth
    for j in range(K):
        confidences = sorted((p for k, p in pixels if k == j or method == "st"), reverse=True)
        if method == "st":
            n = math.floor(share * len(pixels))
        elif method == "cbst":
            n = math.floor(share * len(confidences))
        else:
            n = math.floor(share * len(pixels) * Fraction(labels[j], max(1, sum(labels))))  # Eq. 4
        if n > 0 and confidences:
            place = min(n, len(confidences)) - 1
            threshold[j] = confidences[place]  # the n-th in descending order, Eq. 3
            kept[j] = sum(k == j and p >= threshold[j] for k, p in pixels)
        wanted[j] = min(n, kept[j]) if method == "dars" else kept[j]
    initial = [
        [
            [
                int(j) if threshold[j] is not None and VALUES[c] >= threshold[j] else 255
                for j, c in zip(*rows)
            ]
            for rows in zip(label, code)
        ]
        for label, code in pictures
    ]
    return threshold, kept, wanted, initial


def table_of(pictures):
    table = torch.zeros(K, dars.CODES, dtype=torch.int64)
    for label, code in pictures:
        for j, c in zip(label.ravel().tolist(), code.ravel().tolist()):
            table[j, c] += 1
    return table


def draw(seed, codes, p=(0.5, 0.3, 0.15, 0.04, 0.01), sizes=((9, 11), (6, 7), (10, 5))):
    """Pictures with classes drawn with probabilities p and confidence codes from the list codes."""
    r = np.random.RandomState(seed)
    return [
        (r.choice(K, size, p=p).astype(np.uint8), r.choice(codes, size).astype(np.int16))
        for size in sizes
    ]


HIGH = np.arange(13_000, dars.CODES)
EVEN = [100, 100, 100, 100, 100]
CASES = {  # pictures, labeled pixels by class, alpha
    "random": (draw(0, HIGH), [400, 300, 200, 70, 30], 0.5),
    "ties": (draw(1, [14_000, 15_000, 15_360]), [400, 300, 200, 70, 30], 0.4),
    "one confidence": (draw(2, [15_360]), [10, 70, 10, 5, 5], 0.3),
    "lowest and highest code": (draw(3, [0, 15_360]), EVEN, 0.6),
    "a class never predicted": (draw(4, HIGH, p=(0.6, 0.4, 0, 0, 0)), EVEN, 0.5),
    "a class without labels": (draw(5, HIGH), [500, 0, 300, 200, 0], 0.5),
    "fewer pixels than n_j": (draw(6, HIGH, p=(0.96, 0.01, 0.01, 0.01, 0.01)), EVEN, 0.9),
    "all pixels one class": (draw(7, HIGH[:50], p=(0, 0, 1, 0, 0)), EVEN, 0.5),
    "all of one class that has no labels": (draw(8, HIGH, p=(0, 0, 1, 0, 0)), [1, 1, 0, 1, 1], 0.5),
    "alpha 1": (draw(9, HIGH), [400, 300, 200, 70, 30], 1.0),
    "alpha 1 with ties": (draw(10, [14_000, 15_360]), [400, 300, 200, 70, 30], 1.0),
    "n_j below 1": (draw(11, HIGH), [10_000, 1, 1, 1, 1], 0.1),
    "a single pixel": (draw(12, HIGH, sizes=((1, 1),)), EVEN, 1.0),
    "a single pixel of a class with all labels": (
        [(np.uint8([[3]]), np.int16([[15_000]]))],
        [0, 0, 0, 9, 0],
        1.0,
    ),
    "no labels at all": (draw(13, HIGH), [0, 0, 0, 0, 0], 0.5),
}


@pytest.mark.parametrize("method", dars.METHODS)
@pytest.mark.parametrize("case", CASES)
def test_eqs_3_and_4_and_algorithm_1_are_those_of_a_full_sort(case, method):
    pictures, labels, alpha = CASES[case]
    threshold, kept, wanted = dars.align(table_of(pictures), torch.tensor(labels), alpha, method)
    t, n_kept, n_wanted, initial = naive_dars(pictures, labels, alpha, method)
    assert kept.tolist() == n_kept and wanted.tolist() == n_wanted
    predicted = [sum((label == j).sum() for label, _ in pictures) for j in range(K)]
    for j in range(K):
        # Where all are kept any threshold below the lowest will do.
        if n_kept[j] and (n_kept[j] < predicted[j] or threshold[j] > 0):
            assert VALUES[threshold[j]] == t[j]
    for number, ((label, code), kept_pixels) in enumerate(zip(pictures, initial)):
        before = dars.select(
            label, code, threshold.numpy(), kept.numpy(), kept.numpy(), common.rng("none", number)
        )
        assert before.tolist() == kept_pixels  # line 3
        after = dars.select(
            label, code, *(x.numpy() for x in (threshold, kept, wanted)), common.rng("test", number)
        )
        assert after.dtype == np.uint8 and ((after == before) | (after == 255)).all()
        for j in range(K):  # lines 5, 6
            n, left = int((before == j).sum()), int((after == j).sum())
            s = min(1, Fraction(n_wanted[j], n_kept[j])) if n_kept[j] else 1
            assert n - left == int(n - n * s) and 0 <= left - n * s < 1
            assert method == "dars" or left == n


def test_distinct_confidences_give_exactly_the_wanted_numbers():
    """Then nothing is left to sample, and DA is DARS."""
    r = np.random.RandomState(0)
    codes = r.permutation(dars.CODES)[: 3 * 40 * 50].reshape(3, 40, 50).astype(np.int16)
    pictures = [
        (r.choice(K, (40, 50), p=[0.4, 0.3, 0.15, 0.1, 0.05]).astype(np.uint8), code)
        for code in codes
    ]
    labels, alpha = [350, 350, 150, 100, 50], 0.6
    n = [math.floor(alpha * 6000 * x / 1000) for x in labels]
    for method in ("da", "dars"):
        chosen = dars.align(table_of(pictures), torch.tensor(labels), alpha, method)
        counts = np.zeros(256, int)
        for i, picture in enumerate(pictures):
            counts += np.bincount(
                dars.select(*picture, *(x.numpy() for x in chosen), common.rng(i)).ravel(),
                minlength=256,
            )
        assert counts[:K].tolist() == n == chosen[2].tolist()
        assert dars.divergence(
            dars.distribution(torch.tensor(labels)), dars.distribution(torch.tensor(counts[:K]))
        ) == pytest.approx(0, abs=1e-6)


# 29 / 100 as a float, times 100, is less than 29.
@pytest.mark.parametrize("labels", [[29, 71], [58, 42], [7, 93], [1, 2], [57, 43]], ids=str)
@pytest.mark.parametrize(
    "alpha, n", [(1.0, 100), (0.5, 200), (0.2, 500), (0.6, 700), (0.65, 300), (0.9, 1000)]
)
def test_numbers_of_pixels_are_exact(labels, alpha, n):
    """Of many distinct confidences n_j and, for ST, n are met to the pixel."""
    table = torch.zeros(2, dars.CODES, dtype=torch.int64)
    table[0, 2000 : 2000 + 2 * n : 2] = table[1, 2001 : 2001 + 2 * n : 2] = 1
    wanted = [math.floor(Fraction(str(alpha)) * 2 * n * Fraction(x, sum(labels))) for x in labels]
    for method in ("da", "dars"):
        assert dars.align(table, torch.tensor(labels), alpha, method)[2].tolist() == [
            min(x, n) for x in wanted
        ]
    threshold, kept, _ = dars.align(table, torch.tensor(labels), alpha, "st")
    assert (
        int(kept.sum()) == math.floor(Fraction(str(alpha)) * 2 * n)
        and len(set(threshold.tolist())) == 1
    )


def test_29_of_100():
    table = torch.zeros(2, dars.CODES, dtype=torch.int64)
    table[0, 5000:5050] = table[1, 5000:5050] = 1
    assert dars.align(table, torch.tensor([29, 71]), 1.0, "dars")[2].tolist() == [29, 50]


def test_a_pictures_share_that_is_whole_is_dropped_to_the_pixel():
    """49 pixels at s_j = 1 / 49: as floats, 49 (1 - 1 / 49) is less than 48."""
    for n, kept, wanted in (
        (49, 49, 1),
        (10, 100, 29),
        (100, 100, 42),
        (7, 70, 43),
        (1000, 10**9, 10**9 - 1),
        (3, 3 * 10**17, 10**17),
    ):
        label, code = np.zeros((1, n), np.uint8), np.full((1, n), 15_360, np.int16)
        result = dars.select(
            label, code, np.array([1]), np.array([kept]), np.array([wanted]), common.rng(0)
        )
        assert (result == 255).sum() == math.floor(n * (1 - Fraction(wanted, kept)))


def test_the_methods_differ_as_table_4_says():
    pictures, labels = draw(0, HIGH), torch.tensor([200, 200, 200, 200, 200])
    table, predicted = table_of(pictures), table_of(pictures).sum(1)
    st, cbst, da = (dars.align(table, labels, 0.4, method) for method in ("st", "cbst", "da"))
    assert len(set(st[0].tolist())) == 1  # one threshold for all
    n = math.floor(0.4 * int(predicted.sum()))
    assert n <= int(st[1].sum()) < n + int(table.sum(0).max())  # at the same alpha
    share = cbst[1] / predicted
    assert (
        (share - 0.4).abs() < (table.max(1).values + 1) / predicted
    ).all()  # the same share of each
    assert len(set(cbst[0].tolist())) > 1 and (da[0] != cbst[0]).any()
    for method in (st, cbst, da):
        assert torch.equal(method[1], method[2])  # no sampling


def test_one_threshold_of_nothing_wanted_keeps_nothing():
    pictures = [(np.zeros((3, 3), np.uint8), np.full((3, 3), 15_360, np.int16))]
    # A tenth of nine pixels is wanted.
    threshold, kept, wanted = dars.align(table_of(pictures), torch.tensor(EVEN), 0.1, "st")
    assert threshold.tolist() == [dars.CODES] * K and kept.tolist() == wanted.tolist() == [0] * K
    assert (
        dars.select(*pictures[0], *(x.numpy() for x in (threshold, kept, wanted)), common.rng(0))
        == 255
    ).all()
    # One pixel is wanted; eight others have the same confidence.
    threshold, kept, wanted = dars.align(table_of(pictures), torch.tensor(EVEN), 0.12, "st")
    assert threshold.tolist() == [15_360, *[dars.CODES] * 4]
    assert kept.tolist() == wanted.tolist() == [9, 0, 0, 0, 0]


def test_the_input_of_align_and_select_is_left_alone():
    pictures, labels, alpha = CASES["ties"]
    table = table_of(pictures)
    chosen = [x.numpy() for x in dars.align(table, torch.tensor(labels), alpha, "dars")]
    before = [[x.copy() for x in (*pictures[0], *chosen)], table_of(pictures)]
    dars.select(*pictures[0], *chosen, common.rng(0))
    assert all(map(np.array_equal, before[0], [*pictures[0], *chosen])) and torch.equal(
        before[1], table
    )


def test_sampling_is_uniform_over_all_kept_pixels():
    """Also over those of high confidence, not only over those at the threshold."""
    label, code = np.zeros((8, 10), np.uint8), np.full((8, 10), 15_000, np.int16)
    code[:, 5:] = 15_360  # half is sure
    label[0] = 1  # a row of another class
    code[1] = 14_000  # a row that is not kept
    kept, wanted = np.array([60, 10]), np.array([15, 10])
    stays, tries = np.zeros((8, 10)), 1200
    for seed in range(tries):
        result = dars.select(
            label, code, np.array([15_000, 0]), kept, wanted, common.rng("seed", seed)
        )
        assert (result[0] == 1).all() and (result[1] == 255).all() and (result[2:] == 0).sum() == 15
        stays += result == 0
    stays = stays[2:]
    expected = tries * 15 / 60
    chi_square = ((stays - expected) ** 2).sum() / (expected * (1 - 15 / 60)) * 59 / 60
    assert 59 - 4 * math.sqrt(2 * 59) < chi_square < 59 + 4 * math.sqrt(2 * 59)
    assert stays[:, :5].mean() == pytest.approx(stays[:, 5:].mean(), rel=0.05)


# ---- pseudo-labels: all of make_pseudo_labels() --------------------------------------------------


class StubData:
    """Pictures whose color says their number; the truth is class 0."""

    names, colors = list("abcde"), np.arange(15, dtype=np.uint8).reshape(5, 3) * 16
    files = defaultdict(lambda: ("picture", "mask"))

    def image(self, id):
        return np.full((6, 7, 3), int(id.split("_")[1]), np.uint8)

    def label(self, id, full_size=False):
        return np.zeros((6, 7), np.uint8)


def stub_args(**values):
    return SimpleNamespace(
        **dict(
            pseudo="dars",
            confidence="fp16",
            seed=0,
            temperature=1.0,
            flip=False,
            scales=[1.0],
            base_size=0,
            precision="fp32",
        )
        | values
    )


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make(pictures, labels, alpha, folder=.., number=1, **args): make_pseudo_labels() on given
    predictions; returns the report and {id: pseudo-label}."""

    def run(pictures, labels, alpha, folder="run", number=1, data=StubData(), **args):
        def predict(teacher, image, args):
            return tuple(map(torch.from_numpy, pictures[int(image[0, 0, 0])]))

        monkeypatch.setattr(dars, "predict_picture", predict)
        ids = [f"city/x_{i}" for i in range(len(pictures))]
        place = SimpleNamespace(folder=tmp_path / folder, device=CPU, claim=lambda _: None)
        place.write_json = partial(common.Run.write_json, place)
        made = place.folder / "pseudo_labels" / f"round_{number}"
        labels = torch.tensor(labels)
        teacher = torch.nn.Identity()
        args = stub_args(**args)
        dars.make_pseudo_labels(made, teacher, data, ids, labels, alpha, number, place, args)
        shutil.rmtree(place.folder / "predictions", ignore_errors=True)  # as train() does
        report = json.loads((made / "report.json").read_text(), parse_constant=pytest.fail)
        return report, {id: common.read_pseudo_label(made, id) for id in ids}

    return run


@pytest.mark.parametrize("method", dars.METHODS)
def test_pseudo_labels_of_whole_pictures(make, tmp_path, method, capsys):
    pictures = draw(1, [14_000, 15_000, 15_360], sizes=[(6, 7)] * 4)
    labels = [400, 300, 200, 70, 30]
    alpha = 0.4
    report, result = make(pictures, labels, alpha, pseudo=method)
    t, kept, wanted, initial = naive_dars(pictures, labels, alpha, method)
    assert (
        report["kept"] == kept
        and report["wanted"] == wanted
        and report["pixels"] == 4 * 42
        and report["alpha"] == alpha
    )
    counts = np.zeros(K, int)
    for (id, label), before in zip(result.items(), initial):
        assert ((label == before) | (label == 255)).all()
        for j in range(K):
            n = int((np.array(before) == j).sum())
            assert (label == j).sum() == n - int(
                n - n * (Fraction(wanted[j], kept[j]) if kept[j] else 1)
            )
            counts[j] += (label == j).sum()
    assert report["share"] == pytest.approx((counts / counts.sum()).tolist()) and report[
        "coverage"
    ] == pytest.approx(counts.sum() / 168)
    assert report["labeled_share"] == pytest.approx([0.4, 0.3, 0.2, 0.07, 0.03])
    assert report["predicted_share"] == pytest.approx(
        [sum((label == j).sum() for label, _ in pictures) / 168 for j in range(K)]
    )
    for j in range(K):
        if 0 < kept[j] < sum((label == j).sum() for label, _ in pictures):
            assert report["threshold"][j] == t[j]
    for other in dars.METHODS:
        n = naive_dars(pictures, labels, alpha, other)[2]
        assert report["expected"][other]["share"] == pytest.approx(
            [x / sum(n) for x in n]
        ) and report["expected"][other]["coverage"] == pytest.approx(sum(n) / 168)
    # The truth is class 0 everywhere; what is ignored counts in no prediction.
    assert report["pseudo_miou"] == pytest.approx(
        100 * counts[0] / counts.sum() / (counts > 0).sum()
    )
    picture = Image.open(tmp_path / "run/pseudo_labels/round_1/city/x_0.png")
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    assert (
        picture.mode == "P"
        and np.array_equal(palette[:K], StubData.colors)
        and palette[255].tolist() == [255, 255, 255]
    )


def test_sampling_is_seeded_by_picture_and_round(make, tmp_path, capsys):
    same = (np.zeros((6, 7), np.uint8), np.full((6, 7), 15_360, np.int16))
    pictures, labels = [same] * 3, [1, 0, 0, 0, 0]
    _, first = make(pictures, labels, 0.5, "one")
    _, again = make(pictures, labels, 0.5, "two")
    assert all(np.array_equal(first[id], again[id]) for id in first)  # the same on repetition
    a, b, c = first.values()
    assert (
        all((x == 0).sum() == 21 for x in (a, b, c)) and (a != b).any() and (b != c).any()
    )  # another in every picture
    _, round_2 = make(pictures, labels, 0.5, "one", number=2)
    _, seed_1 = make(pictures, labels, 0.5, "three", seed=1)
    assert all((first[id] != other[id]).any() for id in first for other in (round_2, seed_1))


def test_what_is_there_is_not_made_again_and_what_is_lacking_is(
    make, tmp_path, monkeypatch, capsys
):
    pictures, labels, alpha = draw(1, [14_000, 15_360], sizes=[(6, 7)] * 3), EVEN, 0.4
    report, _ = make(pictures, labels, alpha)
    folder = tmp_path / "run/pseudo_labels/round_1"

    def files():
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}

    before = files()
    assert sorted(before) == [*(f"city/x_{i}.png" for i in range(3)), "report.json"]
    (folder / "city/x_1.png").unlink()
    repeated, _ = make(pictures, labels, alpha)
    assert repeated == report and files() == before
    calls, real = [], common.write_atomically
    monkeypatch.setattr(
        common, "write_atomically", lambda path, write: (calls.append(path), real(path, write))
    )
    repeated, _ = make(pictures, labels, alpha)
    assert repeated == report and not calls
    make(pictures, labels, alpha, number=2)
    assert len(calls) == 3 + 3 + 1  # drafts, pseudo-labels and the report


def write_draft(folder, id, label, code):
    common.write_file(folder / f"{id}.npz", partial(np.savez, label=label, code=code))


def test_predictions_on_disk_are_read_as_they_were_written(make, tmp_path, monkeypatch, capsys):
    """An interrupted pass goes on after the last picture that it wrote."""
    pictures, labels, alpha = draw(1, [14_000, 15_360], sizes=[(6, 7)] * 3), EVEN, 0.4
    expected, result = make(pictures, labels, alpha, "clean")
    drafts = tmp_path / "run/predictions/round_1"
    for i in (0, 1):
        write_draft(drafts, f"city/x_{i}", *pictures[i])
    for before, after in zip(pictures[0], dars.read_draft(drafts, "city/x_0")):
        assert np.array_equal(before, after) and before.dtype == after.dtype
    written, real = [], common.write_file
    monkeypatch.setattr(
        common, "write_file", lambda path, write: (written.append(path.name), real(path, write))
    )
    report, again = make(pictures, labels, alpha)
    assert [name for name in written if name.endswith("npz")] == ["x_2.npz"]
    assert report == expected and all(np.array_equal(result[id], again[id]) for id in result)


def test_a_report_goes_before_its_pseudo_labels_are_made_again(make, tmp_path, monkeypatch, capsys):
    """Else a kill in between would leave a report beside labels of two makings."""
    pictures = draw(1, [14_000, 15_360], sizes=[(6, 7)] * 3)
    make(pictures, EVEN, 0.4)
    folder, seen, real = tmp_path / "run/pseudo_labels/round_1", [], dars.read_draft
    (folder / "city/x_1.png").unlink()
    monkeypatch.setattr(
        dars,
        "read_draft",
        lambda *draft: seen.append((folder / "report.json").exists()) or real(*draft),
    )
    make(pictures, EVEN, 0.4)
    assert seen == [False] * 6 and (folder / "report.json").exists()


def test_a_pseudo_label_of_another_size_is_refused_by_name(tmp_path):
    args = SimpleNamespace(seed=0, crop=(4, 4), scale=(1.0, 1.0))
    stream = common.Stream(StubData(), ["city/x_0"], "unlabeled", args, pseudo_labels=tmp_path)
    common.write_pseudo_label(tmp_path, "city/x_0", np.zeros((6, 7), np.uint8), StubData.colors)
    assert stream[0]["label"].shape == (4, 4)
    common.write_pseudo_label(tmp_path, "city/x_0", np.zeros((6, 8), np.uint8), StubData.colors)
    with pytest.raises(
        common.UserError, match=r"city/x_0\.png: is 8x6, its picture 7x6; delete it"
    ):
        stream[0]


def test_a_class_that_is_never_predicted_is_named_and_has_no_threshold(make, capsys):
    report, result = make(draw(0, HIGH, p=(0.6, 0.4, 0, 0, 0), sizes=[(6, 7)] * 2), EVEN, 0.5)
    assert "no pseudo-label has c, d, e" in capsys.readouterr().err
    assert report["d_kl"] is None and not {2, 3, 4} & set(np.unique(list(result.values())))
    assert report["threshold"][2:] == [None] * 3


def test_the_report_is_json_where_no_truth_is_known(make, capsys):
    class Unknown(StubData):
        def label(self, id, full_size=False):
            return np.full((6, 7), 255, np.uint8)

    report, _ = make(draw(0, HIGH, sizes=[(6, 7)] * 2), EVEN, 0.5, data=Unknown())
    assert report["pseudo_miou"] is None


def test_labeled_pixels_and_pictures_are_counted_without_ignored_ones():
    class Data(StubData):
        def label(self, id):
            return np.array([[0, 0, 255], [4, int(id), 255]], np.uint8)

    assert dars.count_pixels(Data(), ["1", "2"], CPU).tolist() == [4, 1, 1, 0, 2]
    assert dars.count_pixels(Data(), ["4", "4", "0"], CPU).tolist() == [7, 0, 0, 0, 5]
    assert figure_dars.count_pictures(Data(), ["1", "2"]).tolist() == [2, 1, 1, 0, 2]
    assert figure_dars.count_pictures(Data(), ["4", "4", "0"]).tolist() == [3, 0, 0, 0, 3]


# ---- confidence ----------------------------------------------------------------------------------


class Answer(torch.nn.Module):
    """A network that answers any picture with the same logits (1, K, H, W)."""

    stride, align_corners = 1, True

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits


def predicted(logits, **args):
    """Class and code for pixels with logits (K, n)."""
    image = torch.zeros(3, 1, logits.shape[1], dtype=torch.uint8)
    label, code = dars.predict_picture(Answer(logits[None, :, None]), image, stub_args(**args))
    assert (
        label.dtype == torch.uint8
        and code.dtype == torch.int16
        and code.min() >= 0
        and code.max() <= 15_360
    )
    return label[0], code[0]


def gap_logits(gaps):
    """Two classes and a third far below: the first leads by gap."""
    gaps = torch.as_tensor(gaps, dtype=torch.float32)
    return torch.stack([gaps, torch.zeros_like(gaps), torch.full_like(gaps, -200.0)])


@pytest.mark.parametrize("temperature", [1.0, 1.27])
def test_the_code_is_the_16_bit_float_of_the_highest_probability(temperature):
    logits = torch.randn(19, 4000) * torch.linspace(0.1, 6, 4000)
    label, code = predicted(logits, temperature=temperature)
    p = (logits.double() / temperature).softmax(0)
    expected = p.max(0).values.half().view(torch.int16)
    assert torch.equal(label.long(), p.argmax(0))
    assert (code - expected).abs().max() <= 1 and (
        code == expected
    ).float().mean() > 0.995  # a last bit, where it rounds
    assert (
        np.abs(np.array(dars.confidence_values(stub_args()))[code] - p.max(0).values.numpy()) < 5e-4
    ).all()


def test_codes_at_the_ends():
    logits = torch.stack([torch.zeros(19), torch.eye(19)[3] * 1e4, torch.eye(19)[18] * 80]).T
    label, code = predicted(logits)
    assert label.tolist()[1:] == [3, 18] and code.tolist()[1:] == [15_360, 15_360]
    assert VALUES[code[0]] == pytest.approx(1 / 19, rel=1e-3)
    label, code = predicted(logits, confidence="fine")
    assert code.tolist()[1:] == [15_360, 15_360] and dars.confidence_values(
        stub_args(confidence="fine")
    )[code[0]] == pytest.approx(1 / 19, rel=1e-2)


def test_fine_confidences_separate_what_16_bits_do_not():
    logits = gap_logits([-math.log(q / (1 - q)) for q in (1e-5, 1e-6)])
    assert predicted(logits)[1].tolist() == [15_360, 15_360]
    code = predicted(logits, confidence="fine")[1].tolist()
    assert code[0] < code[1]
    fine = dars.confidence_values(stub_args(confidence="fine"))
    assert [1 - fine[c] for c in code] == [
        pytest.approx(1e-5, rel=0.01),
        pytest.approx(1e-6, rel=0.05),
    ]


@pytest.mark.parametrize("confidence", ["fp16", "fine"])
def test_a_higher_probability_never_has_a_lower_code(confidence):
    label, code = predicted(gap_logits(torch.linspace(0, 20, 5000)), confidence=confidence)
    assert (code.diff() >= 0).all() and (label == 0)[1:].all()
    assert len(code.unique()) > (3000 if confidence == "fine" else 700)
    assert (
        np.diff(dars.confidence_values(stub_args(confidence=confidence))) > 0
    ).all()  # a larger code is a larger confidence
    label, _ = predicted(gap_logits(-torch.linspace(0.01, 20, 100)), confidence=confidence)
    assert (label == 1).all()


def test_temperature_changes_confidences_and_no_class():
    logits = torch.randn(19, 500) * 3
    (label, code), (hot_label, hot_code) = predicted(logits), predicted(logits, temperature=1.27)
    assert (
        torch.equal(label, hot_label)
        and (hot_code <= code).all()
        and (hot_code < code).float().mean() > 0.9
    )


def test_confidence_values():
    one, fine = (dars.confidence_values(stub_args(confidence=name)) for name in ("fp16", "fine"))
    assert len(one) == len(fine) == dars.CODES and all(
        type(x) is float for x in one + fine
    )  # JSON has no other
    assert [one[c] for c in (0, 0x3800, 15_360)] == [0, 0.5, 1]
    assert one[15_359] == 1 - 2**-11  # what lies above 1 - 2^-12 becomes 1
    assert [fine[c] for c in (0, 15_360 - 0x3800, 15_360)] == [0, 0.5, 1]
    assert fine[15_359] == 1 - 2**-24


@pytest.mark.parametrize("confidence", ["fp16", "fine"])
def test_histograms_sum_to_100_percent(confidence):
    args, r = stub_args(confidence=confidence), np.random.RandomState(0)
    table = torch.zeros(K, dars.CODES, dtype=torch.int64)
    codes = r.randint(0, dars.CODES, 500)
    np.add.at(table[2].numpy(), codes, 1)
    table[3, 15_360] = 7
    ranges, series = figure_dars.histograms(table, [2, 3, 4], list("abcde"), args)
    assert (
        len(ranges) == 21
        and list(series) == list("cde")
        and all(len(values) == 21 for values in series.values())
    )
    assert (
        sum(series["c"]) == pytest.approx(100)
        and series["d"] == [0] * 20 + [100]
        and series["e"] == [0] * 21
    )
    naive = [0] * 21
    for code in codes:
        p = float(VALUES[code]) if confidence == "fp16" else 1 - float(VALUES[15_360 - code])
        naive[20 if p == 1 else int(p * 20)] += 100 / 500
    assert series["c"] == pytest.approx(naive)


def test_distribution_and_divergence():
    a, b = torch.tensor([5, 0, 20, 75]), torch.tensor([10, 30, 20, 40])
    assert (
        dars.distribution(a).tolist() == [0.05, 0, 0.2, 0.75]
        and dars.distribution(torch.zeros(4, dtype=torch.int64)).tolist() == [0] * 4
    )
    naive = sum(
        p * math.log(p / q) for p, q in zip([0.05, 0, 0.2, 0.75], [0.1, 0.3, 0.2, 0.4]) if p
    )
    assert dars.divergence(dars.distribution(a), dars.distribution(b)) == pytest.approx(naive)
    assert dars.divergence(dars.distribution(a), dars.distribution(a)) == 0
    missing = dars.distribution(a)  # a class of b without a pseudo-label
    assert dars.divergence(dars.distribution(b), missing) == math.inf
    nothing = dars.distribution(torch.zeros(4, dtype=torch.int64))
    assert dars.divergence(dars.distribution(a), nothing) == math.inf


# ---- windows -------------------------------------------------------------------------------------


def window_starts(length, window):
    """Where windows begin along a side, as slide() walks."""
    step = -(-2 * window // 3)
    places = common.windows((length, 1), (window, 1), (step, 1))
    return [bottom - window for *_, bottom, _ in places]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 32, 90, 361, 713])
def test_windows_start_two_thirds_of_a_window_apart(window):
    step = -(-2 * window // 3)
    for length in [*range(window, 3 * window + 3)][:: max(1, window // 30)] + [1024, 2048]:
        if length < window:
            continue
        expected, start = [], 0
        while start + window < length:
            expected.append(start)
            start += step
        expected.append(length - window)  # clamped to the edge
        assert window_starts(length, window) == expected
        assert len(set(expected)) == len(expected)
        assert set(range(length)) == {y for start in expected for y in range(start, start + window)}


def test_the_papers_windows():
    assert window_starts(512, 361) == [0, 151] and window_starts(1024, 361) == [
        0,
        241,
        482,
        663,
    ]
    assert window_starts(1024, 713) == [0, 311] and window_starts(2048, 713) == [
        0,
        476,
        952,
        1335,
    ]


def ramp_look(seen):
    """An answer that depends on what a window shows and on the place within it."""

    def look(x, size):
        seen.append(x.clone())
        ramp = torch.arange(size[0] * size[1], dtype=torch.float32).view(size)
        return torch.stack([x.sum(1) * 3 + ramp, x[:, 0] - ramp / 7], 1)

    return look


@pytest.mark.parametrize("size", [(10, 17), (6, 9), (6, 20), (7, 9)])
def test_slide_is_the_mean_over_the_windows_that_cover_a_pixel(size):
    image, (h, w) = torch.rand(1, 3, *size), (6, 9)
    result = common.slide(ramp_look([]), image, (h, w))
    total, count = torch.zeros(2, *size), torch.zeros(size)
    for top in window_starts(size[0], h):
        for left in window_starts(size[1], w):
            for y in range(h):
                for x in range(w):
                    pixel = image[0, :, top + y, left + x]
                    total[0, top + y, left + x] += 3 * pixel.sum() + y * w + x
                    total[1, top + y, left + x] += pixel[0] - (y * w + x) / 7
                    count[top + y, left + x] += 1
    assert (
        result.shape == (1, 2, *size)
        and torch.allclose(result[0], total / count, atol=1e-4)
        and (size != (10, 17) or count.max() == 6)
    )


@pytest.mark.parametrize("size", [(4, 5), (4, 20), (10, 5)])
def test_slide_pads_a_small_picture_with_the_mean_color(size):
    image, seen = torch.rand(1, 3, *size), []
    result = common.slide(ramp_look(seen), image, (6, 9))
    assert result.shape == (1, 2, *size) and all(x.shape == (1, 3, 6, 9) for x in seen)
    mean = torch.tensor(common.MEAN_COLOR).view(3, 1, 1) / 255
    for x in seen:
        if size[0] < 6:
            assert torch.allclose(x[0, :, size[0] :], mean.expand(3, 6 - size[0], 9))
        if size[1] < 9:
            assert torch.allclose(x[0, :, :, size[1] :], mean.expand(3, 6, 9 - size[1]))
    assert torch.allclose(
        seen[0][..., : min(6, size[0]), : min(9, size[1])], image[..., :6, :9], atol=1e-6
    )


class Lopsided(torch.nn.Module):
    """A network at stride 2 that tells left from right."""

    stride = 2

    def __init__(self, align_corners):
        super().__init__()
        self.align_corners, self.conv = align_corners, torch.nn.Conv2d(3, 3, 3, stride=2, padding=1)
        torch.nn.init.normal_(self.conv.weight, 0, 3)

    def forward(self, image):
        return self.conv(image)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_predict_by_windows_against_a_naive_loop(logits, flip, align_corners):
    """base_size 24 of a 16 x 32 picture: 12 x 24 pixels, 9 x 9 windows; the result at 20 x 41."""
    network, args = Lopsided(align_corners), stub_args(flip=flip, base_size=24, crop=(9, 9))
    image = torch.randint(0, 256, (1, 3, 16, 32), dtype=torch.uint8)
    result = common.predict(network, image, args, (20, 41), logits=logits)
    small = F.interpolate(image.float() / 255, (12, 24), mode="bilinear", align_corners=False)
    total, count = torch.zeros(1, 3, 12, 24), torch.zeros(12, 24)
    with torch.no_grad():
        for y in (0, 3):
            for x in (0, 6, 12, 15):
                window = small[:, :, y : y + 9, x : x + 9]
                for mirrored in (False, True) if flip else (False,):
                    answer = network(window.flip(3) if mirrored else window)
                    if align_corners:
                        answer = at_pixels(answer, (9, 9), 2)
                    else:
                        answer = F.interpolate(answer, (10, 10), mode="bilinear")[:, :, :9, :9]
                    answer = (
                        answer if logits else answer.softmax(1)
                    )  # logits for pseudo-labels, probabilities for validation
                    total[:, :, y : y + 9, x : x + 9] += answer.flip(3) if mirrored else answer
                    count[y : y + 9, x : x + 9] += 1
    expected = F.interpolate(total / count, (20, 41), mode="bilinear", align_corners=False)
    assert result.shape == (1, 3, 20, 41) and torch.allclose(result, expected, atol=1e-5)
    if not logits:
        assert torch.allclose(result.sum(1), torch.ones(1, 20, 41), atol=1e-5)


def test_pseudo_labels_come_from_averaged_logits(monkeypatch):
    """Two views of a pixel disagree: the means of logits and probabilities have other classes."""
    network = Lopsided(False)
    network.stride = 1
    network.forward = lambda x: (
        torch.tensor([[0.0, 20.0], [1.0, 0.0]]).flip(1).view(1, 2, 1, 2).expand(len(x), 2, 1, 2)
    )
    args = stub_args(flip=True)
    image = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    mean_logits = torch.tensor([10.0, 0.5])
    label, code = dars.predict_picture(network, image[0], args)
    assert label.tolist() == [[0, 0]] and VALUES[code[0, 0]] == pytest.approx(
        float(mean_logits.softmax(0)[0]), abs=1e-3
    )
    p = common.predict(network, image, args, (1, 2))
    assert float(p[0, 0, 0, 0]) == pytest.approx((1 + 1 / (1 + math.e)) / 2, abs=1e-5)


def test_pseudo_labels_are_predicted_in_fp32():
    network = Lopsided(False).eval()
    image = torch.randint(0, 256, (3, 20, 37), dtype=torch.uint8)
    args = stub_args(precision="bf16")
    exact = dars.predict_picture(network, image, stub_args())
    rough = dars.predict_picture(network, image, args)
    assert all(map(torch.equal, exact, rough)) and args.precision == "bf16"
    # It would matter here: bf16 gives other confidences.
    size = 20, 37
    in_bf16 = common.predict(network, image[None], args, size, logits=True)
    in_fp32 = common.predict(network, image[None], stub_args(), size, logits=True)
    assert not torch.equal(in_bf16, in_fp32)


@pytest.mark.parametrize("size, cells", [(361, 46), (713, 90), (321, 41)])
def test_crops_of_8_n_plus_1_pixels_have_corners_on_corners(size, cells):
    """As the authors' code upsamples in Table 1 (361, 713) and with DeepLabv2 (321)."""
    logits = torch.randn(1, 2, cells, cells)
    expected = F.interpolate(logits, (size, size), mode="bilinear", align_corners=True)
    torch.testing.assert_close(common.upsample(logits, (size, size), 8), expected)
    assert common.upsample(logits.bfloat16(), (size, size), 8).dtype == torch.float32


def test_the_picture_is_predicted_at_its_own_size():
    image = torch.randint(0, 256, (3, 20, 37), dtype=torch.uint8)
    label, code = dars.predict_picture(
        Lopsided(True).eval(), image, stub_args(base_size=18, crop=(9, 9), flip=True)
    )
    assert label.shape == code.shape == (20, 37) and label.max() < 3


# ---- networks ------------------------------------------------------------------------------------

SPEC = dict(
    network="pspnet",
    backbone="resnet50",
    head="plain",
    aspp_branches=4,
    batch_norm="train",
    style="torchvision",
    classes=19,
)


def on_paper(**more):
    """A network without memory: shapes only."""
    with torch.device("meta"):
        return common.make_network(SPEC | more)


def test_pspnet_has_semsegs_parameters():
    assert sum(p.numel() for p in on_paper(deep_stem=True).parameters()) == 49_080_038


@pytest.mark.parametrize("deep_stem", [False, True])
def test_pspnet_has_stride_8_and_the_dilations_of_the_paper_in_all_blocks(deep_stem):
    network = on_paper(deep_stem=deep_stem)
    for layer, blocks, dilation in (
        (network.backbone.layer1, 3, 1),
        (network.backbone.layer2, 4, 1),
        (network.backbone.layer3, 6, 2),
        (network.backbone.layer4, 3, 4),
    ):
        assert len(layer) == blocks
        assert all(
            block.conv2.dilation == block.conv2.padding == (dilation, dilation) for block in layer
        )
    for layer in (network.backbone.layer3, network.backbone.layer4):
        assert all(m.stride == (1, 1) for m in layer.modules() if isinstance(m, torch.nn.Conv2d))
    for size, cells in ((713, 90), (361, 46), (321, 41)):
        logits, auxiliary = network(torch.empty(2, 3, size, size, device="meta"), aux=True)
        assert logits.shape == auxiliary.shape == (2, 19, cells, cells)
    assert network.features(torch.empty(2, 3, 361, 361, device="meta")).shape == (2, 512, 46, 46)
    assert network(torch.empty(2, 3, 361, 361, device="meta")).shape == (2, 19, 46, 46)
    conv = network.auxiliary[0]
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (1024, 256, (3, 3))
    assert [level[0].output_size for level in network.pyramid.levels] == [1, 2, 3, 6] and {
        level[1].out_channels for level in network.pyramid.levels
    } == {512}
    assert (
        network.pyramid.bottleneck[0].in_channels,
        network.pyramid.bottleneck[0].out_channels,
    ) == (4096, 512) and network.align_corners


def tiny():
    return common.make_network(SPEC | dict(backbone="tiny", batch_norm="frozen", classes=K))


def test_pspnets_halves_make_the_whole():
    network, image = tiny().eval(), torch.rand(2, 3, 32, 64)
    logits, auxiliary = network(image, aux=True)
    assert torch.equal(network.classifier(network.features(image)), logits) and torch.equal(
        network(image), logits
    )
    assert logits.shape == auxiliary.shape == (2, K, 8, 16)
    layer3 = network.backbone.layers(network.normalize(image))[3]
    assert torch.equal(network.auxiliary(layer3), auxiliary)
    network.train()
    assert not torch.equal(network(image), network(image))  # dropout
    heads = sum(p.numel() for p in head_parameters(network))
    assert heads + sum(p.numel() for p in network.backbone.parameters()) == sum(
        p.numel() for p in network.parameters()
    )


def test_the_auxiliary_loss_reaches_layer3_and_not_layer4():
    network = tiny()
    network(torch.rand(2, 3, 32, 64), aux=True)[1].sum().backward()
    assert (
        network.backbone.layer3[-1].conv2.weight.grad is not None
        and network.backbone.layer4[0].conv1.weight.grad is None
    )


def numbered(shapes):
    """A state dict in which each entry has another value."""
    return {
        key: torch.full(shape, i / 7 + 0.1) if shape else torch.tensor(i)
        for i, (key, shape) in enumerate(shapes.items())
    }


def resnet50_shapes():
    with torch.device("meta"):
        return {
            key: tuple(value.shape)
            for key, value in torchvision.models.resnet50().state_dict().items()
        }


def semseg_shapes():
    """resnet50_v2.pth: a stem of three convolutions conv1, conv2, conv3."""
    shapes = {
        f"{kind}.{key}": shape
        for number, (i, o) in enumerate(((3, 64), (64, 64), (64, 128)), 1)
        for kind, entries in (
            (f"conv{number}", {"weight": (o, i, 3, 3)}),
            (f"bn{number}", dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (o,))),
        )
        for key, shape in entries.items()
    }
    shapes |= {
        key: shape for key, shape in resnet50_shapes().items() if key.startswith(("layer", "fc"))
    }
    return shapes | {
        "layer1.0.conv1.weight": (64, 128, 1, 1),
        "layer1.0.downsample.0.weight": (256, 128, 1, 1),
    }


@pytest.mark.parametrize("layout", ["semseg", "semseg in DataParallel", "torchvision"])
def test_every_value_of_public_weights_is_loaded(layout, tmp_path, capsys):
    weights = numbered(resnet50_shapes() if layout == "torchvision" else semseg_shapes())
    file = (
        {f"module.{key}": value for key, value in weights.items()}
        if "DataParallel" in layout
        else weights
    )
    converted, style = common.convert_weights(file)
    deep = layout != "torchvision"
    assert style == "torchvision" and ("backbone.conv1.0.weight" in converted) == deep
    with torch.device("meta"):
        network = common.make_network(SPEC | dict(deep_stem=deep))
    network.backbone.to_empty(device="cpu")
    network.spec = SPEC
    keys = network.state_dict().keys()
    loaded = {}
    network.load_state_dict = lambda fits, strict: loaded.update(fits)
    report = common.load_weights(network, converted, "x.pth")
    stem = (
        {
            "conv1": "conv1.0",
            "bn1": "conv1.1",
            "conv2": "conv1.3",
            "bn2": "conv1.4",
            "conv3": "conv1.6",
            "bn3": "bn1",
        }
        if deep
        else {}
    )
    expected = {
        ".".join(
            ["backbone", stem.get(key.split(".")[0], key.split(".")[0])] + key.split(".")[1:]
        ): value
        for key, value in weights.items()
        if not key.startswith("fc.")
    }
    assert loaded.keys() == expected.keys() and all(
        torch.equal(loaded[key], expected[key]) for key in expected
    )
    assert {
        key
        for key in keys
        if key.startswith("backbone.") and not key.endswith("num_batches_tracked")
    } <= loaded.keys()
    assert "skipped 2 (fc.weight, fc.bias" in report


def test_build_network_takes_the_stem_of_the_file(tmp_path, capsys, monkeypatch):
    weights = {
        key: value.half() for key, value in numbered(semseg_shapes()).items()
    }  # a smaller file
    torch.save(weights, tmp_path / "resnet50_v2.pth")
    args = SimpleNamespace(
        weights=str(tmp_path / "resnet50_v2.pth"),
        network="pspnet",
        backbone="resnet50",
        head="plain",
        aspp_branches=4,
        output_stride=None,
        batch_norm="train",
        input_style=None,
        seed=0,
    )
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda *_, **__: None)  # time
    network = common.build_network(args, SimpleNamespace(names=list("abc")), CPU)
    assert network.spec["deep_stem"] and network.spec["style"] == "torchvision"
    assert torch.equal(
        network.backbone.conv1[6].weight.half(), weights["conv3.weight"]
    ) and torch.equal(network.backbone.bn1.running_var.half(), weights["bn3.running_var"])
    assert torch.equal(
        network.backbone.layer4[2].conv3.weight.half(), weights["layer4.2.conv3.weight"]
    )
    assert "loaded" in capsys.readouterr().out


# ---- perturbations -------------------------------------------------------------------------------

COLORS = torch.tensor(
    [(20 * k + 40, 200 - 30 * k, (90 * k) % 250) for k in range(K)], dtype=torch.uint8
)


def coded_picture(height=48, width=64):
    """Label in bands of 12 pixels, and a picture in the colors of the label."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    label = ((y // 12 + 2 * (x // 16)) % K).to(torch.uint8)
    return COLORS[label.long()].permute(2, 0, 1).contiguous(), label


def inside(label, radius=3):
    """Where all neighbors have the same value; not at the border, where a fill color blends in."""
    x = F.pad(label[None, None].float(), [radius] * 4, value=-1)
    return (F.max_pool2d(x, 2 * radius + 1, 1) == -F.max_pool2d(-x, 2 * radius + 1, 1))[0, 0]


def rotate_whole(image, label, generator):
    """The crop is the whole picture."""
    return dars.rotate_and_blur(image, label, 0, 0, label.shape, generator)


def naive_blur(image):
    """OpenCV's 5 x 5 Gaussian at sigma 0, [1 4 6 4 1] / 16, of (3, H, W) uint8. The two outer rows
    and columns stay: no color from beyond the picture comes in."""
    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(kernel, kernel)[None, None]
    blurred = image.clone()
    inner = F.conv2d(image[:, None].float(), kernel)[:, 0]
    blurred[:, 2:-2, 2:-2] = (inner + 0.5).floor().to(torch.uint8)
    return blurred


def test_rotation_and_blur_by_content():
    image, label = coded_picture()

    rotated = blurred = both = neither = 0
    for seed in range(120):
        new_image, new_label = rotate_whole(image, label, common.rng("rotate", seed))
        assert (
            new_image.shape == image.shape
            and new_label.shape == label.shape
            and new_image.dtype == new_label.dtype == torch.uint8
        )
        assert set(new_label.flatten().tolist()) <= {*range(K), 255}
        middle = inside(new_label)
        colors = torch.zeros(256, 3, dtype=torch.uint8)
        colors[:K] = COLORS
        colors[255] = torch.tensor(common.MEAN_COLOR)
        expected = colors[new_label.long()].permute(2, 0, 1)
        # The label moved with its picture.
        assert (new_image.int() - expected.int())[:, middle].abs().max() <= 1
        turned = not torch.equal(new_label, label)
        drawn = common.rng("rotate", seed).uniform(size=3)
        soft = drawn[2] < 0.5
        if drawn[0] >= 0.5:
            assert not turned
            assert torch.equal(new_image, naive_blur(image) if soft else image)
        if turned:
            assert (new_label == 255).any()
            corner = new_label[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corner == 255).any()
            assert (new_label == 255).float().mean() < 0.2
        blurred += torch.equal(new_image, naive_blur(image))
        neither += torch.equal(new_image, image)
        rotated += turned
        both += turned and soft
    assert 40 < rotated < 80 and 15 < blurred < 48 and 15 < neither < 48 and 15 < both < 48
    again = [rotate_whole(image, label, common.rng("rotate", 3)) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]) and torch.equal(again[0][1], again[1][1])
    assert all(map(torch.equal, (image, label), coded_picture()))  # the originals have not changed


def test_rotation_is_by_up_to_ten_degrees():
    image = torch.zeros(3, 101, 101, dtype=torch.uint8)
    label = torch.zeros(101, 101, dtype=torch.uint8)
    label[50, 51:] = 1  # a ray to the right
    angles = []
    for seed in range(150):
        _, new = rotate_whole(image, label, common.rng("angle", seed))
        y, x = torch.nonzero(new == 1).double().mean(0).tolist()
        if not torch.equal(new, label):
            angles.append(math.degrees(math.atan2(50 - y, x - 50)))
    assert (
        -10.5 < min(angles) < -7 and 7 < max(angles) < 10.5 and abs(sum(angles) / len(angles)) < 2
    )


def test_the_crop_is_that_of_the_whole_picture_rotated_and_blurred():
    """Against PIL's rotate() and a naive blur of the whole, at the border of the crop too."""
    r = np.random.RandomState(0)
    seen = set()
    for seed in range(80):
        height, width = ((60, 80), (61, 79))[seed % 2]
        crop = 20, 31
        image = r.randint(0, 256, (height, width, 3)).astype(np.uint8)
        label = r.randint(0, 19, (height, width)).astype(np.uint8)
        top, left = r.randint(2, height - crop[0] - 1), r.randint(2, width - crop[1] - 1)
        generator = common.rng("crop", seed)
        rotate = generator.uniform() < 0.5
        angle = generator.uniform(-10, 10)
        blur = generator.uniform() < 0.5
        angle = angle if rotate else 0
        tensor = common.to_tensor(image)
        blurred = naive_blur(tensor) if blur else tensor
        picture = Image.fromarray(blurred.permute(1, 2, 0).contiguous().numpy())
        picture = picture.rotate(angle, Image.BILINEAR, fillcolor=common.MEAN_COLOR)
        whole = common.to_tensor(np.array(picture)).double()
        masks = np.array(Image.fromarray(label).rotate(angle, Image.NEAREST, fillcolor=255))
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        generator = common.rng("crop", seed)
        inputs = common.to_tensor(image), torch.from_numpy(label)
        x, y = dars.rotate_and_blur(*inputs, top, left, crop, generator)
        assert x.shape == (3, *crop) and y.shape == crop and x.is_contiguous() and y.is_contiguous()
        assert (x - whole[:, window[0], window[1]]).abs().max() <= 1
        assert (y.numpy() != masks[window]).sum() <= 1  # where the nearest pixel is a tie
        seen.add((rotate, blur))
    assert len(seen) == 4


def test_photometric_changes_colors_and_nothing_else():
    """The draws of rotation and blur, and the label, are those without the flag."""
    image, label = coded_picture()
    changed = 0
    for seed in range(20):
        plain, with_colors = (
            dars.rotate_and_blur(
                image, label, 3, 5, (24, 30), common.rng("colors", seed), photometric=on)
            for on in (False, True))  # fmt: skip
        generator = common.rng("colors", seed)
        for bounds in ((), (-10, 10), ()):
            generator.uniform(*bounds)  # rotate, angle, blur
        distorted = common.distort(image, generator)
        naive = dars.rotate_and_blur(distorted, label, 3, 5, (24, 30), common.rng("colors", seed))
        assert torch.equal(with_colors[0], naive[0])
        assert torch.equal(with_colors[1], plain[1])
        changed += not torch.equal(with_colors[0], plain[0])
    assert changed > 10


def test_the_cut_of_a_method_draws_after_the_weak_view():
    """Scale, place and flip are those of the view without it, however many numbers it draws."""
    image, label = coded_picture()
    image = image.permute(1, 2, 0).numpy()

    def cut(image, label, top, left, crop, generator):
        generator.uniform(size=int(generator.uniform(1, 9)))
        rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
        return image[:, rows, columns], label[rows, columns]

    def view(seed, *more):
        generator = common.rng("cut", seed)
        return common.weak_view(image, label.numpy(), generator, (24, 30), (0.6, 1.4), *more)

    for seed in range(20):
        plain = view(seed)
        with_cut = view(seed, cut)
        assert all(map(torch.equal, plain[:3], with_cut[:3])) and plain[3] == with_cut[3]


def test_the_weak_view_rotates_and_pads():
    image, label = coded_picture()
    padded = turned = seen = 0
    for seed in range(60):
        x, y, valid, _ = common.weak_view(
            image.permute(1, 2, 0).numpy(),
            label.numpy(),
            common.rng("view", seed),
            (48, 64),
            (0.6, 1.4),
            dars.rotate_and_blur,
        )
        assert x.shape == (3, 48, 64) and y.shape == valid.shape == (48, 64)
        mean = torch.tensor(common.MEAN_COLOR, dtype=torch.uint8)[:, None]
        assert (x[:, ~valid] == mean).all() and (y[~valid] == 255).all()
        middle = inside(torch.where(valid, y, 254).to(torch.uint8), 5)
        known = middle & valid & (y != 255)
        assert (
            (x.int() - COLORS[y.clamp(max=K - 1).long()].permute(2, 0, 1).int())[:, known].abs()
            <= 2
        ).all()
        seen += int(known.sum())
        padded, turned = padded + bool((~valid).any()), turned + bool((y[valid] == 255).any())
    assert padded > 15 and turned > 15 and seen > 60 * 100
    first, again = (
        common.weak_view(
            image.permute(1, 2, 0).numpy(),
            label.numpy(),
            common.rng("view", 1),
            (40, 40),
            (0.5, 2.0),
            dars.rotate_and_blur,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))


# ---- losses --------------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_over_valid_pixels():
    logits, label = torch.randn(2, K, 3, 4), torch.randint(K, (2, 3, 4))
    label[0, 1] = 255
    total, count = 0.0, 0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                if label[b, y, x] != 255:
                    z = logits[b, :, y, x].double()
                    total -= float(z[label[b, y, x]] - torch.log(torch.exp(z).sum()))
                    count += 1
    assert dars.cross_entropy(logits, label).item() == pytest.approx(total / count, abs=1e-6)


def test_all_ignored_gives_loss_0_and_gradient_0():
    logits = torch.randn(1, K, 3, 4, requires_grad=True)
    loss = dars.cross_entropy(logits, torch.full((1, 3, 4), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_the_mean_of_the_processes_losses_is_the_loss_of_the_whole_batch(monkeypatch):
    logits, label = torch.randn(2, K, 3, 4), torch.randint(K, (2, 3, 4))
    label[0, :2] = 255
    valid = (label != 255).sum()
    whole = dars.cross_entropy(logits, label)
    monkeypatch.setattr(dars, "world_size", lambda: 2)
    monkeypatch.setattr(dars, "all_reduce", lambda count: valid)
    losses = [dars.cross_entropy(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    assert sum(losses) / 2 == pytest.approx(whole.item(), abs=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("number, empty", [(0, False), (1, False), (1, True)])
def test_eqs_1_and_2_the_loss_of_a_step(number, empty, tmp_path, monkeypatch, capsys):
    """Labels plus pseudo-labels, and .4 of the same of the auxiliary head.

    empty: pseudo-labels without a known pixel."""

    class Streets(common.Streets):
        def __init__(self):
            super().__init__()
            self.train, self.val = self.train[:4], self.val[:1]

    recorded, real_batches = {"batches": []}, common.batches

    def batches(*args):
        for batch in real_batches(*args):
            recorded["batches"].append(batch)
            yield batch

    def step(run, iteration, losses, *rest, **numbers):
        recorded["losses"] = losses
        raise Stop

    forward = common.PSPNet.forward

    def recorded_forward(network, image, aux=False):
        outputs = forward(network, image, aux)
        if aux:
            recorded["outputs"], recorded["image"] = [x.detach() for x in outputs], image
        return outputs

    def scale(scaler, loss):
        recorded["loss"] = loss.item()
        return loss

    def make_rounds(*_):
        return [(k, int(k == number), 0.9 * k, (0.9, 1.1)) for k in range(number + 1)]

    argv = "dars.py --labels 2 --batch-size 2 --round0-batch-size 2 --crop 32 64 --base-size 64"
    argv = [*argv.split(), "--no-flip", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(common, "Streets", Streets)
    monkeypatch.setattr(common, "batches", batches)
    monkeypatch.setattr(common.Run, "step", step)
    monkeypatch.setattr(common.PSPNet, "forward", recorded_forward)
    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
    monkeypatch.setattr(dars, "make_rounds", make_rounds)
    if empty:
        monkeypatch.setattr(dars, "select", lambda label, *_: np.full_like(label, 255))
    with pytest.raises(Stop):
        dars.main()
    parts = recorded["batches"]
    assert len(parts) == number + 1 and recorded["image"].shape == (2 * len(parts), 3, 32, 64)
    images = torch.cat([part["image"] for part in parts])
    assert torch.equal(recorded["image"], images.float() / 255)
    expected = {}
    for weight, suffix, z in zip((1, 0.4), ("", "_aux"), recorded["outputs"]):
        z = at_pixels(z, (32, 64), 4)
        for i, (kind, part) in enumerate(zip(("labeled", "pseudo"), parts)):
            known = (part["label"] != 255).any()
            loss = F.cross_entropy(z[2 * i : 2 * i + 2], part["label"], ignore_index=255)
            expected[f"loss_{kind}{suffix}"] = weight * loss.item() if known else 0.0
    losses = {key: value.item() for key, value in recorded["losses"].items()}
    assert losses == pytest.approx(expected, abs=1e-5)
    assert recorded["loss"] == pytest.approx(sum(expected.values()), abs=1e-4)
    if number:
        assert (losses["loss_pseudo"] == 0) == empty and (losses["loss_pseudo_aux"] == 0) == empty


# ---- the table of rounds and the paper's numbers -------------------------------------------------


@pytest.fixture
def rounds(monkeypatch):
    """rounds("--dataset", "cityscapes", ..) -> (args, the table of rounds); no data is read."""
    counts = {"cityscapes": 2975, "vocaug": 10_582, "streets": 256, "camvid": 367}
    seen, real = [], dars.make_rounds

    def make_rounds(args, *ids):
        seen.append((args, real(args, *ids)))
        raise Stop

    def split(args, data):
        n = common.count_labels(args.labels, data)
        args.labels = n
        return [f"l{i}" for i in range(n)], [f"u{i}" for i in range(len(data.train) - n)]

    monkeypatch.setattr(
        common,
        "open_dataset",
        lambda args: SimpleNamespace(name=args.dataset, train=[None] * counts[args.dataset]),
    )
    monkeypatch.setattr(common, "split", split)
    monkeypatch.setattr(dars, "make_rounds", make_rounds)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["dars.py", *argv])
        with pytest.raises(Stop):
            dars.main()
        return seen.pop()

    return run


def iterations(table):
    return [n for _, n, _, _ in table]


def alphas(table):
    return [alpha for _, _, alpha, _ in table]


# argv; crop, base size, scale of rounds 0 and 1, scale of round 2, alpha, batch sizes of round 0
# and later, lr
ROWS = [
    ("cityscapes --labels 372", 361, 1024, (0.25, 1), (0.2, 1.5), (0.2, 0.5), (16, 8), 0.01),
    ("cityscapes --labels 1/8", 361, 1024, (0.25, 1), (0.2, 1.5), (0.2, 0.5), (16, 8), 0.01),
    ("cityscapes --labels 744", 361, 1024, (0.25, 1), (0.2, 1.5), (0.4, 0.6), (16, 8), 0.01),
    ("cityscapes --labels 1/4", 361, 1024, (0.25, 1), (0.2, 1.5), (0.4, 0.6), (16, 8), 0.01),
    (
        "cityscapes --labels 372 --preset 713",
        713,
        2048,
        (0.5, 2),
        (0.5, 3),
        (0.4, 0.65),
        (16, 8),
        0.01,
    ),
    (
        "cityscapes --labels 744 --preset 713",
        713,
        2048,
        (0.5, 2),
        (0.4, 2.5),
        (0.4, 0.65),
        (16, 8),
        0.01,
    ),
    (
        "cityscapes --labels 372 --preset deeplabv2",
        361,
        1024,
        (0.25, 1),
        (0.25, 1),
        (0.2, 0.45),
        (16, 4),
        0.002,
    ),
    ("vocaug --labels 1464", 321, 400, (0.5, 1.5), (0.5, 2), (0.4, 0.5), (16, 8), 0.01),
]


@pytest.mark.parametrize(
    "argv, crop, base, scale, scale_2, alpha, batch, lr", ROWS, ids=[row[0] for row in ROWS]
)
def test_the_papers_rows(rounds, argv, crop, base, scale, scale_2, alpha, batch, lr):
    args, table = rounds("--dataset", *argv.split(), "--data-root", "x")
    assert [number for number, *_ in table] == [0, 1, 2] and alphas(table) == [0, *alpha]
    for (*_, its_scale), expected in zip(table, (scale, scale, scale_2)):
        assert its_scale == pytest.approx(expected)
    assert (tuple(args.crop), args.base_size, args.round0_batch_size, args.batch_size, args.lr) == (
        (crop, crop),
        base,
        *batch,
        lr,
    )
    epochs, labeled, unlabeled = (
        (50, 1464, 9118)
        if "voc" in argv
        else (200, 744, 2231)
        if "744" in argv or "1/4" in argv
        else (200, 372, 2603)
    )
    round0 = unlabeled if "deeplabv2" in argv else labeled  # its list of round 0 is of 2,603 lines
    later = epochs * unlabeled // batch[1]
    assert iterations(table) == [epochs * round0 // batch[0], later, later]
    assert args.weights == "imagenet"  # of all three public configurations
    assert (args.optimizer, args.weight_decay, args.head_lr, args.flip, args.batch_norm) == (
        "sgd",
        1e-4,
        10,
        True,
        "affine-frozen" if "deeplab" in argv else "sync",
    )
    assert (args.network, args.backbone) == (
        ("deeplabv2", "resnet101") if "deeplab" in argv else ("pspnet", "resnet50")
    )
    number = {
        ("cityscapes", None, 372): 69.64,
        ("cityscapes", None, 744): 71.30,
        ("cityscapes", "713", 372): 72.78,
        ("cityscapes", "713", 744): 74.32,
        ("cityscapes", "deeplabv2", 372): 64.20,
        ("vocaug", None, 1464): 73.89,
    }
    assert args.changed == []
    assert dars.paper_miou(args) == number[args.dataset, args.table_preset, args.labels]


def test_a_setting_of_ones_own_has_no_number_of_the_paper(rounds):
    base = ["--dataset", "cityscapes", "--data-root", "x"]
    assert rounds(*base, "--alpha", ".2", ".5", "--seed", "3")[0].changed == []
    for flags in (
        ["--alpha", ".2", ".6"],
        ["--pseudo", "st"],
        ["--temperature", "1.27"],
        ["--rounds", "1"],
        ["--epochs", "10"],
        ["--restart-schedule"],
    ):
        assert rounds(*base, *flags)[0].changed == [flags[0].strip("-").replace("-", "_")]


def test_scales_and_alpha_of_each_round(rounds):
    args, table = rounds(
        "--rounds",
        "3",
        "--alpha",
        ".1",
        ".5",
        "1",
        "--beta-min",
        "0",
        ".2",
        ".5",
        "--beta-max",
        "0",
        ".5",
        "1",
        "--scale",
        ".5",
        "2",
    )
    assert alphas(table) == [0, 0.1, 0.5, 1]
    assert [scale for *_, scale in table] == [
        pytest.approx(x) for x in ((0.5, 2), (0.5, 2), (0.4, 3), (0.25, 4))
    ]  # of the base range, not of the round before
    _, table = rounds("--rounds", "0")
    assert len(table) == 1


def test_iterations_from_epochs(rounds):
    base = ["--dataset", "cityscapes", "--data-root", "x"]
    assert iterations(rounds(*base, "--epochs", "3")[1]) == [
        3 * 372 // 16,
        3 * 2603 // 8,
        3 * 2603 // 8,
    ]
    assert iterations(rounds(*base, "--iterations", "5")[1]) == [
        5,
        5,
        5,
    ]  # the table has no number for round 0
    assert iterations(rounds(*base, "--round0-iterations", "7")[1]) == [
        7,
        200 * 2603 // 8,
        200 * 2603 // 8,
    ]
    assert iterations(rounds("--iterations", "5")[1]) == [3000, 5, 5]  # that of the streets has
    assert iterations(rounds(*base, "--iterations", "5", "--round0-iterations", "7")[1]) == [
        7,
        5,
        5,
    ]
    assert iterations(
        rounds(*base, "--supervised", "--iterations", "5", "--round0-iterations", "7")[1]
    ) == [17]
    assert iterations(rounds(*base, "--batch-size", "16", "--epochs", "1")[1]) == [23, 162, 162]


def test_epochs_are_heeded_where_the_table_has_iterations(rounds):
    assert iterations(rounds("--epochs", "1")[1]) == [16 // 8, 240 // 4, 240 // 4]


def test_a_split_file_of_744_pictures_takes_the_row_of_744(rounds, monkeypatch, tmp_path):
    def split(args, data):
        assert args.labels is None  # the list says it, nobody else
        args.labels = len((tmp_path / args.split[0]).read_text().split())
        return ["x"] * args.labels, ["y"] * (2975 - args.labels)

    monkeypatch.setattr(common, "split", split)
    monkeypatch.chdir(tmp_path)
    for n, alpha in ((744, [0.4, 0.6]), (372, [0.2, 0.5]), (500, [0.2, 0.5])):
        (tmp_path / "list.txt").write_text("".join(f"picture_{i}\n" for i in range(n)))
        args, table = rounds("--dataset", "cityscapes", "--data-root", "x", "--split", "list.txt")
        assert alphas(table) == [0, *alpha] and args.labels == n
        assert iterations(table)[0] == 200 * n // 16


PAPERS_NUMBERS = {  # of every row of Tables 1 to 4, 6 and 8 that is DARS's or its variants'
    "--labels 372": 69.64,
    "--labels 744": 71.30,
    "--labels 1/4": 71.30,
    "--labels 372 --preset 713": 72.78,
    "--labels 744 --preset 713": 74.32,
    "--labels 372 --preset deeplabv2": 64.20,
    "--supervised --rounds 0 --labels 372": 60.75,
    "--supervised --rounds 0 --labels 744": 66.54,
    "--supervised --rounds 0 --labels 2975": 73.80,
    "--supervised --rounds 0 --labels 372 --preset 713": 65.54,
    "--supervised --rounds 0 --labels 744 --preset 713": 69.22,
    "--supervised --rounds 0 --labels 2975 --preset 713": 76.60,
    "--supervised --rounds 0 --labels 372 --preset deeplabv2": 56.2,
    "--supervised --rounds 0 --labels 2975 --preset deeplabv2": 66.9,
    "--rounds 1 --pseudo st": 65.70,
    "--rounds 1 --pseudo st --temperature 1.27": 65.89,
    "--rounds 1 --pseudo cbst": 66.29,
    "--rounds 1 --pseudo cbst --temperature 1.27": 66.61,
    "--rounds 1 --pseudo da --temperature 1.27": 67.31,
    "--rounds 1 --pseudo dars": 68.01,
    "--pseudo st": 66.59,
    "--pseudo cbst": 67.20,
    "--pseudo dars --seed 3": 69.64,
    "--rounds 1 --beta-min 0.2 --beta-max 0.5": 67.54,
    "--alpha 0.2 0.2 --beta-min 0 0 --beta-max 0 0": 68.27,
    "--alpha 0.2 0.5 --beta-min 0 0 --beta-max 0 0": 68.93,
    "--labels 2975 --preset 713 --extra 3000 --iterations 75000 --round0-iterations 37187": 78.43,
    "--labels 2975 --preset 713 --extra 6000 --iterations 75000 --round0-iterations 37187": 78.64,
    "--labels 2975 --preset 713 --extra 9000 --iterations 75000 --round0-iterations 37187": 78.70,
}


@pytest.mark.parametrize("argv", PAPERS_NUMBERS)
def test_each_row_of_the_papers_tables_has_its_number(rounds, argv):
    base = ["--dataset", "cityscapes", "--data-root", "x", *argv.split()]
    assert dars.paper_miou(rounds(*base)[0]) == PAPERS_NUMBERS[argv]
    assert dars.paper_miou(rounds(*base, "--lr", "1")[0]) is None


@pytest.mark.parametrize("flags", ["--supervised", "--pseudo da", "--rounds 1 --temperature 1.27"])
def test_what_is_in_no_table_of_the_paper_has_no_number(rounds, flags):
    base = ["--dataset", "cityscapes", "--data-root", "x", *flags.split()]
    assert dars.paper_miou(rounds(*base)[0]) is None


# ---- tail classes --------------------------------------------------------------------------------


def test_tail_classes():
    labels = torch.tensor([50, 3, 40, 2, 60, 1, 70, 30, 20, 10, 5, 4, 6, 7, 8, 9, 11, 12, 13])
    tail = dars.tail_classes(labels)
    assert len(tail) == 13 and set(range(19)) - set(tail) == {0, 2, 4, 6, 7, 8}
    assert len(dars.tail_classes(torch.arange(10))) == 7


def test_tail_miou():
    table = torch.tensor([[9, 1, 0, 0], [2, 5, 1, 0], [0, 0, 0, 0], [0, 3, 0, 1]])
    tail = dars.tail_classes(torch.tensor([50, 9, 8, 7]))
    assert tail == [1, 2, 3]
    assert dars.tail_miou(table, tail) == pytest.approx(100 * (5 / 12 + 0 / 1 + 1 / 4) / 3)
    table[1, 1] += table[1, 2]
    table[1, 2] = 0  # class 2 is nowhere: left out
    assert dars.tail_miou(table, tail) == pytest.approx(100 * (6 / 12 + 1 / 4) / 2)
    assert math.isnan(dars.tail_miou(torch.diag(torch.tensor([9, 0, 0, 0])), tail))


# ---- figures -------------------------------------------------------------------------------------


class Masks(StubData):
    """Drawn masks of four classes: five labeled pictures l0 .. l4, three val pictures v0 .. v2."""

    names, val = list("abcd"), ["v0", "v1", "v2"]
    labeled = [f"l{i}" for i in range(5)]

    def __init__(self):
        r = np.random.RandomState(0)
        ids = self.labeled + self.val
        self.masks = {id: r.choice(4, (8, 12), p=[0.6, 0.3, 0.08, 0.02]) for id in ids}
        self.masks["l0"][:2] = 255
        self.masks["v1"][:, 3] = 255

    def image(self, id):
        return np.full((8, 12, 3), int(id[1]), np.uint8)

    def label(self, id, full_size=False):
        return self.masks[id].astype(np.uint8)


def figure_args(base_size):
    """base_size 6: a crop of 5 x 5 shows as much of a picture as one of 10 x 10 at full size."""
    crop = (5, 5) if base_size == 6 else (10, 10)
    return SimpleNamespace(crop=crop, flip=True, base_size=base_size, full_size_labels=False)


@pytest.mark.parametrize("base_size", [0, 12, 6])
def test_fig_5a_gain_of_groups_against_a_naive_count(base_size):
    data = Masks()
    masks = [data.masks[id] for id in data.labeled]
    labels = torch.tensor([sum((mask == j).sum() for mask in masks) for j in range(4)])
    one = torch.eye(4).long() * 10 + 1
    two = torch.eye(4).long() * 30 + 1
    args = figure_args(base_size)
    groups = figure_dars.gain_of_groups(one, two, data, data.labeled, labels, args)
    gain = common.iou(two) - common.iou(one)
    naive = {name: [] for name in groups}
    for j, name in enumerate("abcd"):
        shown = [mask for mask in masks if (mask == j).any()]
        size = sum((mask == j).sum() for mask in shown) / max(1, len(shown))
        frequency = "frequent" if len(shown) > 2.5 else "rare"
        naive[frequency + (", large" if size > 10 else ", small")].append(name)
    assert len(groups) == 4
    for name, members in naive.items():
        assert groups[name]["classes"] == members
        expected = np.mean([gain["abcd".index(c)] for c in members]) if members else math.nan
        assert groups[name]["gain"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("base_size", [0, 12, 6])
def test_fig_5b_accuracy_by_size_against_a_naive_count(monkeypatch, base_size):
    """The student is right on classes 0 and 1, and wrong elsewhere."""
    data, flips = Masks(), []

    def predict(network, image, args, size, flip):
        flips.append(flip)
        label = torch.from_numpy(data.masks[f"v{int(image[0, 0, 0, 0])}"]).clone()
        label[label > 1] = 0
        return F.one_hot(label, 4).permute(2, 0, 1)[None].float()

    monkeypatch.setattr(common, "predict", predict)
    args = figure_args(base_size)
    entries, matrix = figure_dars.accuracy_by_size(torch.nn.Identity(), data, args, CPU)
    assert flips == [False] * 3 and args.flip
    naive = {}
    for part in figure_dars.BINS:
        for id in data.val:
            for j in range(4):
                size = int((data.masks[id] == j).sum())
                place = int(size / (100 * part))
                if size and place < 10:
                    hit, total = naive.get((part, place), (0, 0))
                    naive[part, place] = hit + (size if j < 2 else 0), total + size
    assert len(entries) == 30
    for i, entry in enumerate(entries):
        part, place = figure_dars.BINS[i // 10], i % 10
        hit, total = naive.get((part, place), (0, 0))
        assert entry["accuracy"] == (pytest.approx(100 * hit / total) if total else None)
        assert entry["pixels"] == [round(place * 100 * part), round((place + 1) * 100 * part)]
    truth = np.concatenate([data.masks[id].ravel() for id in data.val])
    prediction = np.where(truth > 1, 0, truth)
    ious = []
    for j in range(4):
        hit = (truth == j) & (prediction == j)
        union = ((truth == j) | (prediction == j)) & (truth < 255)
        ious.append(hit.sum() / union.sum())
    assert common.mean_iou(matrix) == pytest.approx(100 * np.mean(ious))


def test_an_object_at_the_end_of_a_bin(monkeypatch):
    class Data(StubData):
        names, val = list("ab"), ["v0"]

        def image(self, id):
            return np.zeros((31, 62, 3), np.uint8)

        def label(self, id, full_size=False):
            return np.repeat([0, 1], 961).reshape(31, 62).astype(np.uint8)

    def predict(network, image, args, size, flip):
        return torch.ones(1, 2, *size)  # class a everywhere: half of the pixels are right

    monkeypatch.setattr(common, "predict", predict)
    args = SimpleNamespace(crop=(310, 310), base_size=0, full_size_labels=False)
    entries, _ = figure_dars.accuracy_by_size(torch.nn.Identity(), Data(), args, CPU)
    accuracy = [entry["accuracy"] for entry in entries]
    # The objects have ten widths of the finest bins: where these end.
    assert accuracy[9] in (None, 50) and accuracy[10] == accuracy[20] == 50
    assert accuracy[:9] == [None] * 9 and accuracy[11:20] == accuracy[21:] == [None] * 9


def test_bars_have_the_height_of_their_values():
    """On a square-root scale: a quarter has half the height."""
    series = {"one": [100.0, 25.0, 0.0], "two": [0.0, 100.0, 0.0]}
    picture = np.asarray(figure_dars.draw_bars("title", ["a", "b", "c"], series))
    bars = picture[60:360]
    heights = []
    for color in figure_dars.COLORS[:2]:
        column = (bars == color).all(2).sum(0)
        heights.append(sorted(set(column.tolist()) - {0}))
    assert heights == [[151, 300], [300]] or heights == [[150, 300], [300]]
