"""Re-distributing Biased Pseudo Labels for Semi-supervised Semantic Segmentation: A Baseline
Investigation (DARS). Ruifei He, Jihan Yang, Xiaojuan Qi. ICCV 2021, arXiv 2107.11279

In round 0 a network learns from the labeled pictures; in each later round it labels the unlabeled
pictures, and learns from both. A share alpha of all pixels is pseudo-labeled, the most confident
ones. One threshold for all classes would favor the frequent classes, so each class has a threshold
that gives the pseudo-labels the class distribution of the true labels (distribution alignment).
Many pixels share one confidence, so a threshold keeps too many of them: the right number is drawn
at random (random sampling). From round to round alpha and the range of random scales grow.

    python dars.py                                  drawn streets, on a CPU, in minutes
    torchrun --nproc_per_node=4 dars.py --dataset cityscapes --data-root DIR --labels 372

paper -> code                                   (what the paper leaves open: grep "# Open:" dars.py)
    Eq. 1, 2             losses of round 0, of self-training   train_supervised(), train(): step 3
    Eq. 3                R, D_KL, thresholds t_j               distribution(), divergence(), align()
    Eq. 4                pixels n_j wanted of each class       align()
    Algorithm 1          line 2; lines 3, 5, 6                 align(); select()
    Sect. 3.3, Table 6   progressive strategy                  make_rounds(); --alpha, --beta-max
    Tables 1 to 3        mIoU                                  PAPER_MIOU
    Table 4              ST, CBST, DA, DARS; TS; without IT    --pseudo; --temperature; --rounds 1
    Table 5              D_KL                                  summarize(): log and result.json
    Table 7; Table 8     test pictures; extra pictures         --predict; --preset 713 --extra 3000
    Fig. 4               loss at the start of a round          loss_pseudo in log.jsonl
    Figs. 1, 3, 5        distributions, confidences, gain      python tests/figure_dars.py RUN
"""

import argparse
import copy
import json
import math
import shutil
from fractions import Fraction
from functools import partial

import common  # before torch: it sets how torch's threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from common import ABOVE_0, IGNORE, all_reduce, integer, is_main, need, rank, real, to_tensor
from common import world_size

# ---- arguments -----------------------------------------------------------------------------------

# By dataset, preset and labels. alpha, beta_min, beta_max: one value for each round after round 0.
PAPER = {}
# Open: scales, size of test pictures; .5 to 2 of half size, half size   --scale --base-size
PAPER["cityscapes"] = dict(
    labels="372", size=(1024, 2048), crop=(361, 361), base_size=1024, scale=(0.25, 1.0),
    network="pspnet", backbone="resnet50", head="plain", weights="imagenet", batch_norm="sync",
    optimizer="sgd", lr=0.01, head_lr=10.0, weight_decay=1e-4,
    rounds=2, pseudo="dars", temperature=1.0, confidence="fp16",
    alpha=(0.2, 0.5), beta_min=(0.0, 0.2), beta_max=(0.0, 0.5),
    fresh_optimizer=False, restart_schedule=False, two_passes=False, photometric=False,
    batch_size=8, round0_batch_size=16, epochs=200,
    flip=True, workers=4, log_every=50, eval_every=20_000, save_every=1000)
# Drawn scenes and a small network from scratch: minutes on a CPU.
# Open: alpha for these; larger ones trained better, but left too little to align   --alpha
PAPER["streets"] = PAPER["cityscapes"] | dict(
    labels="16", size=(64, 128), crop=(64, 64), base_size=128, scale=(0.5, 1.5),
    backbone="tiny", weights="none", batch_norm="frozen",
    optimizer="adamw", lr=3e-3, head_lr=1.0, weight_decay=1e-2,
    alpha=(0.5, 0.8), beta_min=(0.2, 0.2), beta_max=(0.2, 0.4),
    batch_size=4, round0_batch_size=8, iterations=3000, round0_iterations=3000,
    workers=0, eval_every=1000, save_every=100)
