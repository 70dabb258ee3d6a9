"""Re-distributing Biased Pseudo Labels for Semi-supervised Semantic Segmentation: A Baseline Investigation (DARS)
Ruifei He, Jihan Yang, Xiaojuan Qi. ICCV 2021, arXiv 2107.11279

Self-training in rounds. A network learns from the labeled pictures (round 0); then it labels the unlabeled ones, and goes on with both.
Of its predictions only the most confident share alpha of all pixels becomes pseudo-labels. One threshold for all classes would
favour the frequent ones, so each class gets a threshold of its own, such that the pseudo-labels have the class distribution
of the true labels (distribution alignment). Many pixels share one confidence, so a threshold alone keeps too many of a class: among those that it
keeps, the right number is drawn at random (random sampling). From round to round alpha grows, and so does the range of random scales.

    python dars.py                                                                       drawn streets, a CPU, minutes
    torchrun --nproc_per_node=4 dars.py --dataset cityscapes --data-root DIR --labels 372

paper -> code
    Eq. 1, 2   losses of round 0 and of self-training        train(), step 3
    Eq. 3      distributions, divergence, thresholds         distribution(), divergence(), align()
    Eq. 4      pixels wanted of each class                   align()
    Algorithm 1, lines 2-3: align(), select();  lines 5-6: align() counts, select() draws
    Sect. 3.3  progressive labeling and augmentation         PAPER: alpha, beta_min, beta_max; main() makes the table of rounds
    Table 4    ST, CBST, DA, DARS, TS; iterative training    --pseudo, --temperature 1.27, --rounds 1 or 2
    Table 5    D_KL                                          make_pseudo_labels(): printed for all four, in result.json
    Table 6    --alpha, --beta-min, --beta-max;  Table 7: --predict;  Table 8: --preset 713 --labels 2975 --extra 3000
    Fig. 1, 3  bars and histograms                           pictures/distribution_*.png, pictures/confidence_*.png
    Fig. 4     loss at the start of a round                  loss_pseudo in log.jsonl
    Fig. 5     gain of four groups, accuracy by size         analyze(): in result.json, of the last student (the paper's: of the baseline)

Choices that the paper leaves open, and why
    Confidence overlap depends on how finely a confidence is kept. Here, as in the authors' code, it is a 16-bit float: all above 1 - 2^-12
        are 1. "fine" keeps 1 - confidence as such a float: hardly any overlap is left then.          --confidence fine
    One pass of the network for each round: class and confidence of each pixel go to disk (3 bytes: 16.4 GB for the 2,603 unlabeled pictures of
        Cityscapes 1/8) and are read again once the thresholds are known, instead of 16 windows through the network again. The thresholds
        come from a table of counts, classes x 15,361 values, and are those of a full sort; its size does not depend on the number of pictures.
    n_j is rounded down. A class with fewer predictions than n_j gives all it has; the shortfall is not given to others. Sampling drops
        int(n - n s_j) of a picture's n pixels of class j, from all that are kept (not only from those at the threshold): the authors' rule.
    Pseudo-labels average logits over windows and flip, validation averages probabilities (authors' code). Pseudo-labels are predicted in
        fp32: in bf16, confidences overlap for reasons of their own.              no windows: --base-size 0, no flip: --no-flip
    Augmentation, both streams: scale (with antialiasing), rotation by up to 10 degrees and 5x5 blur with probability .5 each, crop, flip.
    Learning rate: within round k, lr ((1 - t) / (k + 1))^.9, t from 0 to 1 (authors' code). The optimizer starts anew.  --restart-schedule
    A step of rounds 1, 2, .. has --batch-size labeled and as many pseudo-labeled pictures, one of round 0 --round0-batch-size labeled ones.
        Each half's loss is its mean over the valid pixels of all processes; batch norm sees both halves together.
    The paper gives alpha and beta for Cityscapes 1/8, crop 361 (Table 6); the other rows of Cityscapes and VOC are the authors' code's. Other
        numbers of labels than 372 and 744 take those of 372. On streets and CamVid they are ours: larger alphas trained better, but
        left too few predictions to align.
    Head: ten times the learning rate (authors' code). Auxiliary head (PSPNet): weight .4.                    --head-lr
    Tail classes: all but the 6 of 19 most frequent of the labels, in proportion (the 13 of Table 4 on Cityscapes, whose printed
        means differ from their columns' by up to .7).
    The baseline (--supervised) is round 0 for as many steps as all rounds have together. The paper's own baseline is shorter: round 0,
        which result.json has as round_0.                                                                --supervised --rounds 0
    Reported: the student at the last iteration, by windows and flip as the authors do; without flip it is in result.json too.
"""

import argparse
import copy
import json
import math
import shutil
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import common
from common import IGNORE

# ---- arguments -------------------------------------------------------------------------------------------------------

