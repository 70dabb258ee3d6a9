"""Figures 2 and 4 of the paper of rml.py.

    python tests/figure_rml.py coupling                        Fig. 2, on drawn digits
    python tests/figure_rml.py coupling --data-root DIR --download         on MNIST
    python tests/figure_rml.py compare RUN RUN .. --out fig4.png           Fig. 4, up to four runs

Fig. 2: do two learners become one? Two MLPs learn digits from few labels, then from each other's
pseudo-labels: directly, through mean teachers, or through mean teachers with model noise. The
curves are the total variation between the predictions of the two on held-out digits.
Fig. 4: the mIoU of pseudo-labels over the iterations after stage 0, from the logs of runs.

What the paper leaves open about Fig. 2 are the defaults of the flags: widths 784-256-256-10, 500
iterations on labels first, SGD with a small learning rate (at .02 the noise of SGD hides
everything), and learners that learn from their peer alone (Eq. 3). Without MNIST, digits are drawn.
"""

import argparse
import copy
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from rml import update_teachers  # noqa: E402

# Whose predictions the learners learn from, and whether dropout is on.
COUPLING = {
    "direct": ("student", False),
    "indirect": ("teacher", False),
    "indirect, model noise": ("teacher", True),
}


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    coupling = commands.add_parser("coupling", help="Fig. 2")
    coupling.error = common.complain
    add = coupling.add_argument
    add("--data-root", metavar="DIR", help="folder of MNIST; without it digits are drawn")
    add("--download", action="store_true", help="download MNIST with torchvision")
    add("--labels", default="1/60", help="labeled digits: a number or a share")
    add("--seeds", **common.integer(1), default=5, help="--seed and the ones after it")
    add("--seed", **common.integer(0), default=0, help="the first seed")
    add("--stage0-iterations", **common.integer(0), default=500, help="iterations on labels alone")
    add("--iterations", **common.integer(0), default=400, help="iterations with pseudo-labels")
    add("--batch-size", **common.integer(1), default=128,
        help="labeled, and as many unlabeled digits")
    add("--lr", **common.real(common.ABOVE_0), default=0.004, help="learning rate")
    add("--dropout", **common.real(0, 1), default=0.5, help="model noise of the third mode")
    add("--ema-decay", **common.real(0, 1), default=0.999, help="decay of the mean teachers")
    add("--log-every", **common.integer(1), default=10,
        help="iterations between points of the curves")
    add("--out", metavar="DIR", help="default: runs/rml-mnist-sSEED")
    add("--overwrite", action="store_true", help="replace the result in this folder")
    comparison = commands.add_parser("compare", help="Fig. 4")
    comparison.add_argument("runs", nargs="+", metavar="RUN", help="run folders of rml.py")
    comparison.add_argument("--out", default="pseudo_miou.png", metavar="FILE", help="the picture")
    return parser


# ---- digits --------------------------------------------------------------------------------------


def draw_digit(digit, rng):
    """A drawn digit (28, 28): turned, sheared, moved, of any size and thickness, with noise."""
    font = ImageFont.load_default(int(rng.uniform(36, 48)))
    width = int(rng.randint(3))
    picture = Image.new("L", (56, 56))
    pen = ImageDraw.Draw(picture)
    pen.text((28, 28), str(digit), fill=255, font=font, anchor="mm", stroke_width=width)
    angle = rng.uniform(-0.25, 0.25)
    shear = rng.uniform(-0.3, 0.3)
    cos = math.cos(angle)
    sin = math.sin(angle)
    x = rng.uniform(-3, 3)
    y = rng.uniform(-3, 3)
    a, b = cos + shear * sin, sin
    c, d = shear * cos - sin, cos
    matrix = a, b, 28 - (a + b) * 28 + x, c, d, 28 - (c + d) * 28 + y
    affine = Image.Transform.AFFINE
    picture = picture.transform((56, 56), affine, matrix, Image.Resampling.BILINEAR)
    picture = picture.resize((28, 28), Image.Resampling.BOX)
    pixels = np.asarray(picture) * rng.uniform(0.5, 1) + rng.normal(0, 20, (28, 28))
    return pixels.clip(0, 255)