# Open: alpha and beta where Table 6 has none; those of the authors' code. Other numbers of labels
# than 372 and 744 have the values of 372   --alpha, --beta-min, --beta-max
PAPER["cityscapes/744"] = PAPER["cityscapes"] | dict(labels="744", alpha=(0.4, 0.6))
PAPER["cityscapes/1/4"] = PAPER["cityscapes/744"]
PAPER["cityscapes-713"] = PAPER["cityscapes"] | dict(
    crop=(713, 713), base_size=2048, scale=(0.5, 2.0),
    alpha=(0.4, 0.65), beta_min=(0.0, 0.0))
PAPER["cityscapes-713/744"] = PAPER["cityscapes-713"] | dict(
    labels="744", beta_min=(0.0, 0.2), beta_max=(0.0, 0.25))
PAPER["cityscapes-713/1/4"] = PAPER["cityscapes-713/744"]
# Code: its round 0 passes over a list of 2,603 lines
PAPER["cityscapes-deeplabv2"] = PAPER["cityscapes"] | dict(
    network="deeplabv2", backbone="resnet101", batch_norm="affine-frozen", lr=0.002,
    alpha=(0.2, 0.45), beta_min=(0.0, 0.0), beta_max=(0.0, 0.0),
    batch_size=4, round0_iterations=32_537)
PAPER["vocaug"] = PAPER["cityscapes"] | dict(
    labels="1464", size=None, crop=(321, 321), base_size=400, scale=(0.5, 1.5),
    alpha=(0.4, 0.5), beta_min=(0.0, 0.0), beta_max=(0.0, 1 / 3), epochs=50)
PAPER["voc"] = PAPER["vocaug"] | dict(labels="1/8")
PAPER["camvid-tiny"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128), base_size=240,
    lr=2e-3, iterations=1000, round0_iterations=2000)
PAPER["camvid-cpu"] = PAPER["streets"] | common.CPU_PRESET | dict(
    base_size=0, flip=False, round0_batch_size=4, iterations=1200, round0_iterations=900)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=(360, 480), crop=(241, 321), base_size=480, scale=(0.5, 2.0))
PAPER["folder-tiny"] = PAPER["camvid-tiny"] | common.FOLDER["tiny"] | dict(base_size=256)
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | common.FOLDER["cpu"]
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | common.FOLDER["gpu"] | dict(
    crop=(321, 321), base_size=640)

# The paper's mIoU by flags and labels. Its baseline is round 0 alone; 2975 labels: its oracle.
PAPER_MIOU = {
    "cityscapes": {372: 69.64, 744: 71.30},  # Table 1
    "cityscapes --supervised --rounds 0": {372: 60.75, 744: 66.54, 2975: 73.80},
    "cityscapes --preset 713": {372: 72.78, 744: 74.32},
    "cityscapes --preset 713 --supervised --rounds 0": {372: 65.54, 744: 69.22, 2975: 76.60},
    "cityscapes --preset deeplabv2": {372: 64.20},  # Table 2
    "cityscapes --preset deeplabv2 --supervised --rounds 0": {372: 56.2, 2975: 66.9},
    "vocaug": {1464: 73.89},  # Table 3
}
METHODS = "st", "cbst", "da", "dars"  # Table 4
for flags, miou in {
    "--pseudo st --rounds 1": 65.70, "--pseudo st": 66.59,  # one round; IT
    "--pseudo cbst --rounds 1": 66.29, "--pseudo cbst": 67.20, "--rounds 1": 68.01,
    "--pseudo st --rounds 1 --temperature 1.27": 65.89,  # TS
    "--pseudo cbst --rounds 1 --temperature 1.27": 66.61,
    "--pseudo da --rounds 1 --temperature 1.27": 67.31,
    "--rounds 1 --beta-min 0.2 --beta-max 0.5": 67.54,  # Table 6
    "--alpha 0.2 0.2 --beta-min 0 0 --beta-max 0 0": 68.27,
    "--beta-min 0 0 --beta-max 0 0": 68.93,
}.items():
    PAPER_MIOU[f"cityscapes {flags}"] = {372: miou}
for extra, miou in (3000, 78.43), (6000, 78.64), (9000, 78.70):  # Table 8
    flags = f"--preset 713 --extra {extra} --iterations 75000 --round0-iterations 37187"
    PAPER_MIOU[f"cityscapes {flags}"] = {2975: miou}