# Per dataset, preset and labels, by the argument's name. alpha, beta_min, beta_max: of round 1, 2, ..
PAPER = {
    # Sect. 4.1: pictures of 2048 x 1024, crops of 361 scaled to a quarter up to the whole, windows over pictures of 1024 x 512.
    "cityscapes": dict(
        labels="372", size=(1024, 2048), crop=(361, 361), base_size=1024, scale=(.25, 1.), batch_size=8, round0_batch_size=16, epochs=200,
        alpha=(.2, .5), beta_min=(0., .2), beta_max=(0., .5), network="pspnet", backbone="resnet50", weights="imagenet", batch_norm="sync",
        head="plain", optimizer="sgd", lr=.01, head_lr=10., weight_decay=1e-4, flip=True, workers=4, log_every=50, eval_every=20_000, save_every=1000),
    # Drawn scenes and a small network from scratch, minutes on a CPU.
    "streets": dict(
        labels="16", size=(64, 128), crop=(64, 64), base_size=128, scale=(.5, 1.5), batch_size=4, round0_batch_size=8, iterations=3000,
        round0_iterations=3000, alpha=(.5, .8), beta_min=(.2, .2), beta_max=(.2, .4), network="pspnet", backbone="tiny", weights="none",
        batch_norm="frozen", head="plain", optimizer="adamw", lr=3e-3, head_lr=1., weight_decay=1e-2, flip=True, workers=0, log_every=50,
        eval_every=1000, save_every=100),
}
PAPER["cityscapes/744"] = PAPER["cityscapes/1/4"] = PAPER["cityscapes"] | dict(labels="744", alpha=(.4, .6))
PAPER["cityscapes-713"] = PAPER["cityscapes"] | dict(crop=(713, 713), base_size=2048, scale=(.5, 2.), alpha=(.4, .65), beta_min=(0., 0.))
PAPER["cityscapes-713/744"] = PAPER["cityscapes-713/1/4"] = PAPER["cityscapes-713"] | dict(labels="744", beta_min=(0., .2), beta_max=(0., .25))
PAPER["cityscapes-deeplabv2"] = PAPER["cityscapes"] | dict(network="deeplabv2", backbone="resnet101", batch_norm="frozen", weights="coco", batch_size=4, lr=.002,
                                                           alpha=(.2, .45), beta_min=(0., 0.), beta_max=(0., 0.))
PAPER["vocaug"] = PAPER["cityscapes"] | dict(labels="1464", size=None, crop=(321, 321), base_size=400, scale=(.5, 1.5), epochs=50,
                                             alpha=(.4, .5), beta_min=(0., 0.), beta_max=(0., 1 / 3))
PAPER["voc"] = PAPER["vocaug"] | dict(labels="1/8")
PAPER["camvid-cpu"] = PAPER["streets"] | dict(labels="1/8", size=(180, 240), crop=(96, 128), base_size=240, lr=2e-3, iterations=1000, round0_iterations=2000)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(labels="1/8", size=(360, 480), crop=(241, 321), base_size=480, scale=(.5, 2.))
# Pictures of one's own: at most so large, square crops at changing scale; all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(labels="1/1", size=(256,), crop=(128, 128), base_size=256)
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(labels="1/1", size=(640,), crop=(321, 321), base_size=640)

# The paper's mIoU (Tables 1, 2, 3), and of its supervised baseline.
PAPER_MIOU = {("cityscapes", None, 372): 69.64, ("cityscapes", None, 744): 71.30, ("cityscapes", "713", 372): 72.78, ("cityscapes", "713", 744): 74.32,
              ("cityscapes", "deeplabv2", 372): 64.20, ("vocaug", None, 1464): 73.89}
PAPER_SUPERVISED = {("cityscapes", None, 372): 60.75, ("cityscapes", None, 744): 66.54, ("cityscapes", None, 2975): 73.80,
                    ("cityscapes", "713", 372): 65.54, ("cityscapes", "713", 744): 69.22, ("cityscapes", "713", 2975): 76.60,
                    ("cityscapes", "deeplabv2", 372): 56.2}

METHODS = "st", "cbst", "da", "dars"


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     epilog="What is left out comes from the table PAPER at the top of dars.py, by dataset, preset and labels; a run writes all "
                                            "values to args.json. Presets: cityscapes 713, deeplabv2; camvid cpu, gpu.")
    a = parser.add_argument_group("distribution alignment and random sampling").add_argument
    a("--pseudo", choices=METHODS, default="dars", help="st: one threshold; cbst: one share of each predicted class; da: aligned; dars: aligned, then sampled (Table 4)")
    a("--temperature", type=float, metavar="T", default=1., help="of the softmax whose maximum is the confidence (TS of Tables 4, 5: 1.27)")
    a("--confidence", choices=["fp16", "fine"], default="fp16", help="how finely confidences are told apart (Fig. 3)")
    a("--rounds", type=int, metavar="N", default=2, help="of self-training after round 0 (Table 4: 1 without, 2 with iterative training)")
    a("--alpha", type=float, metavar="A", nargs="+", help="labeling ratio, in (0, 1], one for each round (Sect. 3.3, Table 6)")
    a("--beta-min", type=float, metavar="B", nargs="+", help="how far the lower end of --scale falls, one for each round (Sect. 3.3)")
    a("--beta-max", type=float, metavar="B", nargs="+", help="how far the upper end of --scale rises, one for each round (Sect. 3.3)")
    a("--epochs", type=int, metavar="N", help="instead of --iterations: passes over the unlabeled pictures, in round 0 over the labeled ones (Sect. 4.1)")
    a("--round0-iterations", type=int, metavar="N", help="of round 0 (default: the table's, or as --iterations or --epochs say)")
    a("--round0-batch-size", type=int, metavar="N", help="labeled pictures a step in round 0")
    a("--head-lr", type=float, metavar="X", help="the heads' learning rate, times --lr")
    a("--restart-schedule", action="store_true", help="each round starts at the full learning rate")
    common.add_arguments(parser)
    return parser