def draw_digits(seed, number):
    """Drawn digits: images (number, 28, 28) uint8, labels (number,) int64."""
    images = np.zeros((number, 28, 28), np.uint8)
    labels = np.zeros(number, np.int64)
    for i in range(number):
        rng = common.rng("digits", seed, i)
        labels[i] = rng.randint(10)
        images[i] = draw_digit(labels[i], rng)
    return images, labels


def read_mnist(root, download):
    """MNIST's two parts, for training and held out: images (N, 28, 28) uint8, labels (N,) int64."""
    parts = []
    for train in (True, False):
        try:
            part = torchvision.datasets.MNIST(root, train=train, download=download)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise common.UserError(
                f"--data-root {root}: no MNIST there ({reason}); add --download, or leave out "
                "--data-root for drawn digits"
            ) from None
        parts.append((part.data.numpy(), part.targets.numpy()))
    return parts


def read_digits(args, device):
    """Digits for training, and held-out ones: images (N, 784) in [0, 1], labels (N,) int64."""
    if args.data_root is None:
        common.need(not args.download, "--download needs --data-root DIR, where MNIST is to be put")
        common.say(
            "digits    drawn, 12,000 + 1,000; for MNIST: --data-root DIR (and --download, if it "
            "is not there yet)"
        )
        parts = draw_digits("train", 12_000), draw_digits("held out", 1000)
    else:
        parts = read_mnist(args.data_root, args.download)
    training, (images, labels) = parts
    # 2,000 held-out digits give the same curves as 10,000, in a fifth of the time.
    parts = training, (images[:2000], labels[:2000])
    tensors = []
    for images, labels in parts:
        images = torch.from_numpy(images).flatten(1).float() / 255
        tensors.append((images.to(device), torch.from_numpy(labels).to(device)))
    return tensors


# ---- Fig. 2 --------------------------------------------------------------------------------------


def total_variation(p, q):
    """1/2 sum_k |p_k - q_k|, the mean over pictures: probabilities (B, K) -> 0-dim.

    0: the same; 1: disjoint.
    """
    return (p - q).abs().sum(1).mean() / 2


def make_mlp(dropout):
    """Three layers: (B, 784) -> (B, 10)."""
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(256, 10),
    )


def make_optimizer(student, args):
    return torch.optim.SGD(student.parameters(), lr=args.lr, momentum=0.9, fused=True)


def pick(ids, size, *keys):
    """A random batch of these ids."""
    places = common.rng(*keys).randint(len(ids), size=size)
    return ids[torch.from_numpy(places).to(ids.device)]


def learn_labels(digits, labeled, seed, args):
    """Two students that have learned from labels alone, from other weights and in other orders."""
    images, labels = digits
    students = []
    for j in range(2):
        common.seed_torch(seed, "weights", j)
        student = make_mlp(args.dropout).to(images.device).eval()
        optimizer = make_optimizer(student, args)
        for iteration in range(args.stage0_iterations):
            ids = pick(labeled, args.batch_size, seed, f"labeled {j}", iteration)
            loss = F.cross_entropy(student(images[ids]), labels[ids])  # Eq. 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        students.append(student)
    return students


@torch.no_grad()
def measure(pairs, held_out):
    """For each pair {name: two networks}: its total variation, and the mean accuracy in percent."""
    images, labels = held_out
    variation = {}
    accuracy = {}
    for name, pair in pairs.items():
        probs = [network.eval()(images).softmax(1) for network in pair]
        hits = [(prob.argmax(1) == labels).float().mean() for prob in probs]
        variation[f"tv_{name}"] = float(total_variation(*probs))
        accuracy[f"accuracy_{name}"] = 100 * float(torch.stack(hits).mean())
    return variation | accuracy