def paper_miou(args):
    """The paper's mIoU of the setting that these arguments make, or None."""
    for flags, values in PAPER_MIOU.items():
        row = common.parse_args(get_parser(), PAPER, f"--dataset {flags}".split())
        names = {"dataset", "supervised", "table_preset", *args.changed, *row.changed}
        if all(getattr(args, name) == getattr(row, name) for name in names):
            return values.get(args.labels)


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=common.idea(__doc__),
        epilog="Defaults: the table PAPER in dars.py, by dataset, preset (cityscapes: 713, "
        "deeplabv2) and labels; a run writes all values to args.json.")
    add = parser.add_argument_group("distribution alignment and random sampling").add_argument
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--pseudo", choices=METHODS, help="st: one threshold; cbst: the same share "
        "of each predicted class; da: aligned; dars: aligned, then sampled (Table 4)")
    add("--temperature", **real(ABOVE_0),
        help="temperature of the softmax that gives the confidence (TS in Tables 4, 5: 1.27)")
    add("--confidence", choices=["fp16", "fine"],
        help="fp16, or fine: 1 - confidence as fp16, with hardly any ties (Fig. 3)")
    add("--rounds", **integer(0, 1000),
        help="rounds of self-training after round 0 (Table 4: 1; with iterative training 2)")
    add("--alpha", **real(ABOVE_0, 1), nargs="+",
        help="labeling ratio, in (0, 1], one for each round (Sect. 3.3, Table 6)")
    add("--beta-min", **real(0, 0.99), nargs="+",
        help="how far the lower end of --scale falls, one for each round (Sect. 3.3)")
    add("--beta-max", **real(0, 4), nargs="+",
        help="how far the upper end of --scale rises, one for each round (Sect. 3.3)")
    add("--epochs", **integer(1), help="instead of --iterations: passes over the "
        "unlabeled pictures, in round 0 over the labeled ones (Sect. 4.1)")
    add("--round0-iterations", **integer(0),
        help="iterations of round 0 (default: from the table, or from --iterations or --epochs)")
    add("--round0-batch-size", **integer(1), help="labeled pictures a step in round 0")
    add("--restart-schedule", **switch, help="each round starts at the full --lr")
    add("--fresh-optimizer", **switch, help="each round starts without momentum")
    add("--two-passes", **switch, help="labeled and unlabeled pictures pass the network apart")
    add("--photometric", **switch, help="colors of all pictures change at random (not the paper's)")
    common.add_arguments(parser)
    return parser


# ---- perturbations -------------------------------------------------------------------------------

# OpenCV's 5 x 5 kernel, as the authors' code; PIL needs 1/8 of torchvision's time.
BINOMIAL = [1, 4, 6, 4, 1]
BLUR = ImageFilter.Kernel((5, 5), np.outer(BINOMIAL, BINOMIAL).flatten().tolist())


def rotate_and_blur(image, label, top, left, crop, generator, photometric=False):
    """Rotation by up to 10 degrees, the crop, and Gaussian blur of a scaled picture (Sect. 4.1).

    image (3, H, W) uint8, label (H, W) uint8 -> image (3, h, w), label (h, w); beyond the picture
    the mean color and 255, which the blur does not mix in. photometric: new colors, too."""
    # Open: order and strength; scale, then blur and rotation with probability .5 each, crop and
    # flip, for labeled and unlabeled pictures (authors' code, but for the blur's place)   --scale
    rotate = generator.uniform() < 0.5
    angle = rotate * math.radians(generator.uniform(-10, 10))
    blur = generator.uniform() < 0.5
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    center = np.array(label.shape[::-1]) / 2  # x, y
    corner = np.array([left, top]) - center  # of the crop
    offset = (rotation * corner).sum(1) + center
    matrix = np.column_stack([rotation, offset]).flatten().tolist()  # from the crop to the picture
    transform = tuple(crop[::-1]), Image.AFFINE, matrix
    if photometric:  # our addition: self-training repeats itself where both views look the same
        image = common.distort(image, generator)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if blur:
        picture = picture.filter(BLUR)
    picture = picture.transform(*transform, Image.BILINEAR, fillcolor=common.MEAN_COLOR)
    mask = Image.fromarray(label.numpy())
    mask = mask.transform(*transform, Image.NEAREST, fillcolor=IGNORE)
    return to_tensor(np.asarray(picture)), torch.from_numpy(np.array(mask))