# ---- perturbations ---------------------------------------------------------------------------------------------------

# 5x5 Gaussian with sigma 1.1, what OpenCV takes for this size in the authors' code. (PIL: an eighth of the time of torchvision's on a CPU.)
BLUR = ImageFilter.Kernel((5, 5), [math.exp(-(x * x + y * y) / (2 * 1.1 ** 2)) for y in range(-2, 3) for x in range(-2, 3)])


def rotate_and_blur(image, label, top, left, crop, generator):
    """Rotation of the scaled picture by up to 10 degrees, Gaussian blur, each with probability .5, and the crop (Sect. 4.1).

    Only the crop's pixels are computed, and two more on each side for the blur. image (3, H, W) uint8, label (H, W) uint8 -> image (3, h, w),
    label (h, w); beyond the picture the mean colour and 255."""
    rotate, angle, blur = generator.uniform() < .5, generator.uniform(-10, 10), generator.uniform() < .5
    angle = math.radians(angle) if rotate else 0.
    height, width = label.shape
    cos, sin, x, y = math.cos(angle), math.sin(angle), left - 2 - width / 2, top - 2 - height / 2
    matrix = cos, -sin, cos * x - sin * y + width / 2, sin, cos, sin * x + cos * y + height / 2  # of the crop's pixels in the picture
    size = crop[1] + 4, crop[0] + 4
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=common.MEAN_COLOR)
    label = Image.fromarray(label.numpy()).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=IGNORE)
    if blur:
        picture = picture.filter(BLUR)
    image, label = np.array(picture)[2:-2, 2:-2], np.array(label)[2:-2, 2:-2]
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label.copy())


# ---- EMA -------------------------------------------------------------------------------------------------------------
# None: the teacher of a round is the student at the end of the round before.


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------

CODES = 15_361  # 16-bit floats from 0 to 1, as integers: a larger one is a larger float


@torch.no_grad()
def predict_picture(teacher, image, args):
    """Predicted class and confidence of each pixel: image (3, H, W) uint8 -> label (H, W) uint8, code (H, W) int16 in 0..15360."""
    exact = argparse.Namespace(**vars(args) | {"precision": "fp32"})  # bf16 logits would make confidences overlap
    logits = common.predict(teacher, image[None], exact, image.shape[1:], logits=True)[0] / args.temperature  # (K, H, W)
    highest, label = logits.max(0)
    others = (logits - highest).exp_().scatter_(0, label[None], 0.).sum(0)  # of softmax: the other classes' share over the highest's
    if args.confidence == "fp16":
        code = (1 / (1 + others)).half().view(torch.int16)  # max of softmax
    else:
        code = CODES - 1 - (others / (1 + others)).half().view(torch.int16)
    if others.isnan().any():
        raise common.UserError("the teacher's predictions are not finite; try a lower --lr")
    return label.to(torch.uint8), code


def distribution(counts):
    """R of Eq. 3: share of each class, (K,) counts -> (K,) float64."""
    return counts.double() / counts.sum().clamp(min=1)


def divergence(labeled, pseudo):
    """D_KL of Eq. 3 between two distributions (K,); None, for infinite, where a class of the labels has no pseudo-label at all."""
    known = labeled > 0
    return finite(float((labeled[known] * (labeled[known] / pseudo[known]).log()).sum()))  # Eq. 3


def finite(x):
    """x, or None for what JSON has no word for."""
    return x if math.isfinite(x) else None