def learn_from_each_other(start, mode, digits, held_out, labeled, unlabeled, seed, args):
    """Records along the iterations in this mode, which all modes begin with the same students.

    Teachers are the networks whose predictions are learned: mean teachers, or with direct mutual
    learning the students themselves.
    """
    images, labels = digits
    source, noise = COUPLING[mode]
    students = copy.deepcopy(start)
    mean_teachers = [copy.deepcopy(student).requires_grad_(False) for student in start]
    teachers = mean_teachers if source == "teacher" else students
    optimizers = [make_optimizer(student, args) for student in students]
    records = []
    for iteration in range(args.iterations + 1):
        if iteration % args.log_every == 0:
            numbers = measure({"students": students, "teachers": teachers}, held_out)
            records.append({"seed": seed, "mode": mode, "iteration": iteration} | numbers)
        known = pick(labeled, args.batch_size, seed, "labeled", iteration)
        unknown = pick(unlabeled, args.batch_size, seed, "unlabeled", iteration)
        with torch.no_grad():  # of students: Eq. 3; of mean teachers: Eq. 4
            pseudo_labels = [teacher.eval()(images[unknown]).argmax(1) for teacher in teachers]
        common.seed_torch(seed, "noise", mode, iteration)
        for j, (student, optimizer) in enumerate(zip(students, optimizers)):
            student.train(noise)
            logits_known, logits_unknown = student(images[torch.cat([known, unknown])]).chunk(2)
            loss_labeled = F.cross_entropy(logits_known, labels[known])  # Eq. 1
            loss_pseudo = F.cross_entropy(logits_unknown, pseudo_labels[1 - j])  # Eq. 3
            optimizer.zero_grad()
            (loss_labeled + loss_pseudo).backward()
            optimizer.step()
        update_teachers(mean_teachers, students, args.ema_decay)
    return records