# ---- EMA -----------------------------------------------------------------------------------------
# There is no EMA: the teacher of a round is the student at the end of the round before.

# ---- pseudo-labels -------------------------------------------------------------------------------

CODES = 15_361  # so many fp16 numbers lie in 0..1; the code of one is its bits as an integer


@torch.no_grad()
def predict_picture(teacher, image, args):
    """Class and code of the confidence of each pixel: (3, H, W) uint8 -> (H, W) uint8, int16.

    confidence_values() has the confidence of each code; a larger code is a larger confidence."""
    # Open: windows and mirrored pictures; the mean of logits in fp32, since bf16 would make
    # confidences overlap. (Validation: of probabilities, as the authors' code)   --base-size --flip
    size = image.shape[1:]
    logits = common.predict(teacher, image[None], args, size, logits=True, precision="fp32")[0]
    logits = logits / args.temperature  # (K, H, W)
    highest, label = logits.max(0)
    ratio = (logits - highest).exp_()  # of each class's probability to the highest one
    others = ratio.scatter_(0, label[None], 0.0).sum(0)  # (H, W)
    need(not others.isnan().any(), "the teacher's predictions are not finite; try a lower --lr")
    # Open: precision of stored confidences; 16-bit floats, so all above 1 - 2^-12 are 1 (authors'
    # code). "fine" stores 1 - confidence as one: hardly any two pixels overlap   --confidence
    if args.confidence == "fp16":
        code = (1 / (1 + others)).half().view(torch.int16)  # max of softmax
    else:
        code = CODES - 1 - (others / (1 + others)).half().view(torch.int16)
    return label.byte(), code


def confidence_values(args):
    """The confidence of each code, as a list of floats."""
    values = np.arange(CODES, dtype=np.uint16).view(np.float16).astype(float)
    if args.confidence == "fine":
        values = 1 - values[::-1]
    return values.tolist()


def distribution(counts):
    """R of Eq. 3: the share of each class, r_j. counts (K,) -> (K,) float64, with sum 1 or 0."""
    return counts.double() / counts.sum().clamp(min=1)


def divergence(r_l, r_u):
    """D_KL = sum_j r_l[j] log(r_l[j] / r_u[j]) (K,), (K,) -> float; inf if r_u lacks a class."""
    known = r_l > 0
    ratio = r_l[known] / r_u[known]
    return float((r_l[known] * ratio.log()).sum())  # Eq. 3


def align(table, labels, alpha, method):
    """Distribution alignment: Algorithm 1, line 2, and the counts of line 5.

        n_j = alpha N_u H W r^l_j                                          Eq. 4
        t_j = the n_j-th largest confidence of the pixels predicted as j   Eq. 3

    table (K, 15361) int64: predicted pixels by class and code; labels (K,) int64: labeled pixels by
    class; alpha in (0, 1]. Returns (K,) int64 each: threshold: the code of t_j; kept: n~_j, the
    pixels of class j with confidence >= t_j; wanted: n_j, at most n~_j (not sampled: n~_j)."""
    at_least = table.flip(1).cumsum(1).flip(1)  # pixels whose code is this or a larger one
    predicted = at_least[:, 0]
    pixels = int(predicted.sum())  # N_u H W
    # Open: rounding, and too few predictions of a class; n_j is rounded down, a class with fewer
    # than n_j predicted pixels keeps all, and no other class gets more (authors' code)
    if method == "st":  # one threshold for all classes
        wanted = torch.full_like(predicted.double(), alpha * pixels)
    elif method == "cbst":  # the same share of each predicted class
        wanted = alpha * predicted.double()  # Code: the threshold is the (n_j + 1)-th largest
    else:
        wanted = alpha * pixels * labels.double() / labels.sum().clamp(min=1)  # Eq. 4
    wanted = wanted.floor().long()
    larger = at_least.sum(0) if method == "st" else at_least
    threshold = (larger >= wanted[:, None]).sum(1) - 1  # Eq. 3: t_j
    threshold = threshold.clamp(min=0)
    threshold = threshold.where((wanted > 0) & (predicted > 0), CODES)  # CODES: none is kept
    kept = F.pad(at_least, (0, 1)).gather(1, threshold[:, None])[:, 0]
    wanted = wanted.minimum(kept) if method == "dars" else kept
    return threshold, kept, wanted


