"""Figs. 1, 3 and 5 of DARS, and Table 5 by class, from the folder of a finished run of dars.py.

    python tests/figure_dars.py RUN [--out DIR]

It prints for each round the class distributions of the labels, of the predictions and of what ST,
CBST, DA and DARS keep of them. It writes to DIR (default: RUN/figures):

    distribution_round_1.png ..   Fig. 1: class distribution of the true labels, ST and the method
    confidence.png                Fig. 3: confidences of a frequent and of a rare class
    pseudo_labels.png             some unlabeled pictures: what ST and the method keep
    accuracy_by_size.png          Fig. 5 (b): accuracy of the student by size of the objects
    figures.json                  the numbers: Fig. 5 (a), gain of four groups of classes since
                                  round 0; Fig. 5 (b); mIoU without mirrored pictures

Fig. 3 and pseudo_labels.png show the teacher of the last round, which predicts the unlabeled
pictures once more. Fig. 5 (b) shows the last student, where the paper shows the baseline: give the
run folder of --supervised --rounds 0 for that. An object is all pixels of one class in one
picture: Cityscapes' instanceIds are not read.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import dars  # noqa: E402

COLORS = [(90, 90, 90), (220, 120, 40), (40, 110, 190)]
BINS = 0.001, 0.024, 0.08  # of a crop: 500, 12,000 and 40,000 pixels of a crop of 713 x 713


# ---- the run -------------------------------------------------------------------------------------


def read_run(folder):
    """args.json as (arguments, labeled ids, unlabeled ids), and last.pt. A UserError if missing."""
    for name in ("args.json", "last.pt", "result.json"):
        path = folder / name
        common.need(path.exists(), f"{path}: no such file; expected the folder of a finished run")
    record = json.loads((folder / "args.json").read_text())
    method = record["method"].removesuffix("-supervised")
    common.need(method == "dars", f"{folder}: is a run of {method}.py, not of dars.py")
    args = SimpleNamespace(**record["arguments"])
    state = common.load_torch(folder / "last.pt")
    return args, record["labeled"], record["unlabeled"], state


def read_network(state, name, device):
    network = common.make_network(state["networks"][name])
    network.load_state_dict(state["models"][name])
    return network.to(device).eval()


def count_pictures(data, ids):
    """Labeled pictures that show each class, (K,) int64."""
    pictures = torch.zeros(256, dtype=torch.int64)
    for id in ids:
        present = torch.from_numpy(np.unique(data.label(id)).astype(np.int64))
        pictures[present] += 1
    return pictures[: len(data.names)]


# ---- Fig. 1 and Table 5 --------------------------------------------------------------------------


def print_table(report, names, pseudo):
    """The class distributions of a round in percent, thresholds, and D_KL of each method."""
    expected = report["expected"]
    columns = {"labeled": report["labeled_share"], "predicted": report["predicted_share"]}
    for method in dars.METHODS:
        columns[method.upper()] = expected[method]["share"]
    titles = "".join(f"{title:>11}" for title in columns)
    print(f"\nround {report['round']}: percent of each class, labeling ratio {report['alpha']}")
    print(f"{'':14}{titles}   threshold of {pseudo.upper()}")
    for j, name in enumerate(names):
        cells = "".join(f"{100 * shares[j]:11.2f}" for shares in columns.values())
        threshold = report["threshold"][j]
        if threshold is None:
            threshold = "none is kept"
        elif threshold == 0:
            threshold = "all are kept"
        else:
            threshold = f"{threshold:.4f}"
        print(f"{name:14}{cells}   {threshold}")
    coverage = "".join(f"{100 * expected[method]['coverage']:11.2f}" for method in dars.METHODS)
    print(f"{'% of all pixels':36}{coverage}")
    divergences = "".join(f"{infinite(expected[method]['d_kl']):11.4f}" for method in dars.METHODS)
    print(f"{'D_KL (Table 5)':36}{divergences}")
    print(f"written with {pseudo.upper()}, rounded in each picture: D_KL "
          f"{infinite(report['d_kl']):.4f}, {100 * report['coverage']:.2f} % of all pixels")


def infinite(d_kl):
    """D_KL, which is null in JSON where it is infinite."""
    return math.inf if d_kl is None else d_kl


def draw_distribution(report, names, pseudo):
    """Fig. 1: bars of the share of each class."""
    series = {
        "true labels": report["labeled_share"],
        "ST": report["expected"]["st"]["share"],
        pseudo.upper(): report["share"],
    }
    percent = {name: [100 * share for share in shares] for name, shares in series.items()}
    title = "share of each class, percent of pixels, square-root scale (Fig. 1)"
    return draw_bars(title, names, percent)


# ---- Fig. 3 --------------------------------------------------------------------------------------


def predict_again(teacher, data, ids, args, device):
    """Pixels by predicted class and code, (K, 15361) int64, and the first five predictions."""
    classes = len(data.names)
    table = torch.zeros(classes * dars.CODES, dtype=torch.int64)
    first = {}
    for done, id in enumerate(ids, 1):
        image = common.to_tensor(data.image(id)).to(device)
        label, code = (x.cpu() for x in dars.predict_picture(teacher, image, args))
        index = label.long() * dars.CODES + code.long()
        table += index.flatten().bincount(minlength=len(table))
        if len(first) < 5:
            first[id] = label.numpy(), code.numpy()
        common.progress("predictions of the teacher", done, len(ids))
    return table.view(classes, dars.CODES), first


def histograms(table, classes, names, args):
    """Fig. 3: ranges of confidence, and {class name: percent of its pixels in each range}."""
    confidences = np.array(dars.confidence_values(args))
    ranges = (confidences * 20).astype(int)  # 20 of .05, and exactly 1
    series = {}
    for j in classes:
        counts = np.bincount(ranges, weights=table[j].double().numpy(), minlength=21)
        series[names[j]] = (100 * counts / max(1, counts.sum())).tolist()
    return [f"{r / 20:.2f}" for r in range(20)] + ["= 1"], series


def draw_confidences(table, labels, names, args):
    """Fig. 3: bars for the most and the least frequent class of the labels that are predicted."""
    predicted = torch.nonzero(table.sum(1)).flatten().tolist()
    predicted.sort(key=lambda j: labels[j], reverse=True)
    classes = dict.fromkeys([predicted[0], predicted[-1]])
    title = "percent of the pixels of a predicted class by confidence, square-root scale (Fig. 3)"
    return draw_bars(title, *histograms(table, classes, names, args))


def draw_pseudo_labels(predictions, single_threshold, folder, data, args):
    """Unlabeled pictures, the teacher's predictions, and what ST and the method keep of them.

    predictions: {id: (label, code)}; single_threshold: threshold, kept, wanted of ST.
    """
    confidences = np.array(dars.confidence_values(args))
    rows = []
    for id, (label, code) in predictions.items():
        gray = (255 * confidences[code]).astype(np.uint8)
        truth = common.truth_for_the_log(data, id, label.shape)
        kept_by_st = dars.select(label, code, *single_threshold, None)
        kept = common.read_pseudo_label(folder, id)
        cells = data.image(id), truth, label, np.stack([gray] * 3, 2), kept_by_st, kept
        rows.append([common.to_tensor(cell) for cell in cells])
    titles = ["unlabeled picture", "truth (not used)", "teacher predicts", "confidence (white: 1)"]
    titles += ["ST keeps", f"{args.pseudo.upper()} keeps"]
    return common.draw_panel(dict(zip(titles, zip(*rows))), data.names, data.colors)


# ---- Fig. 5 --------------------------------------------------------------------------------------


def crop_area(label, args):
    """Pixels of a mask (H, W) that a crop shows."""
    area = args.crop[0] * args.crop[1]
    if args.base_size:
        area *= (max(label.shape) / args.base_size) ** 2
    return area


def gain_of_groups(before, after, data, labeled, labels, args):
    """Fig. 5 (a): {group: its classes, and their mean gain of IoU from one round to another}.

    before, after: confusion matrices; labels (K,): labeled pixels by class. A class is frequent if
    more than half of the labeled pictures show it, and large if it covers more than a tenth of a
    crop in those.
    """
    pictures = count_pictures(data, labeled)
    frequent = pictures > len(labeled) / 2
    size = labels / pictures.clamp(min=1)
    large = size > crop_area(data.label(labeled[0]), args) / 10
    gain = common.iou(after) - common.iou(before)
    members = {
        "frequent, large": frequent & large,
        "frequent, small": frequent & ~large,
        "rare, large": ~frequent & large,
        "rare, small": ~frequent & ~large,
    }
    groups = {}
    for name, mask in members.items():
        classes = [data.names[j] for j in torch.nonzero(mask).flatten().tolist()]
        groups[name] = {"classes": classes, "gain": float(gain[mask].nanmean())}
    return groups


def accuracy_by_size(student, data, args, device):
    """Fig. 5 (b): accuracy in percent of objects in three times ten ranges of size, on val.

    Returns [{"pixels": [low, high], "accuracy": percent or None}, ..] and the confusion matrix
    without mirrored pictures.
    """
    area = crop_area(data.label(data.val[0], args.full_size_labels), args)
    widths = [area * share for share in BINS]
    hits = np.zeros((len(BINS), 10))
    pixels = np.zeros((len(BINS), 10))
    total = torch.zeros(len(data.names), len(data.names), dtype=torch.int64)
    for done, id in enumerate(data.val, 1):
        image = common.to_tensor(data.image(id))[None].to(device)
        label = data.label(id, args.full_size_labels)
        prediction = common.predict(student, image, args, label.shape, flip=False).argmax(1)[0]
        matrix = common.confusion_matrix(common.to_tensor(label), prediction.cpu(), len(total))
        total += matrix
        for j, row in enumerate(matrix.tolist()):
            size = sum(row)
            for i, width in enumerate(widths):
                if 0 < size < 10 * width:
                    place = min(9, int(size / width))
                    hits[i, place] += row[j]
                    pixels[i, place] += size
        common.progress("accuracy by size", done, len(data.val))
    entries = []
    for i, width in enumerate(widths):
        for place in range(10):
            accuracy = 100 * hits[i, place] / pixels[i, place] if pixels[i, place] else None
            limits = [round(place * width), round((place + 1) * width)]
            entries.append({"pixels": limits, "accuracy": accuracy})
    return entries, total


def draw_accuracy(entries):
    """Fig. 5 (b): bars of accuracy_by_size(), a series for each width of the bins."""
    series = {}
    for begin in range(0, len(entries), 10):
        part = entries[begin : begin + 10]
        name = f"bins of {part[0]['pixels'][1]} pixels"
        series[name] = [entry["accuracy"] or 0 for entry in part]
    title = "accuracy in percent by size of the objects, square-root scale (Fig. 5 b)"
    return draw_bars(title, [f"bin {place}" for place in range(1, 11)], series)


# ---- pictures ------------------------------------------------------------------------------------


def draw_bars(title, categories, series):
    """A PIL picture with a bar for each category and series, on a square-root scale.

    series: {name: percentages, one for each category}; at most three.
    """
    font = ImageFont.load_default(15)
    bar, height, left, top = 14, 300, 50, 60
    group = bar * len(series) + 14
    room = max(font.getlength(category) for category in categories)
    size = left + group * len(categories) + 20, top + height + int(room) + 20
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    high = max(max(values) for values in series.values()) or 1

    def place(value):
        return top + height - height * (value / high) ** 0.5

    pen.text((left, 6), title, fill="black", font=font)
    for value in (0, 1, 5, 10, 20, 40, 60, 80, 100):
        if value <= high:
            y = place(value)
            pen.line((left, y, picture.width - 10, y), fill=(225, 225, 225))
            pen.text((8, y - 8), f"{value:g}", fill="gray", font=font)
    legend = left
    for i, (name, values) in enumerate(series.items()):
        pen.rectangle((legend, 34, legend + 12, 46), fill=COLORS[i])
        pen.text((legend + 16, 31), name, fill="black", font=font)
        legend += 26 + int(font.getlength(name))
        for c, value in enumerate(values):
            x = left + 7 + c * group + i * bar
            if value > 0:
                pen.rectangle((x, place(value), x + bar - 2, top + height), fill=COLORS[i])
    for c, category in enumerate(categories):  # upright
        word = Image.new("L", (int(room) + 2, 20))
        start = room - font.getlength(category)
        ImageDraw.Draw(word).text((start, 0), category, fill=255, font=font)
        x = left + 5 + c * group + (group - 34) // 2
        picture.paste("black", (x, top + height + 8), word.rotate(90, expand=True))
    return picture


# ---- main ----------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run of dars.py")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/figures")
    given = parser.parse_args()
    args, labeled, unlabeled, state = read_run(given.run)
    out = given.out or given.run / "figures"
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = common.open_dataset(args)
    labels = dars.count_pixels(data, labeled, torch.device("cpu"))
    reports = json.loads((given.run / "result.json").read_text())["rounds"]

    for report in reports:
        print_table(report, data.names, args.pseudo)
        picture = draw_distribution(report, data.names, args.pseudo)
        picture.save(out / f"distribution_round_{report['round']}.png")
    if reports:
        teacher = read_network(state, "teacher", device)
        table, predictions = predict_again(teacher, data, unlabeled, args, device)
        draw_confidences(table, labels, data.names, args).save(out / "confidence.png")
        counts = dars.align(table, labels, reports[-1]["alpha"], "st")
        single_threshold = [x.numpy() for x in counts]
        folder = given.run / "pseudo_labels" / f"round_{reports[-1]['round']}"
        picture = draw_pseudo_labels(predictions, single_threshold, folder, data, args)
        picture.save(out / "pseudo_labels.png")

    student = read_network(state, "student", device)
    entries, matrix = accuracy_by_size(student, data, args, device)
    draw_accuracy(entries).save(out / "accuracy_by_size.png")
    numbers = {"accuracy_by_size": entries, "miou_without_flip": common.mean_iou(matrix)}
    print(f"\nmIoU without mirrored pictures: {numbers['miou_without_flip']:.2f}")
    rounds = list(state["results"].values())
    if len(rounds) > 1:
        groups = gain_of_groups(rounds[0], rounds[-1], data, labeled, labels, args)
        numbers["groups"] = groups
        for name, group in groups.items():
            members = ", ".join(group["classes"]) or "no class"
            print(f"gain since round 0 (Fig. 5 a), {name}: {group['gain']:.2f} ({members})")
    text = json.dumps(common.strict(numbers), indent=1)
    (out / "figures.json").write_text(text)
    print(f"pictures and numbers: {out}")


if __name__ == "__main__":
    common.run_main(main)