def align(table, labels, alpha, method):
    """Eqs. 3 and 4 and the counts of Algorithm 1.

    table (K, 15361) int64: predicted pixels by class and confidence; labels (K,) int64: labeled pixels by class; alpha in (0, 1]
    -> threshold (K,): a pixel of class j is kept from this code on; kept (K,): pixels from there on; wanted (K,): pixels to be
    left after sampling, n_j (without sampling: kept)."""
    at_least = table.flip(1).cumsum(1).flip(1)  # pixels of a class whose confidence is at least that of the column
    predicted = at_least[:, 0]
    if method == "st":  # one threshold for all classes
        n = torch.full_like(predicted, math.floor(alpha * int(predicted.sum())))
        threshold = (at_least.sum(0) >= n[:, None]).sum(1) - 1
    else:
        if method == "cbst":  # the same share of what is predicted of each class
            n = (alpha * predicted.double()).floor().long()
        else:
            n = (alpha * int(predicted.sum()) * labels.double() / labels.sum().clamp(min=1)).floor().long()  # Eq. 4
        threshold = ((at_least >= n[:, None]).sum(1) - 1).clamp(min=0)  # t_j is the n_j-th largest: Eq. 3; if there are fewer, all are kept
    threshold = threshold.where((n > 0) & (predicted > 0), CODES)  # nothing wanted or nothing predicted: no threshold, nothing kept
    kept = F.pad(at_least, (0, 1)).gather(1, threshold[:, None])[:, 0]
    return threshold, kept, (n.minimum(kept) if method == "dars" else kept)


def select(label, code, threshold, kept, wanted, generator):
    """The pseudo-label of one picture: Algorithm 1, lines 3 and 6.

    label (H, W) uint8, code (H, W) int16, threshold, kept, wanted (K,) from align(), all numpy -> (H, W) uint8, 255 where ignored."""
    pseudo_label = np.where(code >= threshold[label], label, IGNORE).astype(np.uint8)  # line 3
    for j in np.flatnonzero(wanted < kept):
        pixels = np.flatnonzero(pseudo_label == j)
        drop = len(pixels) * int(kept[j] - wanted[j]) // int(kept[j])  # line 5: the share 1 - s_j, s_j = n_j / n~_j
        np.put(pseudo_label, generator.choice(pixels, drop, replace=False), IGNORE)  # line 6
    return pseudo_label


def count_pixels(data, ids, device):
    """Labeled pixels of each class without ignored ones, and labeled pictures that show it: (K,), (K,) int64. Each process counts its share."""
    counts = torch.zeros(2, 256, dtype=torch.int64)
    for id in ids[common.rank()::common.world_size()]:
        pixels = torch.from_numpy(np.bincount(data.label(id).ravel(), minlength=256))
        counts += torch.stack([pixels, pixels > 0])
    return common.all_reduce(counts[:, :len(data.names)].contiguous().to(device)).cpu()


def make_pseudo_labels(teacher, data, unlabeled, labels, alpha, number, run, args, device):
    """Pseudo-labels of a round for all unlabeled pictures, as PNG in run.folder/pseudo_labels/round_<number>/.

    labels (K,): labeled pixels by class. Each process takes its share of the pictures. What is there already from the same
    round of this run is not made again. Returns what is told about them: a dict of numbers for result.json."""
    folder, drafts, K = run.folder / "pseudo_labels" / f"round_{number}", run.folder / "predictions" / f"round_{number}", len(data.names)
    run.claim(folder)
    there = common.is_main() and is_complete(folder, unlabeled)
    if common.all_reduce(torch.tensor(int(there), device=device)):  # the main process decides for all
        if there:
            shutil.rmtree(run.folder / "predictions", ignore_errors=True)
        return json.loads((folder / "report.json").read_text())
    if common.is_main():
        (folder / "report.json").unlink(missing_ok=True)
    share, teacher = unlabeled[common.rank()::common.world_size()], teacher.eval()

    table = torch.zeros(K * CODES, dtype=torch.int64, device=device)
    for done, id in enumerate(share, 1):  # one pass of the network: class and confidence of every pixel to disk
        draft = read_draft(drafts, id)  # of a pass that was interrupted after this picture
        if draft is None:
            draft = predict_picture(teacher, torch.from_numpy(data.image(id).transpose(2, 0, 1).copy()).to(device), args)
            write_draft(drafts, id, *(x.cpu().numpy() for x in draft))
        label, code = (torch.as_tensor(x, device=device).long().flatten() for x in draft)
        table += torch.bincount(label * CODES + code, minlength=K * CODES)
        common.progress(f"round {number}, predictions", done, len(share))
    table = common.all_reduce(table).view(K, CODES).cpu()

    report = {"round": number, "alpha": alpha, "pixels": int(table.sum()), "labeled_share": distribution(labels).tolist(),
              "predicted_share": distribution(table.sum(1)).tolist(), "expected": {}}
    counts_of = {}
    for method in METHODS:  # what each would keep of these predictions (Tables 4, 5)
        threshold, kept, wanted = align(table, labels, alpha, method)
        report["expected"][method] = {"share": distribution(wanted).tolist(), "d_kl": divergence(distribution(labels), distribution(wanted)),
                                      "coverage": int(wanted.sum()) / report["pixels"]}
        counts_of[method] = [x.numpy() for x in (threshold, kept, wanted)]
    threshold, kept, wanted = counts_of[args.pseudo]
    confidences = confidence_values(args) + [None]
    report |= {"threshold": [confidences[t] for t in threshold], "kept": kept.tolist(), "wanted": wanted.tolist()}

    counts, matrix = torch.zeros(256, dtype=torch.int64), torch.zeros(K, K, dtype=torch.int64)
    for done, id in enumerate(share, 1):
        label, code = read_draft(drafts, id)
        pseudo_label = select(label, code, threshold, kept, wanted, common.rng(args.seed, "sampling", number, id))
        common.write_pseudo_label(folder, id, pseudo_label, data.colors)
        counts += torch.from_numpy(np.bincount(pseudo_label.ravel(), minlength=256))
        matrix += common.confusion_matrix(*(torch.from_numpy(x.astype(np.int64)) for x in (common.truth_for_the_log(data, id, label.shape), pseudo_label)), K)
        common.progress(f"round {number}, pseudo-labels", done, len(share))
    counts, matrix = (common.all_reduce(x.to(device)).cpu() for x in (counts[:K], matrix))
    report |= {"share": distribution(counts).tolist(), "d_kl": divergence(distribution(labels), distribution(counts)),
               "coverage": int(counts.sum()) / report["pixels"], "pseudo_miou": finite(common.mean_iou(matrix))}
    if common.is_main():
        show(report, data, args)
        draw(report, table, counts_of["st"], unlabeled[:5], folder, drafts, data, run, args)
        run.write_json(f"pseudo_labels/round_{number}/report.json", report)
        shutil.rmtree(run.folder / "predictions", ignore_errors=True)
    common.barrier()
    return report