def select(label, code, threshold, kept, wanted, generator):
    """Algorithm 1, lines 3 to 6: the pseudo-label of one picture, in numpy.
    label: argmax p (H, W) uint8; code (H, W) int16; threshold: t_j, kept: n~_j, wanted: n_j, from
    align() -> y~ (H, W) uint8, 255 where ignored."""
    pseudo_label = np.where(code >= threshold[label], label, np.uint8(IGNORE))  # line 3
    # Open: what is sampled; of each picture we ignore the share 1 - s_j of the pixels kept for j,
    # drawn from all of them, not only from those with confidence t_j (authors' code)
    for j in np.flatnonzero(wanted < kept):
        sampling_ratio = Fraction(int(wanted[j]), int(kept[j]))  # line 5: s_j = n_j / n~_j
        pixels = np.flatnonzero(pseudo_label == j)
        ignored = int((1 - sampling_ratio) * len(pixels))
        pseudo_label.flat[generator.choice(pixels, ignored, replace=False)] = IGNORE  # line 6
    return pseudo_label


def count_pixels(data, ids, device):
    """Labeled pixels of each class, (K,) int64. Each process counts its share of the pictures."""
    counts = torch.zeros(256, dtype=torch.int64)
    for id in ids[rank() :: world_size()]:
        counts += to_tensor(data.label(id)).flatten().bincount(minlength=256)
    return all_reduce(counts[: len(data.names)].to(device)).cpu()


def make_pseudo_labels(folder, teacher, data, unlabeled, labels, alpha, number, run, args):
    """Write pseudo-labels (PNG) and report.json of a round to a folder, if they are missing.

    labels (K,) int64: labeled pixels by class. Each process takes its share of the pictures."""
    drafts = run.folder / "predictions" / folder.name
    run.claim(folder)
    files = [folder / "report.json", *(common.pseudo_label_path(folder, id) for id in unlabeled)]
    complete = is_main() and all(path.exists() for path in files)
    complete = torch.tensor(int(complete), device=run.device)
    if all_reduce(complete):  # the main process decides
        return
    files[0].unlink(missing_ok=True)  # without it they count as incomplete

    # Predictions go to disk, 3 bytes a pixel, and are read again once the thresholds are known: one
    # pass of the network. The size of the table of counts does not depend on the pictures' number.
    share = unlabeled[rank() :: world_size()]
    classes = len(data.names)
    table = torch.zeros(classes * CODES, dtype=torch.int64, device=run.device)
    for done, id in enumerate(share, 1):
        if not (drafts / f"{id}.npz").exists():  # it does after an interrupted pass
            image = to_tensor(data.image(id)).to(run.device)
            label, code = predict_picture(teacher, image, args)
            write = partial(np.savez, label=label.cpu(), code=code.cpu())
            common.write_file(drafts / f"{id}.npz", write)
        draft = read_draft(drafts, id)
        label, code = (to_tensor(x).to(run.device).flatten() for x in draft)
        table += torch.bincount(label * CODES + code, minlength=classes * CODES)
        common.progress(f"round {number}, predictions", done, len(share))
    table = all_reduce(table).view(classes, CODES).cpu()

    threshold, kept, wanted = (x.numpy() for x in align(table, labels, alpha, args.pseudo))
    counts = torch.zeros(256, dtype=torch.int64)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for done, id in enumerate(share, 1):
        label, code = read_draft(drafts, id)
        generator = common.rng(args.seed, "sampling", number, id)
        pseudo_label = select(label, code, threshold, kept, wanted, generator)
        common.write_pseudo_label(folder, id, pseudo_label, data.colors)
        truth = to_tensor(common.truth_for_the_log(data, id, label.shape))  # for the log alone
        pseudo_label = to_tensor(pseudo_label)
        counts += pseudo_label.flatten().bincount(minlength=256)
        matrix += common.confusion_matrix(truth, pseudo_label, classes)
        common.progress(f"round {number}, pseudo-labels", done, len(share))
    counts = all_reduce(counts[:classes].to(run.device)).cpu()
    matrix = all_reduce(matrix.to(run.device)).cpu()

    pixels = int(table.sum())
    confidences = [*confidence_values(args), None]  # None: no pixel is kept
    expected = {method: summarize(align(table, labels, alpha, method)[2], labels, pixels)
                for method in METHODS}  # from the same predictions (Tables 4, 5)
    report = {
        "round": number, "alpha": alpha, "pixels": pixels, "expected": expected,
        "labeled_share": distribution(labels).tolist(),
        "predicted_share": distribution(table.sum(1)).tolist(),
        "threshold": [confidences[code] for code in threshold],
        "kept": kept.tolist(), "wanted": wanted.tolist(),
        "pseudo_miou": common.mean_iou(matrix), **summarize(counts, labels, pixels),
    }  # fmt: skip
    if is_main():
        run.write_json(files[0].relative_to(run.folder), report)
    absent = [name for name, count in zip(data.names, counts) if count == 0]
    if absent:
        common.warn(f"round {number}: no pseudo-label has {', '.join(absent)}")
    common.say(f"round {number}: D_KL {report['d_kl']:.4f} (ST: {expected['st']['d_kl']:.4f})")
    common.barrier()