def prepare_folder(args):
    folder = Path(args.out or f"runs/rml-mnist-s{args.seed}")
    finished = (folder / "result.json").exists() and not args.overwrite
    common.need(
        not finished,
        f"{folder} holds a finished run; choose another --out, or --overwrite to begin anew",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    return folder


def couple(args):
    """Fig. 2: curves, result.json and log.jsonl in the folder --out."""
    began = time.time()
    folder = prepare_folder(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits, held_out = read_digits(args, device)
    total = len(digits[1])
    number = common.count_labels(args.labels, SimpleNamespace(name="digits", train=range(total)))
    common.need(number < total, f"--labels {args.labels}: all {total} digits would be labeled; "
                "take fewer, so that unlabeled ones are left")  # fmt: skip
    seeds = list(range(args.seed, args.seed + args.seeds))
    records = []
    runs = [(seed, mode) for seed in seeds for mode in COUPLING]
    for done, (seed, mode) in enumerate(runs, 1):
        if mode == "direct":  # the first mode of this seed
            order = common.rng(seed, "which are labeled").permutation(total)
            order = torch.from_numpy(order).to(device)
            labeled, unlabeled = order[:number], order[number:]
            start = learn_labels(digits, labeled, seed, args)
        records += learn_from_each_other(
            start, mode, digits, held_out, labeled, unlabeled, seed, args
        )
        common.progress("coupling, seeds x modes", done, len(runs))
    write_coupling(folder, records, number, seeds, len(held_out[1]), began, device, args)


def curves(records, key, seeds):
    """{mode: array (seeds, points)} of one number of the records."""
    series = {}
    for mode in COUPLING:
        rows = []
        for seed in seeds:
            chosen = [r for r in records if (r["seed"], r["mode"]) == (seed, mode)]
            rows.append([record[key] for record in chosen])
        series[mode] = np.array(rows)
    return series


def write_coupling(folder, records, number, seeds, held_out, began, device, args):
    """Print the tables of Fig. 2, and write log.jsonl, both pictures and result.json."""
    iterations = list(range(0, args.iterations + 1, args.log_every))
    log = "".join(json.dumps(record) + "\n" for record in records)
    common.write_atomically(folder / "log.jsonl", lambda file: file.write(log.encode()))
    for pair in ("teachers", "students"):
        series = curves(records, f"tv_{pair}", seeds)
        print_table(pair, series, iterations, seeds, held_out)
        title = f"total variation between the two {pair} (Fig. 2), mean of {len(seeds)} seeds"
        across = "iterations after the start on labels", iterations
        picture = common.draw_curves(title, series, across)
        save = partial(picture.save, format="PNG")
        common.write_atomically(folder / f"coupling_{pair}.png", save)
    result = {
        "method": "rml-coupling",
        "dataset": "mnist" if args.data_root else "drawn digits",
        "labels": number,
        "seeds": seeds,
        "iterations": iterations,
        "seconds": round(time.time() - began, 1),
        "torch": torch.__version__,
        "commit": common.git_commit(),
    }
    for key in ("tv_teachers", "tv_students", "accuracy_teachers", "accuracy_students"):
        series = curves(records, key, seeds)
        result[key] = {mode: values.round(5).tolist() for mode, values in series.items()}
    text = json.dumps(result, indent=1)
    common.write_atomically(folder / "result.json", lambda file: file.write(text.encode()))
    accuracy = curves(records, "accuracy_teachers", seeds)
    words = [f"{mode} {values[:, -1].mean():.1f}" for mode, values in accuracy.items()]
    print(f"\naccuracy of the teachers at the end: {', '.join(words)}")
    print(f"{common.duration(time.time() - began)} on {common.device_name(device)}")
    print(f"curves {folder}/coupling_*.png   numbers {folder}/result.json, log.jsonl", flush=True)


def print_table(pair, series, iterations, seeds, held_out):
    """Mean and standard deviation over seeds at some iterations."""
    marks = (0, 50, 100, 200, 400, iterations[-1])
    shown = [i for i, iteration in enumerate(iterations) if iteration in marks]
    print(
        f"\ntotal variation in percent between the two {pair}, on {held_out} held-out digits: "
        f"mean and standard deviation over seeds {', '.join(map(str, seeds))}"
    )
    print(f"{'iteration':24}" + "".join(f"{iterations[i]:>15}" for i in shown))
    for mode, values in series.items():
        percent = 100 * values[:, shown]
        cells = [f"{mean:9.2f} +-{std:4.2f}" for mean, std in zip(percent.mean(0), percent.std(0))]
        print(f"{mode:24}" + "".join(cells))


# ---- Fig. 4 --------------------------------------------------------------------------------------


def read_pseudo_miou(folder):
    """{iterations after stage 0: mIoU of the pseudo-labels, the mean over both models}."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise common.UserError(
            f"{folder}: has no readable log.jsonl ({error}); expected a run folder of rml.py"
        ) from None
    records = [record for record in records if "pseudo_miou_1" in record]
    common.need(
        records,
        f"{folder}: no pseudo-labels in its log.jsonl; expected a run of rml.py past stage 0, not "
        "--supervised",
    )
    begin = records[0]["step"] - records[0]["iteration"]
    points = {}
    for record in records:
        points[record["step"] - begin] = (record["pseudo_miou_1"] + record["pseudo_miou_2"]) / 2
    return points


def compare(folders, out):
    """Fig. 4: the mIoU of pseudo-labels of up to four runs of rml.py, as one picture."""
    common.need(
        len(folders) <= 4,
        f"compare: {len(folders)} runs are too many for one picture; name up to four",
    )
    names = [Path(folder).resolve().name for folder in folders]
    common.need(
        len(set(names)) == len(names),
        f"compare {' '.join(folders)}: two folders of the same name would be one curve; rename one",
    )
    runs = {name: read_pseudo_miou(Path(folder)) for name, folder in zip(names, folders)}
    steps = sorted(set.intersection(*(set(points) for points in runs.values())))
    common.need(
        len(steps) >= 2,
        f"compare {' '.join(folders)}: their logs have no two iterations in common; run them with "
        "the same --log-every",
    )
    series = {}
    for name, points in runs.items():
        series[name] = np.array([[points[step] for step in steps]])
    across = "iterations after stage 0", steps
    picture = common.draw_curves("mIoU of pseudo-labels (Fig. 4)", series, across)
    try:
        common.write_atomically(out, partial(picture.save, format="PNG"))
    except OSError as error:
        raise common.UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a file such as fig4.png"
        ) from None
    for name, (curve,) in series.items():
        print(f"{name:24}{curve[0]:6.1f} at first, {curve[-1]:6.1f} at last")
    print(f"picture   {out}")


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.command == "compare":
        compare(args.runs, args.out)
    else:
        couple(args)


if __name__ == "__main__":
    common.run_main(main)