def is_complete(folder, unlabeled):
    return (folder / "report.json").exists() and all(common.pseudo_label_path(folder, id).exists() for id in unlabeled)


def draft_path(folder, id):
    return folder / f"{id}.npz"


def write_draft(folder, id, label, code):
    """Predicted class (H, W) uint8 and confidence code (H, W) int16 to disk: 3 bytes a pixel."""
    try:
        common.write_atomically(draft_path(folder, id), lambda file: np.savez(file, label=label, code=code))
    except OSError as error:
        raise common.UserError(f"{draft_path(folder, id)}: cannot be written ({error}); free some space, then the same command goes on") from None


def read_draft(folder, id):
    """What write_draft() wrote; None if it is not there, or broken."""
    try:
        with np.load(draft_path(folder, id)) as draft:
            return draft["label"], draft["code"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def confidence_values(args):
    """The confidence that each code stands for."""
    values = np.arange(CODES, dtype=np.uint16).view(np.float16).astype(float)
    return (values if args.confidence == "fp16" else 1 - values[::-1]).tolist()


def histograms(table, classes, names, args):
    """Fig. 3: categories (ranges of confidence) and series {class name: percent of its pixels} for draw_bars."""
    ranges = (np.array(confidence_values(args)) * 20).astype(int)  # 20 of .05, and exactly 1
    series = {}
    for j in classes:
        counts = np.bincount(ranges, weights=table[j].double().numpy(), minlength=21)
        series[names[j]] = (100 * counts / max(1, counts.sum())).tolist()
    return [f"{r / 20:.2f}" for r in range(20)] + ["= 1"], series


def told(d_kl):
    return "inf" if d_kl is None else f"{d_kl:.4f}"


def show(report, data, args):
    """Print the pseudo-labels of a round: by class, and Table 5 for all methods on the same predictions."""
    print(f"\nround {report['round']}: {100 * report['alpha']:.0f} % of the unlabeled pixels are to get a pseudo-label. Percent of each class in the labels, in all\n"
          "predictions, and in what ST (one threshold), CBST (one share of each class), DA (aligned) and DARS (aligned, sampled) would keep:")
    print(f"{'':14}{'labeled':>9}{'predicted':>11}" + "".join(f"{m.upper():>8}" for m in METHODS) + f"{'threshold of ' + args.pseudo.upper():>20}")
    for j, name in enumerate(data.names):
        shares = [report["labeled_share"][j], report["predicted_share"][j]] + [report["expected"][m]["share"][j] for m in METHODS]
        threshold = report["threshold"][j]
        threshold = "none kept" if threshold is None else "all kept" if threshold == 0 else f"{threshold:.4f}"
        print(f"{name:14}{100 * shares[0]:9.2f}{100 * shares[1]:11.2f}" + "".join(f"{100 * x:8.2f}" for x in shares[2:]) + f"{threshold:>20}")
    print(f"{'% of all pixels':34}" + "".join(f"{100 * report['expected'][m]['coverage']:8.2f}" for m in METHODS))
    print(f"{'D_KL':34}" + "".join(f"{told(report['expected'][m]['d_kl']):>8}" for m in METHODS))
    never = [name for name, share in zip(data.names, report["predicted_share"]) if share == 0]
    if never:
        common.warn(f"the teacher never predicts {', '.join(never)}: no pseudo-label can have it")
    print(f"written with {args.pseudo.upper()} (what is dropped is rounded down in each picture): D_KL {told(report['d_kl'])}, coverage {100 * report['coverage']:.2f} %, "
          + ("no truth known\n" if report["pseudo_miou"] is None else f"mIoU {report['pseudo_miou']:.1f} against the truth, which nothing learns from\n"), flush=True)


def draw(report, table, single_threshold, ids, folder, drafts, data, run, args):
    """The pictures of a round: Figs. 1 and 3, and what ST (single_threshold, its counts from align()) and the method keep of these ids."""
    series = {"true labels": report["labeled_share"], "ST": report["expected"]["st"]["share"], args.pseudo.upper(): report["share"]}
    run.picture(f"distribution_round_{report['round']}", common.draw_bars("share of each class, percent of pixels, square-root scale (Fig. 1)", data.names, {
        name: [100 * x for x in shares] for name, shares in series.items()}))
    confidences = np.array(confidence_values(args))
    columns = {"unlabeled picture": [], "truth (not used)": [], "teacher predicts": [], "confidence (white: 1)": [], "ST would keep": [], f"{args.pseudo.upper()} keeps": []}
    for id in ids:
        label, code = read_draft(drafts, id)
        confidence = (255 * confidences[code][None]).astype(np.uint8).repeat(3, 0)  # (3, H, W)
        shown = (data.image(id).transpose(2, 0, 1), common.truth_for_the_log(data, id, label.shape), label, confidence,
                 select(label, code, *single_threshold, None), common.read_pseudo_label(folder, id))
        for cells, array in zip(columns.values(), shown):
            cells.append(torch.from_numpy(array.copy()))
    run.panel(f"pseudo_round_{report['round']}", columns)
    predicted, share = torch.nonzero(table.sum(1)).flatten().tolist(), report["labeled_share"]
    head, tail = max(predicted, key=lambda j: share[j]), min(predicted, key=lambda j: share[j])
    title = "of the pixels that are predicted as a class: percent by confidence, in steps of .05; square-root scale (Fig. 3)"
    run.picture(f"confidence_round_{report['round']}", common.draw_bars(title, *histograms(table, [head, tail], data.names, args)))


# ---- losses ----------------------------------------------------------------------------------------------------------

AUX_WEIGHT = .4


def cross_entropy(logits, label, count):
    """Mean over the valid pixels of all processes, count (0-dim): logits (B, K, H, W), label (B, H, W) with 255 -> 0-dim; 0 if nothing is valid.

    Each process returns its share times their number, since gradients are averaged over processes."""
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") * common.world_size() / count.clamp(min=1)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args, rounds, data, labeled, unlabeled, device):
    student = common.build_network(args, data, device)
    run = common.OldRun("dars-supervised" if args.supervised else "dars", args, data, labeled, unlabeled, device, {number: iterations for number, iterations, _, _ in rounds})
    run.word = "round"
    teacher = copy.deepcopy(student).requires_grad_(False).eval()  # the student at the end of the round before
    learner = common.parallel(student, device)
    labels, pictures = count_pixels(data, labeled, device)
    lacking = [name for name, n in zip(data.names, labels.tolist()) if n == 0]
    if lacking:
        common.warn(f"no labeled picture has {', '.join(lacking)}: no pixel of it will get a pseudo-label (n_j = 0)")
    results, reports = [], []  # per round: confusion matrix on val at its end; what is told about its pseudo-labels

    for number, iterations, alpha, scale in rounds:
        if run.state and number < run.state["stage"]:
            continue
        optimizer = common.make_optimizer(args, args.lr, student.backbone.parameters(), student.head_parameters())
        scaler, begin = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"), 0

        def save(iteration):
            run.save("student", {"student": student, "teacher": teacher}, stage=number, iteration=iteration, optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict(), results=results, reports=reports)

        if run.state:  # go on where the checkpoint was written
            begin, results, reports = run.state["iteration"], run.state["results"], run.state["reports"]
            student.load_state_dict(run.state["models"]["student"])
            teacher.load_state_dict(run.state["models"]["teacher"])
            optimizer.load_state_dict(run.state["optimizer"])
            scaler.load_state_dict(run.state["scaler"])
            run.state = None
        else:
            teacher.load_state_dict(student.state_dict())
            save(0)
        streams = [common.Stream(data, labeled, f"labeled, round {number}", args, scale=scale, cut=rotate_and_blur)]
        if number:
            report = make_pseudo_labels(teacher, data, unlabeled, labels, alpha, number, run, args, device)
            reports = [r for r in reports if r["round"] < number] + [report]
            streams.append(common.Stream(data, unlabeled, f"unlabeled, round {number}", args, scale=scale, cut=rotate_and_blur,
                                         pseudo_labels=run.folder / "pseudo_labels" / f"round_{number}"))
        B = args.batch_size if number else args.round0_batch_size
        share, run.images = B // common.world_size(), B * len(streams)
        loaders = [common.batches(stream, args, device, begin, iterations, B) for stream in streams]

        for iteration, batch in enumerate(zip(*loaders), begin):
            # 1 batch: labeled pictures, and from round 1 on as many pseudo-labeled ones
            image = torch.cat([part["image"] for part in batch])  # (B or 2B, 3, H, W)

            # 2 pseudo-labels: those of the round, made before its first step, come with the batch
            targets = [part["label"] for part in batch]  # (B, H, W) each

            # 3 losses
            torch.manual_seed(int(common.rng(args.seed, "noise", number, iteration, common.rank()).randint(2 ** 31)))  # dropout
            with common.autocast(args, device):
                outputs = learner(common.to_float(image), aux=True)  # (2B, K, h, w) of the head, and of the auxiliary one
            losses, counts = {}, common.all_reduce(torch.stack([(y != IGNORE).sum() for y in targets]))
            for head, weight, logits in zip(("", "_aux"), (1, AUX_WEIGHT), outputs):
                logits = common.upsample(logits, args.crop, student.align_corners).split(share)
                for kind, z, y, count in zip(("labeled", "pseudo"), logits, targets, counts):
                    losses[f"loss_{kind}{head}"] = weight * cross_entropy(z, y, count)  # Eq. 1: labeled; Eq. 2: labeled + pseudo
            loss = sum(losses.values())

            # 4 backward
            decay = (1 - iteration / iterations) / (1 if args.restart_schedule else number + 1)
            for group, multiple in zip(optimizer.param_groups, (1, args.head_lr)):
                group["lr"] = args.lr * multiple * decay ** .9
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            common.average_buffers([student])

            # 5 EMA: none

            # 6 log, evaluate, save
            run.watch(number, iteration, losses)
            run.watch_pseudo_labels(*targets[1:])
            done, last = iteration + 1, iteration + 1 == iterations
            if done % args.log_every == 0 or last:
                run.log(number, done, lr=optimizer.param_groups[0]["lr"], **({"pseudo_coverage": reports[-1]["coverage"], "pseudo_miou": reports[-1]["pseudo_miou"],
                                                                              "d_kl": reports[-1]["d_kl"]} if number else {}))
            if done % args.eval_every == 0 or last:
                tables = common.evaluate({"student": student}, data, args, device)
                run.log(number, done, val=tables, tail_miou=tail_miou(tables["student"], labels))
                run.predictions(f"val_round_{number}_{done:06d}", {"student": student} | ({"teacher": teacher} if number else {}))
                columns = {"labeled picture": batch[0]["image"], "label": targets[0]}
                if number:
                    columns |= {"unlabeled picture": batch[1]["image"], "pseudo-label": targets[1]}
                run.panel(f"batch_round_{number}_{done:06d}", {title: cells[:4] for title, cells in columns.items()})
            if last:
                results = results[:number] + [tables["student"]]
            if done % args.save_every == 0 or last:
                save(done)

        if len(results) == number:  # a round of no iterations
            results = results + [common.evaluate({"student": student}, data, args, device)["student"]]
        loaders = batch = None  # their processes end

    names = [f"round_{number}" for number, *_ in rounds[:-1]] + ["student"]
    setting = args.dataset, args.table_preset, args.labels
    if args.supervised:  # the paper's baseline is round 0 alone
        paper = PAPER_SUPERVISED.get(setting) if args.changed == ["rounds"] and args.rounds == 0 else None
    else:
        paper = None if args.changed else PAPER_MIOU.get(setting)
    tail = {name: tail_miou(table, labels) for name, table in zip(names, results)}
    names_of_tail = [data.names[j] for j in tail_classes(labels)]
    common.say(f"\ntail mIoU ({', '.join(names_of_tail)}): " + ", ".join(f"{name} {x:.2f}" for name, x in tail.items() if x is not None))
    run.finish("student", dict(zip(names, results)), paper, rounds=reports, tail_classes=names_of_tail, tail_miou=tail,
               **analyze(student, results, data, labeled, labels, pictures, args, device))


# ---- analysis --------------------------------------------------------------------------------------------------------

def tail_classes(labels):
    """Class ids of the tail: all but the 6 of 19 most frequent, in proportion. labels (K,): labeled pixels by class."""
    order = torch.argsort(labels, descending=True, stable=True).tolist()
    return sorted(order[len(labels) * 6 // 19:])


def tail_miou(table, labels):
    """mIoU of the tail classes, from the confusion matrix."""
    return finite(float(common.iou(table)[tail_classes(labels)].nanmean()))


def analyze(student, results, data, labeled, labels, pictures, args, device):
    """Val without flip, gain of four groups of classes since round 0, and the student's accuracy by size, without flip too (Fig. 5), for result.json.

    There are no instances in these datasets' masks: an object is all pixels of one class in one picture. Its size is counted in crops.
    labels, pictures (K,): labeled pixels of a class, and labeled pictures that show it."""
    def crop_area(label):  # in the mask's pixels
        return args.crop[0] * args.crop[1] * ((max(label.shape) / args.base_size) ** 2 if args.base_size else 1)

    K, extra = len(data.names), {}
    frequent, large = pictures > len(labeled) / 2, labels / pictures.clamp(min=1) > crop_area(data.label(labeled[0])) / 10
    if len(results) > 1:
        gain, extra["groups"] = common.iou(results[-1]) - common.iou(results[0]), {}
        for name, members in (("frequent, large", frequent & large), ("frequent, small", frequent & ~large),
                              ("rare, large", ~frequent & large), ("rare, small", ~frequent & ~large)):
            extra["groups"][name] = {"classes": [data.names[j] for j in torch.nonzero(members).flatten().tolist()], "gain": finite(float(gain[members].nanmean()))}

    # Bins of .1, 2.4 and 8 % of a crop, ten of each: 500, 12,000 and 40,000 pixels of a crop of 713 x 713.
    area, plain = crop_area(data.label(data.val[0], args.full_size_labels)), argparse.Namespace(**vars(args) | {"flip": False})
    hits, widths = torch.zeros(3, 10, 2, dtype=torch.float64), [area * part for part in (.001, .024, .08)]
    total = torch.zeros(K, K, dtype=torch.int64)
    student.eval()
    for id in data.val[common.rank()::common.world_size()]:
        image = torch.from_numpy(data.image(id).transpose(2, 0, 1).copy())[None].to(device)
        label = data.label(id, args.full_size_labels)
        prediction = common.predict(student, image, plain, label.shape).argmax(1)[0]
        matrix = common.confusion_matrix(torch.from_numpy(label.astype(np.int64)).to(device), prediction, K).cpu()
        total += matrix
        for j, row in enumerate(matrix.tolist()):
            for i, width in enumerate(widths):
                if 0 < sum(row) < 10 * width:
                    hits[i, min(9, int(sum(row) / width))] += torch.tensor([row[j], sum(row)])
    hits, total = common.all_reduce(hits.to(device)).tolist(), common.all_reduce(total.to(device)).cpu()
    if args.flip:
        extra["miou_without_flip"] = finite(common.mean_iou(total))
    extra["accuracy_by_size"] = [{"pixels": [round(b * width), round((b + 1) * width)], "accuracy": 100 * hit / n if n else None}
                                 for width, row in zip(widths, hits) for b, (hit, n) in enumerate(row)]
    return extra


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    common.check_range(args, 1e-12, 1, "alpha")
    common.check_range(args, 0, .99, "beta_min")
    common.check_range(args, 0, math.inf, "beta_max", "rounds", "round0_iterations")
    common.check_range(args, 1, math.inf, "epochs")
    common.check_range(args, 1e-12, math.inf, "temperature", "head_lr")
    common.check_range(args, 1, math.inf, "round0_batch_size")
    for name in ("alpha", "beta_min", "beta_max"):
        count = len(getattr(args, name))
        if count < args.rounds or count > args.rounds and name in args.given:
            raise common.UserError(f"--{name.replace('_', '-')} has {count} values, but there are --rounds {args.rounds}: give one for each")
    synchronized = args.batch_norm == "sync" and device.type == "cuda" and common.world_size() > 1
    if args.network == "pspnet" and args.backbone != "tiny" and args.round0_batch_size == common.world_size() and not synchronized:
        raise common.UserError(f"--round0-batch-size {args.round0_batch_size}: batch norm needs two pictures in each process or more")
    if args.round0_batch_size % common.world_size():
        raise common.UserError(f"--round0-batch-size {args.round0_batch_size} is not divisible by the {common.world_size()} processes")
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)

    if "epochs" in args.given:  # goes before the iterations of the table
        args.iterations = args.iterations if "iterations" in args.given else None
        args.round0_iterations = args.round0_iterations if "round0_iterations" in args.given else None
    def steps(given, ids, batch_size):
        return given if given is not None else args.epochs * len(ids) // batch_size
    first = args.iterations if args.round0_iterations is None else args.round0_iterations
    (low, high), rounds = args.scale, [(0, steps(first, labeled, args.round0_batch_size), None, tuple(args.scale))]
    for k in range(args.rounds):
        scale = (1 - args.beta_min[k]) * low, (1 + args.beta_max[k]) * high  # Sect. 3.3
        rounds.append((k + 1, steps(args.iterations, unlabeled, args.batch_size), args.alpha[k], scale))
    if args.supervised:
        rounds = [(0, sum(iterations for _, iterations, _, _ in rounds), None, tuple(args.scale))]
    for number, iterations, alpha, scale in rounds:
        common.say(f"round {number}   {iterations} iterations, scale {scale[0]:.2f} to {scale[1]:.2f}"
                   + (f", pseudo-labels for {100 * alpha:.0f} % of the unlabeled pixels" if alpha else ""))
    train(args, rounds, data, labeled, unlabeled, device)


if __name__ == "__main__":
    common.run_main(main)