def summarize(counts, labels, pixels):
    """Pseudo-labels with these counts (K,): share of each class, D_KL (Table 5), coverage."""
    share = distribution(counts)
    d_kl = divergence(distribution(labels), share)
    return {"share": share.tolist(), "d_kl": d_kl, "coverage": int(counts.sum()) / pixels}


def read_draft(folder, id):
    """What predict_picture() said of this picture, from disk, as arrays."""
    with np.load(folder / f"{id}.npz") as draft:
        return draft["label"], draft["code"]


# ---- losses --------------------------------------------------------------------------------------

# Open: PSPNet's auxiliary head; the weight of its loss is .4 (authors' code)
HEADS = {"": 1.0, "_aux": 0.4}  # suffix in the log and weight of each head


def cross_entropy(logits, label):
    """L of Eqs. 1, 2: mean over valid pixels, or 0. (B, K, H, W), (B, H, W) with 255 -> 0-dim.

    DDP averages gradients over processes, so each one returns its share times their number."""
    # Open: what L divides by; the pixels of a batch that are not ignored
    valid = all_reduce((label != IGNORE).sum())
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total * world_size() / valid.clamp(min=1)


# ---- training ------------------------------------------------------------------------------------

def set_learning_rate(optimizer, progress, number, args):
    """lr ((1 - t) / (k + 1))^.9; t: progress of round k = number, 0 to 1. Heads: times head_lr."""
    # Open: the start of round k; lr / (k + 1)^.9, as in the authors' code   --restart-schedule
    # Open: learning rate of the heads; ten times the backbone's (authors' code)   --head-lr
    decay = 1 - progress
    if not args.restart_schedule:
        decay = decay / (number + 1)
    common.decay_lr(optimizer, decay**0.9)


def train_supervised(args, iterations, views, data, labeled_ids, keep, learner, run, note):
    """Round 0, and the baseline: learn from the labels alone.

    views: scale and cut of a Stream; keep: what last.pt holds; learner: the student, over all
    processes; note(tables): more numbers for the log of an evaluation."""
    student = keep["student"]
    optimizer, scaler = keep["optimizer"], keep["scaler"]
    begin = run.restore(keep)
    stream = common.Stream(data, labeled_ids, "labeled, round 0", args, **views)
    run.images = args.round0_batch_size
    batches = common.batches(stream, args, run.device, begin, iterations, run.images)
    for iteration, labeled in enumerate(batches, begin):
        # 1 batch: labeled pictures
        image = labeled["image"]  # (B, 3, H, W)
        label = labeled["label"]  # (B, H, W)
        # 2 pseudo-labels: none
        # 3 losses
        common.seed_torch(args.seed, "noise", 0, iteration, rank())  # dropout
        with common.autocast(args, run.device):
            outputs = learner(common.to_float(image), aux=True)  # (B, K, h, w) of each head
        losses = {}
        for (head, weight), logits in zip(HEADS.items(), outputs):
            logits = common.upsample(logits, args.crop, student.stride)  # (B, K, H, W)
            losses[f"loss_labeled{head}"] = weight * cross_entropy(logits, label)
        loss = sum(losses.values())  # Eq. 1

        # 4 backward
        set_learning_rate(optimizer, iteration / iterations, 0, args)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        common.average_buffers([student])

        # 5 EMA: none
        # 6 log, evaluate, save
        lr = optimizer.param_groups[0]["lr"]
        run.step(iteration, losses, lr=lr)
        if run.due():
            tables = run.evaluate({"student": student}, note=note)
            keep["results"]["round_0"] = tables["student"]
            draw(run, image, label)
        run.save(iteration, keep)


def train(args, number, iterations, alpha, views, data, labeled_ids, unlabeled_ids, labels,
          keep, learner, run, note):
    """Round k = number: make pseudo-labels, then learn from labels and pseudo-labels.

    alpha: labeling ratio; labels (K,): labeled pixels by class; others as in train_supervised()."""
    student, teacher = keep["student"], keep["teacher"]
    optimizer, scaler = keep["optimizer"], keep["scaler"]
    begin = run.restore(keep)
    if begin == 0:
        teacher.load_state_dict(student.state_dict())  # Sect. 3.1, step 2
    folder = run.folder / "pseudo_labels" / f"round_{number}"
    make_pseudo_labels(folder, teacher, data, unlabeled_ids, labels, alpha, number, run, args)
    shutil.rmtree(run.folder / "predictions", ignore_errors=True)
    report = json.loads((folder / "report.json").read_text())
    keep["reports"][folder.name] = report
    streams = [common.Stream(data, labeled_ids, f"labeled, round {number}", args, **views),
               common.Stream(data, unlabeled_ids, f"unlabeled, round {number}", args,
                             pseudo_labels=folder, **views)]
    batches = [common.batches(stream, args, run.device, begin, iterations) for stream in streams]
    run.images = 2 * args.batch_size

    for iteration, (labeled, unlabeled) in enumerate(zip(*batches), begin):
        # 1 batch: labeled pictures, and as many unlabeled ones
        image = torch.cat([labeled["image"], unlabeled["image"]])  # (2B, 3, H, W)
        label = labeled["label"]  # (B, H, W)

        # 2 pseudo-labels: those of the round, cropped with their pictures
        pseudo_label = unlabeled["label"]  # (B, H, W)

        # 3 losses
        common.seed_torch(args.seed, "noise", number, iteration, rank())  # dropout
        # Code: a pass for each half, with batch statistics of this half; here one   --two-passes
        parts = image.chunk(2) if args.two_passes else [image]
        with common.autocast(args, run.device):
            outputs = [learner(common.to_float(part), aux=True) for part in parts]
        outputs = [torch.cat(logits) for logits in zip(*outputs)]  # (2B, K, h, w) of each head
        losses = {}
        for (head, weight), logits in zip(HEADS.items(), outputs):
            logits = common.upsample(logits, args.crop, student.stride)  # (2B, K, H, W)
            logits_labeled, logits_pseudo = logits.chunk(2)
            losses[f"loss_labeled{head}"] = weight * cross_entropy(logits_labeled, label)
            losses[f"loss_pseudo{head}"] = weight * cross_entropy(logits_pseudo, pseudo_label)
        loss = sum(losses.values())  # Eq. 2

        # 4 backward
        set_learning_rate(optimizer, iteration / iterations, number, args)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        common.average_buffers([student])

        # 5 EMA: none
        # 6 log, evaluate, save
        numbers = {name: report[name] for name in ("d_kl", "pseudo_miou")}
        numbers["pseudo_coverage"] = report["coverage"]
        lr = optimizer.param_groups[0]["lr"]
        run.step(iteration, losses, {"pseudo_label": pseudo_label}, lr=lr, **numbers)
        if run.due():
            shown = {"student": student, "teacher": teacher}
            tables = run.evaluate({"student": student}, shown, note)
            keep["results"][folder.name] = tables["student"]
            draw(run, image, torch.cat([label, pseudo_label]))
        run.save(iteration, keep)


def draw(run, image, target):
    """pictures/batch_MARK.png: half of a batch, and the labels that the student learns."""
    run.panel(f"batch_{run.mark}", {"picture": image[::2], "label": target[::2]})


def tail_classes(labels):
    """Class ids of the tail, for labeled pixels by class (K,)."""
    # Open: which classes; all but the 6 of 19 most frequent (the 13 of Table 4), in proportion
    order = torch.argsort(labels, descending=True, stable=True).tolist()
    return sorted(order[len(labels) * 6 // 19 :])


def tail_miou(table, tail):
    """mIoU of the tail classes in percent, from a confusion matrix; NaN if none is there."""
    return float(common.iou(table)[tail].nanmean())


# ---- main ----------------------------------------------------------------------------------------

def check(args):
    """A UserError for values that do not fit each other."""
    for name in ("alpha", "beta_min", "beta_max"):
        count = len(getattr(args, name))
        enough = count == args.rounds or (count > args.rounds and name not in args.given)
        need(enough, f"{common.flag(name)} has {count} values, but there are --rounds "
             f"{args.rounds}: give one for each")
    need(args.round0_batch_size % world_size() == 0, f"--round0-batch-size "
         f"{args.round0_batch_size} is not divisible by the {world_size()} processes")


def make_rounds(args, labeled, unlabeled):
    """The table of rounds: [(number, iterations, alpha, range of random scales), ..]."""
    for name in {"iterations", "round0_iterations"} - set(args.given):
        if "epochs" in args.given:  # it replaces the iterations of PAPER
            setattr(args, name, None)
    iterations = args.iterations
    round0_iterations = args.round0_iterations
    if round0_iterations is None:
        round0_iterations = iterations
    if round0_iterations is None:
        round0_iterations = args.epochs * len(labeled) // args.round0_batch_size
    if iterations is None:
        iterations = args.epochs * len(unlabeled) // args.batch_size
    low, high = args.scale
    # Open: steps of the baseline; those of all rounds together, or of round 0   --rounds 0
    if args.supervised:
        return [(0, round0_iterations + args.rounds * iterations, 0.0, (low, high))]
    rounds = [(0, round0_iterations, 0.0, (low, high))]
    for k in range(args.rounds):
        lower = (1 - args.beta_min[k]) * low  # Sect. 3.3
        upper = (1 + args.beta_max[k]) * high
        rounds.append((k + 1, iterations, args.alpha[k], (lower, upper)))
    return rounds


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    check(args)
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    rounds = make_rounds(args, labeled, unlabeled)
    for number, iterations, alpha, (low, high) in rounds:
        common.say(f"round {number}   {iterations} iterations, alpha {alpha}, "
                   f"scale {low:.2f} to {high:.2f}")
    student = common.build_network(args, data, device, aux=True)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    method = "dars-supervised" if args.supervised else "dars"
    stages = {row[0]: row[1] for row in rounds}
    run = common.Run(method, args, data, labeled, unlabeled, device, stages, "student", "round")
    learner = common.parallel(student, device)  # the student, over all processes
    labels = count_pixels(data, labeled, device)
    tail = tail_classes(labels)

    def note(tables):  # for the log, beside the mIoU of an evaluation
        return {"tail_miou": tail_miou(tables["student"], tail)}

    optimizer = common.make_optimizer(args, args.lr, student)
    results = {}  # of each round: the confusion matrix on val
    reports = {}  # and what its pseudo-labels are
    for number, iterations, alpha, scale in rounds:
        if not run.enter(number):
            continue
        # Open: momentum; carried over rounds, as in the authors' code   --fresh-optimizer
        if args.fresh_optimizer:
            optimizer = common.make_optimizer(args, args.lr, student)
        scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        keep = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
        keep |= {"results": results, "reports": reports}
        cut = partial(rotate_and_blur, photometric=args.photometric)
        views = {"scale": scale, "cut": cut}
        if number == 0:
            train_supervised(args, iterations, views, data, labeled, keep, learner, run, note)
        else:
            train(args, number, iterations, alpha, views, data, labeled, unlabeled, labels,
                  keep, learner, run, note)
        if iterations == 0:
            tables = common.evaluate({"student": student}, data, args, device)
            results[f"round_{number}"] = tables["student"]
    # Open: which network; the last student, by windows and with mirrored pictures   --flip
    results["student"] = results.pop(f"round_{number}")
    run.finish({"student": student}, paper_miou(args), results, rounds=list(reports.values()),
               tail_classes=[data.names[j] for j in tail],
               tail_miou={name: tail_miou(table, tail) for name, table in results.items()})


if __name__ == "__main__":
    common.run_main(main)
