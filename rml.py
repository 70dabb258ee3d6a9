"""Robust Mutual Learning for Semi-supervised Semantic Segmentation
Pan Zhang, Bo Zhang, Ting Zhang, Dong Chen, Fang Wen. arXiv 2106.00609

Two students learn side by side from few labeled and many unlabeled pictures. Each has a mean teacher, and each learns from the
pseudo-labels of both teachers: its peer's and its own. So that the two do not become one, each student sees strong
perturbations of its own (photometric RandAugment, CutMix) through a noisy network (dropout, stochastic depth). Before a teacher's
pseudo-label is used it is rectified by what the teacher knows of itself: a class is trusted where the features lie near its
prototype. When a stage ends, new pseudo-labels are predicted, and the next stage starts from those.

    python rml.py                                                                        drawn streets, a CPU, minutes
    torchrun --nproc_per_node=4 rml.py --dataset cityscapes --data-root DIR --labels 372

paper -> code
    Eq. 1   supervised loss                     train(), step 3: loss_labeled
    Eq. 2   pseudo-label over a threshold       hard_label(), --mutual none --threshold
    Eq. 3   direct mutual learning              MUTUAL["direct"]
    Eq. 4   pseudo-labels of mean teachers      train(), step 2; MUTUAL["indirect"] with --no-rectify is the IML of Table 4
    Eq. 5   peer and self supervision           train(), step 3: loss_pseudo
    Eq. 6   rectified pseudo-label              rectify(), hard_label()
    Eq. 9   class-wise confidence               rectify(); the equations 7 and 8 before it are its derivation, with equal weights pi
    Eq. 10  prototypes over all pictures        start_stage()
    Eq. 11  prototypes, moving average          update_prototypes()
    Sect. 4.1, 5.2  input and model noise       strong_view(), add_model_noise()
    Fig. 2  coupling of two learners on MNIST   couple(), --dataset mnist
    Fig. 4  pseudo-labels over time             compare(), --compare RUN RUN ..
    Table 4 ablations                           flags, see README.md
    Table 5 CNN and Transformer                 --network deeplabv2,setr; each_student(), common.SETR

Choices that the paper leaves open, and why
    Stage 0. Eqs. 1 and 6 need supervised models to begin with: both students are trained on labels alone, without noise, with a
        higher rate for the head, from different initialisations of the head, in different picture orders.   --stage0-iterations
    Start of a stage. Teachers restart as copies of the students; students go on; optimizer and schedule start anew.
    p^0, "the initial state" (Eq. 6): softmax on the whole, unaugmented picture, kept on disk at output stride in fp16, as in ProDA,
        where this rectification comes from. It and the prototypes come from the students of stage 0, later from the teachers of
        the stage before; the features f~ that they are compared with are those of the teachers of this stage.
    Distance (Eq. 9): plain Euclidean, features not normalised, temperature 1. The feature is what the last 1x1 conv sees (256-d,
        ProDA's head), since DeepLabv2's own head has no linear classifier: there it is layer4.              --head plain
    Eq. 10 as printed divides by HW|D| and is no centroid: here the mean over pictures of the class's mean feature, where the
        class has at least 10 cells.                                                                         --prototype-min-cells
    Eq. 11: eta' is the mean over the unlabeled batch and its CutMix partners (weak views, by the teacher's own argmax, without
        padding). An absent class is not updated; one never seen before takes eta' at once, until then its probability is 0.
    Rectification happens at DeepLabv2's output stride, 8 (tiny 4); finer features, as SETR's, are averaged over such cells, cells(). The
        product is divided by its sum, upsampled to the crop, then argmax. No threshold; with one, the mean is over the confident pixels,
        where Eq. 2 as printed is over all.                                                                  --threshold
    CutMix: one box, half of the area, always; the partner comes from a second, independent batch; the hard labels are mixed, after
        rectification.                                                                                       --no-cutmix
    "Batch size 4" is 4 labeled and 4 unlabeled pictures. Both students get the same weak views; only noise tells them apart.
    SETR (Table 5): variant, backbone and optimizer are not named: PUP on ViT-B/16, the same optimizer and rates, no auxiliary heads. Each
        student's features are rectified by its own prototypes. Position embeddings are stretched over what the network sees, crop or whole
        picture; SETR's authors evaluate by windows of the crop, --base-size 1024. How many stages Table 5 has is not said: here one. It is
        "without noise injection", but its 61.25 for two DeepLabv2 is Table 4's with full noises (without: 60.09), and its DeepLabv2
        baseline, 54.52, is 56.03 in Table 4, 56.08 in Table 1.                                              --network setr-naive --setr-lr
    Order of a step: optimizer, prototypes, EMA. Batch norm is frozen as loaded (SETR's decoder is trained); --batch-norm train has
        statistics per process, averaged after each step.
    VOC's labels: the text takes them from the standard 1,464 pictures, of which 1/8 of 10,582 are nearly all: --dataset voc; the splits it names
        are of all 10,582: --dataset vocaug, or --split. The paper's shares are of the 10,582: on voc give numbers (106, 212, 529, 1323).
    The baseline (--supervised) is stage 0 for as many steps as a student takes in all: no noise, and stage 0's learning rate.
    Fig. 2 names 3-layer MLPs, MNIST and 1/60 labels; the rest is ours: 784-256-256-10, 500 iterations on labels first, SGD at .004 (at .02 noise hides
        everything), mean teachers at .999, dropout .5, learners that learn from their peer alone (Eq. 3). Without MNIST, digits are drawn.
    Reported: all networks at the last iteration; the headline is teacher 1; student 1 for --mutual none, direct and --supervised.
"""

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as V

import common
from common import IGNORE

# ---- arguments -------------------------------------------------------------------------------------------------------

# Per dataset, by the argument's name. Cityscapes: the paper's values first (Sect. 5), then its lineage's and ours, where it has none.
PAPER = {
    "cityscapes": dict(
        labels="372", size=(512, 1024), crop=(256, 512), batch_size=4, network="deeplabv2", backbone="resnet101", weights="imagenet",
        optimizer="sgd", lr=1e-4, iterations=90_000, dropout=.5, drop_path=.2, prototype_decay=.9999,
        head="bottleneck", batch_norm="frozen", scale=(1., 1.), weight_decay=2e-4, ema_decay=.999, prototype_min_cells=10, setr_lr=1.,
        stage0_iterations=40_000, stage0_lr=2.5e-4, stage0_head_lr=10., workers=4, log_every=50, eval_every=5000, save_every=1000),
    # A small network from scratch, minutes on a CPU: AdamW, faster averages, and less noise, since it has little capacity to lose.
    "streets": dict(
        labels="8", size=(64, 128), crop=(64, 128), batch_size=4, network="deeplabv2", backbone="tiny", weights="none",
        optimizer="adamw", lr=3e-3, iterations=900, dropout=.1, drop_path=.05, prototype_decay=.999,
        head="bottleneck", batch_norm="frozen", scale=(1., 1.), weight_decay=1e-2, ema_decay=.99, prototype_min_cells=1, setr_lr=.3,
        stage0_iterations=400, stage0_lr=3e-3, stage0_head_lr=1., workers=0, log_every=50, eval_every=300, save_every=100),
}
# Fig. 2: two MLPs on digits, a start on labels, then each mode; what the paper leaves open is ours.
PAPER["mnist"] = dict(labels="1/60", size=None, crop=(28, 28), scale=(1., 1.), batch_size=128, network="mlp", backbone="mlp", weights="none", lr=.004, iterations=400,
                      stage0_iterations=500, dropout=.5, ema_decay=.999, log_every=10, workers=0, eval_every=1, save_every=1)
PAPER["camvid-cpu"] = PAPER["streets"] | dict(labels="1/8", size=(180, 240), crop=(96, 128), lr=2e-3, iterations=2000, stage0_iterations=2000,
                                              eval_every=500)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(labels="1/8", size=(360, 480), crop=(256, 352), iterations=20_000, stage0_iterations=10_000,
                                                 eval_every=2000)
# Pictures of one's own: at most so large, square crops at changing scale; all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(labels="1/1", size=(256,), crop=(128, 128), scale=(.75, 1.5))
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(labels="1/1", size=(640,), crop=(320, 320), scale=(.5, 1.5), stage0_iterations=5000, iterations=10_000)

# VOC's augmented list; and, as the text reads, labels from the 1,464 of the standard list alone, the rest of the 10,582 unlabeled.
PAPER["vocaug"] = PAPER["cityscapes"] | dict(labels="1/8", size=None, crop=(321, 321), scale=(.5, 1.5), batch_size=10, iterations=60_000)
PAPER["voc"] = PAPER["vocaug"] | dict(labels="1323", extra="all")

# The paper's mIoU (Tables 1, 2, 3) by data, weights and labels, and of its supervised baseline.
PAPER_MIOU = {("cityscapes", "imagenet", 100): 58.25, ("cityscapes", "imagenet", 372): 63.97, ("cityscapes", "imagenet", 744): 66.15,
              ("voc", "imagenet", 106): 53.77, ("voc", "imagenet", 212): 64.63, ("voc", "imagenet", 529): 68.82, ("voc", "imagenet", 1323): 70.34,
              ("voc", "coco", 106): 63.60, ("voc", "coco", 212): 68.66, ("voc", "coco", 529): 71.19, ("voc", "coco", 1323): 73.38}
PAPER_SUPERVISED = {("cityscapes", "imagenet", 100): 45.40, ("cityscapes", "imagenet", 372): 56.08, ("cityscapes", "imagenet", 744): 60.91,
                    ("cityscapes", "imagenet", 2975): 67.14, ("voc", "imagenet", 106): 36.25, ("voc", "imagenet", 212): 46.30,
                    ("voc", "imagenet", 529): 55.92, ("voc", "imagenet", 1323): 63.73, ("voc", "imagenet", 10582): 72.62}
# Cityscapes, 372 labels: by network, rectification, dropout, drop path, photometric, CutMix and stages (Tables 4, 5; of student 1).
PAPER_ABLATIONS = {("deeplabv2", False, 0, 0, False, False, 1): 60.09, ("deeplabv2", False, .5, .2, False, False, 1): 60.51,
                   ("deeplabv2", False, 0, 0, True, True, 1): 60.49, ("deeplabv2", False, .5, .2, True, True, 1): 61.25,
                   ("deeplabv2", True, .5, .2, True, True, 1): 62.85, ("setr", False, 0, 0, False, False, 1): 64.15,
                   ("deeplabv2,setr", False, 0, 0, False, False, 1): 63.96, ("setr,deeplabv2", False, 0, 0, False, False, 1): 64.35}

# Who predicts the pseudo-labels, and whose student 1 and student 2 learn from (0 and 1 are the two models).
MUTUAL = {
    "none": ("student", [[0], [1]]),          # each from itself: Eq. 2
    "mean-teacher": ("teacher", [[0], [1]]),  # each from its own mean teacher
    "direct": ("student", [[1], [0]]),        # Eq. 3
    "peer": ("teacher", [[1], [0]]),          # Eq. 3 with the labels of Eq. 4
    "indirect": ("teacher", [[0, 1], [0, 1]]),  # Eqs. 4 and 5
}


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     epilog="What is left out comes from the table PAPER at the top of rml.py, by dataset; a run writes all values to args.json.")
    a = parser.add_argument_group("robust mutual learning").add_argument
    a("--mutual", choices=list(MUTUAL), default="indirect", help="who teaches whom (Sect. 3, 4.1; Fig. 4)")
    a("--rectify", action=argparse.BooleanOptionalAction, help="rectify pseudo-labels by prototypes (Sect. 4.2); default: for peer and indirect")
    a("--stages", type=int, default=2, help="stages after stage 0 (Table 4)")
    a("--threshold", type=float, default=0., help="pseudo-labels below this confidence are ignored (tau of Eq. 2)")
    a("--photometric", action=argparse.BooleanOptionalAction, default=True, help="RandAugment's photometric operations (Table 4, input noises)")
    a("--cutmix", action=argparse.BooleanOptionalAction, default=True, help="CutMix (Sect. 4.1)")
    a("--dropout", type=float, help="before the last classifier (Sect. 5.2, model noises)")
    a("--drop-path", type=float, help="stochastic depth: share of residual branches dropped (Sect. 5.2)")
    a("--linear-drop-path", action="store_true", help="the share grows linearly with depth up to --drop-path")
    a("--ema-decay", type=float, help="of the mean teachers (Sect. 4.1)")
    a("--prototype-decay", type=float, help="lambda of Eq. 11")
    a("--prototype-min-cells", type=int, help="a picture counts for a class's prototype from this many cells on (Eq. 10)")
    a("--stage0-iterations", type=int, help="supervised start")
    a("--stage0-lr", type=float, help="learning rate at the start of stage 0")
    a("--setr-lr", type=float, metavar="X", help="SETR's learning rates, as a multiple of the others'")
    a("--stage0-head-lr", type=float, help="the head's learning rate in stage 0, times --stage0-lr")
    a("--seeds", type=int, metavar="N", default=5, help="of --dataset mnist: --seed and the ones after it (Fig. 2; default: %(default)s)")
    a("--compare", nargs="+", metavar="RUN", help="only draw the pseudo-label mIoU of up to four runs as one picture, --out FILE (Fig. 4)")
    common.add_arguments(parser, common.NETWORKS + common.TRANSFORMERS, several=True)
    return parser


def paper_miou(args):
    """The paper's mIoU of the setting that these arguments make, or None."""
    row = args.dataset.removesuffix("aug"), args.weights, args.labels
    if not set(args.changed) - {"weights"}:  # everything else as in the table PAPER
        return (PAPER_SUPERVISED if args.supervised else PAPER_MIOU).get(row)
    if row != ("cityscapes", "imagenet", 372) or set(args.changed) - {"network", "rectify", "dropout", "drop_path", "photometric", "cutmix", "stages"}:
        return None
    if args.supervised:
        return 57.79 if args.changed == ["network"] and args.network == "setr" else None  # Table 5
    return PAPER_ABLATIONS.get((args.network, args.rectify, args.dropout, args.drop_path, args.photometric, args.cutmix, args.stages))


def each_student(args):
    """The arguments of each student, whose networks, backbones and weights may differ (Table 5), and rate, the multiple of the learning rates.

    A UserError for three of anything, or two where one student learns."""
    both = [copy.copy(args) for _ in range(2)]
    for name in ("network", "backbone", "weights"):
        value = getattr(args, name)
        values = [value] if Path(value).is_file() else value.split(",")
        if len(values) > 2 or len(values) > 1 and args.supervised:
            raise common.UserError(f"--{name} {getattr(args, name)}: names {len(values)}, there {'is one student with --supervised' if args.supervised else 'are two students'}")
        for own, value in zip(both, values * 2):
            setattr(own, name, value)
    for own in both:
        own.rate = args.setr_lr if own.network in common.TRANSFORMERS else 1.
        if own.network in common.TRANSFORMERS and "backbone" not in args.given and own.backbone != "tiny":
            own.backbone = "vit_b_16"
    return both[:1] if args.supervised else both


# ---- perturbations ---------------------------------------------------------------------------------------------------

def sharpness(image, factor):
    """PIL's Sharpness: blend with a smoothed picture, 0 smooth, 1 as it is. (torchvision's copies its kernel to the GPU each time: a sync.)"""
    x, smooth = image.float(), image.float()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth[:, 1:-1, 1:-1] = ((box + 4 * x[:, 1:-1, 1:-1]) / 13).round()  # 3x3 of ones with 5 in the middle
    return smooth.mul_(1 - factor).add_(x.mul_(factor)).clamp_(0, 255).to(torch.uint8)


# RandAugment's photometric operations, level v = 1..9.  image (3, H, W) uint8 -> the same.
PHOTOMETRIC = (
    lambda image, v: image,
    lambda image, v: V.autocontrast(image),
    lambda image, v: V.equalize(image),
    lambda image, v: V.adjust_brightness(image, .09 * v + .05),
    lambda image, v: V.adjust_saturation(image, .09 * v + .05),
    lambda image, v: V.adjust_contrast(image, .09 * v + .05),
    lambda image, v: sharpness(image, .09 * v + .05),
    lambda image, v: V.posterize(image, int(.4 * v) + 4),
    lambda image, v: V.solarize(image, 256 - int(25.6 * v)),
)


def photometric(images, generators):
    """Two random operations for each picture, each applied with probability .5 (Sect. 4.1, 5.2).

    images (B, 3, H, W) uint8, generators: one seeded generator a picture -> (B, 3, H, W) uint8."""
    strong = []
    for image, r in zip(images, generators):
        for _ in range(2):
            operation, apply, level = PHOTOMETRIC[r.randint(len(PHOTOMETRIC))], r.uniform() < .5, r.randint(1, 10)
            image = operation(image, level) if apply else image
        strong.append(image)
    return torch.stack(strong)


def cutmix_mask(size, generator, device="cpu"):
    """(H, W) bool, True inside one box of half the area, at any place (French et al.)."""
    height, width = size
    h = math.exp(generator.uniform() * math.log(.5))  # side lengths as fractions: h in [.5, 1], w = .5 / h
    box_h, box_w = round(h * height), round(.5 / h * width)
    top, left = generator.randint(height - box_h + 1), generator.randint(width - box_w + 1)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[top:top + box_h, left:left + box_w] = True
    return mask


def strong_view(weak, positions, args, stage, student):
    """Gamma of one student: photometric operations on every picture, then CutMix with the partners.

    weak (2B, 3, H, W) uint8, the unlabeled batch and its partners (without CutMix B); positions: those of each batch in its stream,
    which seed the draws -> the view (B, 3, H, W) uint8 and the mask (B, H, W), True where the partner is pasted."""
    B = len(positions[0])
    if args.photometric:
        places = [(name, place) for name, batch in zip("up", positions) for place in batch]
        weak = photometric(weak, [common.rng(args.seed, "photometric", stage, student, *place) for place in places])
    if not args.cutmix:
        return weak, torch.zeros(B, *weak.shape[2:], dtype=torch.bool, device=weak.device)
    boxes = [common.rng(args.seed, "cutmix", stage, student, place) for place in positions[0]]
    mask = torch.stack([cutmix_mask(tuple(weak.shape[2:]), box, weak.device) for box in boxes])
    return weak[:B].where(~mask[:, None], weak[B:]), mask


def add_model_noise(network, dropout, drop_path, linear=False):
    """Add dropout before the last classifier, and stochastic depth to every residual branch.

    Both are off in eval mode, and have no parameters. Call it once for a network."""
    network.dropout = nn.Dropout(dropout)
    kinds = (BasicBlock, Bottleneck, EncoderBlock)
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    for depth, block in enumerate(blocks, 1):
        share = drop_path * depth / len(blocks) if linear else drop_path
        # A part of the block: so train() and eval() of the block reach it. A frozen norm is always in eval mode.
        block.stochastic_depth = StochasticDepth(share, mode="row")
        if isinstance(block, EncoderBlock):
            # Both branches of a transformer's block end with a dropout of probability 0.
            block.dropout = block.stochastic_depth
            block.mlp[-1] = block.stochastic_depth
        else:
            # The residual branch of a ResNet's block ends with a norm.
            last_norm = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            last_norm.register_forward_hook(drop_output(block.stochastic_depth))


def drop_output(stochastic_depth):
    """A forward hook: the module's output passes through stochastic_depth."""
    return lambda module, inputs, output: stochastic_depth(output)


# ---- EMA -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def update_teacher(teacher, student, decay):
    """teacher <- decay teacher + (1 - decay) student; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    for old, new in zip(teacher.buffers(), student.buffers()):
        old.copy_(new)


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------

def cells(features, stride, size):
    """Features (B, C, h, w) at stride as means over cells of size x size pixels, where they are finer: SETR's, at stride 2, and DeepLabv3+'s.

    As fine as SETR's, p^0 of Cityscapes would take 13 GB on disk for each network."""
    return F.avg_pool2d(features, size // stride, ceil_mode=True) if stride < size else features


def rectify(features, p0, prototypes, seen):
    """Rectified class probabilities: omega_k p_k^0, divided by their sum over the classes.

    features (B, C, h, w) of the mean teacher, p0 (B, K, h, w), prototypes (K, C), seen (K,) bool -> (B, K, h, w)."""
    B, C, h, w = features.shape
    z = features.float().flatten(2).transpose(1, 2)  # (B, hw, C)
    distance = torch.cdist(z, prototypes, compute_mode="donot_use_mm_for_euclid_dist")  # (B, hw, K)
    distance = distance.masked_fill(~seen, 1e4)  # far away: a class never seen gets exactly 0, and if none was seen all get the same
    omega = torch.softmax(-distance, 2).transpose(1, 2).view(B, -1, h, w)  # Eq. 9
    if p0.shape[2:] != (h, w):  # Caffe-style networks round up: one row and column more
        p0 = F.interpolate(p0, (h, w), mode="bilinear", align_corners=False)
    p = omega * p0  # Eq. 6
    return p / p.sum(1, keepdim=True).clamp(min=1e-30)


def hard_label(p, size, valid, threshold=0.):
    """Pseudo-labels as class ids: p (B, K, h, w) is upsampled to size; 255 where valid (B, H, W) is False or p is at most threshold."""
    p = p.contiguous(memory_format=torch.channels_last)  # upsampling is faster with the classes side by side
    confidence, label = F.interpolate(p, size, mode="bilinear", align_corners=False).max(1)  # one_hot of Eqs. 4, 6
    return label.where(valid & (confidence > threshold), IGNORE)  # Eq. 2; with threshold 0, what has no probability at all is unknown


def class_sums(features, label, classes):
    """Sum of the features of each class and number of its cells: (B, C, h, w), (B, h, w) with K for unknown -> (K, C), (K,)."""
    one_hot = F.one_hot(label.flatten(), classes + 1)[:, :classes].float()  # (Bhw, K)
    return one_hot.T @ features.float().transpose(0, 1).flatten(1).T, one_hot.sum(0)


def update_prototypes(prototypes, seen, features, logits, valid, decay):
    """In place: prototypes (K, C) and seen (K,) from the teacher's features (B, C, h, w) and logits (B, K, h, w) of this batch.

    valid (B, H, W) bool: cells of padding do not count."""
    known = F.interpolate(valid[:, None].float(), features.shape[2:], mode="nearest-exact")[:, 0] > 0
    sums, counts = class_sums(features, logits.max(1).indices.where(known, len(seen)), len(seen))  # on a CPU max is much faster than argmax
    sums, counts = common.all_reduce(torch.cat([sums, counts[:, None]], 1)).split([sums.shape[1], 1], 1)
    mean = sums / counts.clamp(min=1)  # eta', (K, C)
    eta = torch.where(seen[:, None], decay * prototypes + (1 - decay) * mean, mean)  # Eq. 11
    prototypes.copy_(torch.where(counts > 0, eta, prototypes))
    seen.logical_or_(counts[:, 0] > 0)


@torch.no_grad()
def start_stage(networks, data, labeled, unlabeled, folders, args, device):
    """One pass of each network over all training pictures: p^0 of the unlabeled ones to disk, and the prototypes.

    Returns for each network (prototypes (K, C), seen (K,)). Each process takes its share of the pictures."""
    K, pictures = len(data.names), (labeled + unlabeled)[common.rank()::common.world_size()]
    sums = [torch.zeros(K, network.feature_channels + 1, device=device) for network in networks]
    wanted = set(unlabeled)
    for network in networks:
        network.eval()
    for number, id in enumerate(pictures, 1):
        image = torch.from_numpy(data.image(id).transpose(2, 0, 1).copy())[None].to(device)
        for network, total, folder in zip(networks, sums, folders):
            with common.autocast(args, device):
                features = cells(network.features(common.to_float(image)), network.stride, args.cell)
                logits = network.classifier(features)
            if id in wanted:
                common.write_soft_label(folder, id, logits[0].float().softmax(0))  # p^0 of Eq. 6, (K, h, w)
            sums_of_picture, counts = class_sums(features, logits.argmax(1), K)
            mean = sums_of_picture / counts.clamp(min=1)[:, None]  # mean_i^HW of Eq. 10, (K, C)
            total += torch.cat([mean, torch.ones_like(mean[:, :1])], 1) * (counts >= args.prototype_min_cells)[:, None]
        common.progress("pseudo-labels and prototypes of all pictures", number, len(pictures))
    for total in sums:
        common.all_reduce(total)
    common.barrier()  # every p^0 is on disk before any process reads one
    return [(total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0) for total in sums]  # Eq. 10


# ---- losses ----------------------------------------------------------------------------------------------------------

def cross_entropy(log_p, label):
    """Mean over all valid pixels of all processes: log_p (B, K, H, W), label (B, H, W) with 255 -> 0-dim; 0 if nothing is valid.

    Each process returns its share times their number, since gradients are averaged over processes."""
    count = common.all_reduce((label != IGNORE).sum())
    return F.nll_loss(log_p, label, ignore_index=IGNORE, reduction="sum") * common.world_size() / count.clamp(min=1)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args, each, data, labeled, unlabeled, device):
    # The stages: number, iterations, learning rate, and the head's multiple of it.
    stages = [(0, args.stage0_iterations, args.stage0_lr, args.stage0_head_lr)]
    stages += [(s, args.iterations, args.lr, 1.) for s in range(1, args.stages + 1)]
    if args.supervised:  # the baseline is stage 0 alone, one network, as many steps as a student takes in all stages
        stages = [(0, sum(s[1] for s in stages), args.stage0_lr, args.stage0_head_lr)]
    students = [common.build_network(own, data, device, member) for member, own in enumerate(each)]
    run = common.OldRun("rml-supervised" if args.supervised else "rml", args, data, labeled, unlabeled, device, {s[0]: s[1] for s in stages})
    teachers = [copy.deepcopy(student).requires_grad_(False).eval() for student in students]
    networks = {f"student_{i}": s for i, s in enumerate(students, 1)} | {f"teacher_{i}": t for i, t in enumerate(teachers, 1)}
    learners = [common.parallel(student, device) for student in students]
    predictor, learns_from = MUTUAL[args.mutual]
    sources = teachers if predictor == "teacher" else students
    headline = "student_1" if args.supervised or predictor == "student" else "teacher_1"
    B, K, members = args.batch_size // common.world_size(), len(data.names), range(len(students))

    noisy = False
    for stage, iterations, stage_lr, head_lr in stages:
        if run.state and stage < run.state["stage"]:
            continue
        optimizers = [common.make_optimizer(args, stage_lr, s.backbone.parameters(), s.head_parameters()) for s in students]
        rates = [(stage_lr * own.rate, stage_lr * own.rate * head_lr) for own in each]  # of backbone and head
        scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        folders = [run.folder / "soft_labels" / f"stage_{stage}_model_{i + 1}" for i in members] if stage and args.rectify else []
        prototypes, begin, tables = [], 0, None

        def save(iteration):
            run.save(headline, networks, stage=stage, iteration=iteration, optimizers=[o.state_dict() for o in optimizers],
                     scaler=scaler.state_dict(), prototypes=prototypes)

        if run.state:  # go on where the checkpoint was written
            begin = run.state["iteration"]
            prototypes = [(eta.to(device), seen.to(device)) for eta, seen in run.state["prototypes"]]
            for name, network in networks.items():
                network.load_state_dict(run.state["models"][name])
            for optimizer, state in zip(optimizers, run.state["optimizers"]):
                optimizer.load_state_dict(state)
            scaler.load_state_dict(run.state["scaler"])
            run.state = None
        else:
            if stage and args.rectify:  # p^0 and prototypes from the stage before: its students after stage 0, else its teachers
                prototypes = start_stage(students if stage == 1 else sources, data, labeled, unlabeled, folders, args, device)
            if stage:
                for teacher, student in zip(teachers, students):
                    teacher.load_state_dict(student.state_dict())
            save(0)
            run.forget_soft_labels(keep=folders)
        if stage and not noisy:
            for student in students:
                add_model_noise(student, args.dropout, args.drop_path, args.linear_drop_path)
            noisy = True

        def stream(name, ids, **options):
            return common.batches(common.Stream(data, ids, f"{name}, stage {stage}", args, **options), args, device, begin, iterations)
        if stage == 0:  # each student sees the labeled pictures in an order of its own
            loaders = [stream(f"labeled {i}", labeled) for i in members]
        else:
            names = ["unlabeled", "partner"] if args.cutmix else ["unlabeled"]
            loaders = [stream("labeled", labeled)]
            loaders += [stream(name, unlabeled, labeled=False, soft_labels=folders, stride=args.cell) for name in names]
        pseudo_tables, covered = [torch.zeros(K, K, dtype=torch.int64, device=device) for _ in members], 0

        for iteration, batch in enumerate(zip(*loaders), begin):
            # 1 batch: weak views; one labeled batch for each student in stage 0, later one for both, and the unlabeled ones
            labeled_batches = [batch[i if stage == 0 else 0] for i in members]
            unlabeled_batches = batch[1:] if stage else []

            # 2 pseudo-labels: of both models, for the unlabeled batch and its CutMix partners
            pseudo_labels, outputs = [], []
            if stage:
                weak = torch.cat([u["image"] for u in unlabeled_batches])  # (2B, 3, H, W), or B without CutMix
                valid = torch.cat([u["valid"] for u in unlabeled_batches])
                for i in members:
                    if sources[i].training:  # a student predicts without noise too; teachers never train
                        sources[i].eval()
                    with torch.no_grad():
                        with common.autocast(args, device):
                            features = sources[i].features(common.to_float(weak))  # (2B, C, h, w)
                            if args.rectify:
                                features = cells(features, sources[i].stride, args.cell)
                            logits = sources[i].classifier(features)  # (2B, K, h, w)
                        p = logits.float().softmax(1)  # Eq. 4; from a student: Eqs. 2, 3
                        if args.rectify:
                            p = rectify(features, torch.cat([u[f"soft_{i}"] for u in unlabeled_batches]), *prototypes[i])
                        pseudo_labels.append(hard_label(p, args.crop, valid, args.threshold))  # (2B, H, W)
                        outputs.append((features, logits))

            # 3 losses: each student with perturbations and noise of its own
            losses, strong = {}, []
            for j in members:
                image, label = labeled_batches[j]["image"], labeled_batches[j]["label"]
                if stage:
                    view, mask = strong_view(weak, [u["position"] for u in unlabeled_batches], args, stage, j)  # Gamma_j
                    targets = [y[:B].where(~mask, y[-B:]) for y in pseudo_labels]  # cut like the picture
                    image = torch.cat([image, view])  # (2B, 3, H, W)
                    strong.append((view, targets))
                torch.manual_seed(int(common.rng(args.seed, "noise", stage, iteration, common.rank(), j).randint(2 ** 31)))
                if not students[j].training:
                    learners[j].train()
                with common.autocast(args, device):
                    logits = learners[j](common.to_float(image))
                log_p = F.interpolate(logits.float(), args.crop, mode="bilinear", align_corners=False).log_softmax(1)  # (2B, K, H, W)
                log_p_labeled, *log_p_unlabeled = log_p.split(B)  # (B, K, H, W) each
                own = {f"loss_labeled_{j + 1}": cross_entropy(log_p_labeled, label)}  # Eq. 1
                for i in learns_from[j] if stage else []:
                    own[f"loss_pseudo_{j + 1}_from_{i + 1}"] = cross_entropy(log_p_unlabeled[0], targets[i])  # Eq. 5 (Eqs. 2, 3 by --mutual)
                losses |= own

                # 4 backward: at once, so that the activations of one student are gone when the next one begins
                optimizers[j].zero_grad()
                scaler.scale(sum(own.values())).backward()
            for optimizer, rate in zip(optimizers, rates):
                for group, base in zip(optimizer.param_groups, rate):
                    group["lr"] = base * (1 - iteration / iterations) ** .9
                scaler.step(optimizer)
            scaler.update()
            common.average_buffers(students)

            # 5 EMA: prototypes, then teachers
            if stage and args.rectify:
                for (eta, seen), (features, logits) in zip(prototypes, outputs):
                    update_prototypes(eta, seen, features, logits, valid, args.prototype_decay)
            for teacher, student in zip(teachers, students):
                update_teacher(teacher, student, args.ema_decay)

            # 6 log, evaluate, save
            run.watch(stage, iteration, losses)
            done, last = iteration + 1, iteration + 1 == iterations
            run.watch_pseudo_labels(*pseudo_labels)
            if stage:  # Fig. 4; the truth of unlabeled pictures is used here and nowhere else
                truth = torch.cat([u["truth"] for u in unlabeled_batches])
                for table, y in zip(pseudo_tables, pseudo_labels):
                    table += common.confusion_matrix(truth, y, K)
                covered = covered + torch.stack([(y != IGNORE).float().mean() for y in pseudo_labels]).mean()
            if done % args.log_every == 0 or done % args.eval_every == 0 or last:
                extra = {"lr": optimizers[0].param_groups[0]["lr"]} | ({"lr_2": optimizers[1].param_groups[0]["lr"]} if rates[0] != rates[-1] else {})
                if stage:
                    extra |= {f"pseudo_miou_{i + 1}": common.mean_iou(common.all_reduce(pseudo_tables[i])) for i in members}
                    extra["pseudo_coverage"] = float(common.all_reduce(covered)) / common.world_size() / run.count
                    pseudo_tables, covered = [torch.zeros_like(table) for table in pseudo_tables], 0
                run.log(stage, done, **extra)
            if done % args.eval_every == 0 or last:
                tables = common.evaluate(networks, data, args, device)
                run.log(stage, done, val=tables)
                run.predictions(f"val_stage_{stage}_{done:06d}", networks)
                if stage:
                    picture = {"unlabeled picture": weak, "truth (not used)": truth}
                    labels, views, name = {}, {}, f"stage_{stage}_{done:06d}"
                    for i in members:
                        peer = 1 - i if 1 - i in learns_from[i] else i
                        labels[f"teacher {i + 1}, raw"] = hard_label(outputs[i][1].float().softmax(1), args.crop, valid)
                        labels[f"pseudo-label {i + 1}"] = pseudo_labels[i]
                        labels[f"student {i + 1} predicts"] = common.predict(students[i].eval(), weak[:4], args, args.crop).argmax(1)
                        views |= {f"student {i + 1} sees": strong[i][0], f"label of teacher {peer + 1}": strong[i][1][peer]}
                    run.panel(f"pseudo_{name}", {title: pictures[:min(4, B)] for title, pictures in (picture | labels).items()})
                    run.panel(f"strong_{name}", {title: pictures[:min(4, B)] for title, pictures in (picture | views).items()})
            if done % args.save_every == 0 or last:
                save(done)

    run.finish(headline, tables or common.evaluate(networks, data, args, device), paper_miou(args))


# ---- the coupling experiment (Sect. 4.1, Fig. 2): --dataset mnist ----------------------------------------------------

# Who student 1 and student 2 learn from, and whether dropout is on.
COUPLING = {"direct": ("student", False), "indirect": ("teacher", False), "indirect, model noise": ("teacher", True)}


def draw_digits(seed, n):
    """n drawn digits that need no download: images (n, 28, 28) uint8, labels (n,) int64. Turned, sheared, moved, of any size and thickness, with noise."""
    images, labels = np.zeros((n, 28, 28), np.uint8), np.zeros(n, np.int64)
    for i in range(n):
        r = common.rng("digits", seed, i)
        labels[i] = r.randint(10)
        picture = Image.new("L", (56, 56))
        ImageDraw.Draw(picture).text((28, 28), str(labels[i]), fill=255, font=ImageFont.load_default(int(r.uniform(36, 48))), anchor="mm", stroke_width=int(r.randint(3)))
        angle, shear = r.uniform(-.25, .25), r.uniform(-.3, .3)
        cos, sin, x, y = math.cos(angle), math.sin(angle), r.uniform(-3, 3), r.uniform(-3, 3)
        matrix = cos + shear * sin, sin, 0, shear * cos - sin, cos, 0
        matrix = *matrix[:2], 28 - (matrix[0] + matrix[1]) * 28 + x, *matrix[3:5], 28 - (matrix[3] + matrix[4]) * 28 + y
        picture = picture.transform((56, 56), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).resize((28, 28), Image.Resampling.BOX)
        images[i] = (np.asarray(picture) * r.uniform(.5, 1) + r.normal(0, 20, (28, 28))).clip(0, 255)
    return images, labels


def read_digits(args):
    """MNIST from --data-root (--download fetches it), or drawn digits: images (n, 784) float32 in [0, 1], labels (n,) int64, for training and held out."""
    if args.data_root is None:
        common.say("digits    drawn, 12,000 + 1,000; for MNIST: --data-root DIR (with --download, if it is not there yet)")
        parts = draw_digits("train", 12_000), draw_digits("held out", 1000)
    else:
        try:
            parts = [torchvision.datasets.MNIST(args.data_root, train=train, download=args.download) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise common.UserError(f"--data-root {args.data_root}: no MNIST there ({str(error).splitlines()[0]}); add --download, or leave out --data-root for drawn digits") from None
        parts = [(part.data.numpy(), part.targets.numpy()) for part in parts]
    (images, labels), (held_out, held_out_labels) = parts  # 2,000 held-out ones tell as much as 10,000, and cost a fifth
    return [(torch.from_numpy(x).flatten(1).float() / 255, torch.from_numpy(y)) for x, y in ((images, labels), (held_out[:2000], held_out_labels[:2000]))]


def total_variation(p, q):
    """Mean over pictures of half the sum over the classes of |p - q|: probabilities (B, K) -> 0-dim, 0 (the same) to 1."""
    return (p - q).abs().sum(1).mean() / 2


def make_mlp(dropout):
    """Three layers: (B, 784) -> (B, 10)."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 10))


def couple(args, device):
    """Do two learners become one? Total variation between them on held-out digits, over the iterations after a start on labels, in each mode and for several seeds.

    Teachers are those whose predictions are learned: mean teachers, or with direct mutual learning the students themselves."""
    folder, began = Path(args.out or f"runs/rml-mnist-s{args.seed}"), time.time()
    if (folder / "result.json").exists() and not args.overwrite:
        raise common.UserError(f"{folder} holds a finished run; choose another --out, or --overwrite to begin anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    (images, labels), (held_out, held_out_labels) = [[x.to(device) for x in part] for part in read_digits(args)]
    n, records, seeds = common.count_labels(args.labels, argparse.Namespace(name="digits", train=range(len(labels)))), [], range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        order = torch.from_numpy(common.rng(seed, "which are labeled").permutation(len(labels))).to(device)
        known, unknown = order[:n], order[n:]

        def pick(ids, name, iteration):
            return ids[torch.from_numpy(common.rng(seed, name, iteration).randint(len(ids), size=args.batch_size)).to(device)]

        start = []
        for j in range(2):  # both learners on labels alone, from other weights and in another order
            torch.manual_seed(int(common.rng(seed, "weights", j).randint(2 ** 31)))
            student = make_mlp(args.dropout).to(device).eval()
            optimizer = torch.optim.SGD(student.parameters(), lr=args.lr, momentum=.9, fused=True)
            for iteration in range(args.stage0_iterations):
                ids = pick(known, f"labeled {j}", iteration)
                optimizer.zero_grad()
                F.cross_entropy(student(images[ids]), labels[ids]).backward()  # Eq. 1
                optimizer.step()
            start.append(student)
        for mode, (source, noise) in COUPLING.items():
            students, teachers = copy.deepcopy(start), [copy.deepcopy(student).requires_grad_(False) for student in start]
            sources = teachers if source == "teacher" else students
            optimizers = [torch.optim.SGD(student.parameters(), lr=args.lr, momentum=.9, fused=True) for student in students]
            for iteration in range(args.iterations + 1):
                if iteration % args.log_every == 0:
                    with torch.no_grad():
                        p = {name: [network.eval()(held_out).softmax(1) for network in pair] for name, pair in (("students", students), ("teachers", sources))}
                    records.append({"seed": seed, "mode": mode, "iteration": iteration} | {f"tv_{name}": float(total_variation(*pair)) for name, pair in p.items()}
                                   | {f"accuracy_{name}": 100 * float(torch.stack([(q.argmax(1) == held_out_labels).float().mean() for q in pair]).mean()) for name, pair in p.items()})
                ids, others = pick(known, "labeled", iteration), pick(unknown, "unlabeled", iteration)
                with torch.no_grad():
                    pseudo_labels = [network.eval()(images[others]).argmax(1) for network in sources]  # of a student: Eq. 3; of a teacher: Eq. 4
                torch.manual_seed(int(common.rng(seed, "noise", mode, iteration).randint(2 ** 31)))
                for j, (student, optimizer) in enumerate(zip(students, optimizers)):
                    student.train(noise)
                    of_known, of_unknown = student(images[torch.cat([ids, others])]).chunk(2)
                    optimizer.zero_grad()
                    (F.cross_entropy(of_known, labels[ids]) + F.cross_entropy(of_unknown, pseudo_labels[1 - j])).backward()  # Eqs. 1 and 3
                    optimizer.step()
                for teacher, student in zip(teachers, students):
                    update_teacher(teacher, student, args.ema_decay)
            common.progress("coupling, seeds x modes", len(COUPLING) * (seed - args.seed) + list(COUPLING).index(mode) + 1, len(COUPLING) * args.seeds)

    def curves(key):  # {mode: (seeds, points)}
        return {mode: np.array([[r[key] for r in records if (r["seed"], r["mode"]) == (seed, mode)] for seed in seeds]) for mode in COUPLING}

    marks = list(range(0, args.iterations + 1, args.log_every))
    shown = [i for i, mark in enumerate(marks) if mark in (0, 50, 100, 200, 400) or i == len(marks) - 1]
    common.write_atomically(folder / "log.jsonl", lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))
    for who in ("teachers", "students"):
        print(f"\ntotal variation in percent between the two {who}, on {len(held_out)} held-out digits: mean and standard deviation over seeds {', '.join(map(str, seeds))}")
        print(f"{'iteration':24}" + "".join(f"{marks[i]:>15}" for i in shown))
        for mode, values in curves(f"tv_{who}").items():
            print(f"{mode:24}" + "".join(f"{100 * values[:, i].mean():9.2f} +-{100 * values[:, i].std():4.2f}" for i in shown))
        common.write_atomically(folder / f"coupling_{who}.png", partial(common.draw_curves(
            f"total variation between the two {who} (Fig. 2), mean of {len(seeds)} seeds", curves(f"tv_{who}"), ("iterations after the start on labels", marks)).save, format="PNG"))
    result = {"method": "rml-coupling", "dataset": "mnist" if args.data_root else "drawn digits", "labels": n, "seeds": list(seeds), "iterations": marks, "seconds": round(time.time() - began, 1),
              "torch": torch.__version__, "commit": common.git_commit()} | {key: {mode: x.round(5).tolist() for mode, x in curves(key).items()} for key in
              ("tv_teachers", "tv_students", "accuracy_teachers", "accuracy_students")}
    common.write_atomically(folder / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    print("\naccuracy of the teachers at the end: " + ", ".join(f"{mode} {x[:, -1].mean():.1f}" for mode, x in curves("accuracy_teachers").items())
          + f"\n{common.duration(time.time() - began)} on {common.device_name(device)}; curves {folder}/coupling_*.png   numbers {folder}/result.json, log.jsonl", flush=True)


def compare(folders, out):
    """Fig. 4: pseudo-label mIoU over the iterations after stage 0, of runs of rml.py, as one picture."""
    if len(folders) > 4:
        raise common.UserError(f"--compare: {len(folders)} runs are too many for one picture; name up to four")
    series = {}
    for folder in map(Path, folders):
        try:
            records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise common.UserError(f"--compare {folder}: has no readable log.jsonl ({error}); expected a run folder of rml.py") from None
        records = [r for r in records if "pseudo_miou_1" in r]
        if not records:
            raise common.UserError(f"--compare {folder}: no pseudo-labels in its log.jsonl; expected a run of rml.py past stage 0, not --supervised")
        begin = records[0]["step"] - records[0]["iteration"]
        series[folder.name] = {r["step"] - begin: (r["pseudo_miou_1"] + r["pseudo_miou_2"]) / 2 for r in records}
    steps = sorted(set.intersection(*(set(points) for points in series.values())))
    if len(steps) < 2:
        raise common.UserError(f"--compare {' '.join(folders)}: their logs have no two iterations in common; run them with the same --log-every")
    curves = {name: np.array([[points[step] for step in steps]]) for name, points in series.items()}
    try:
        common.write_atomically(out, partial(common.draw_curves("mIoU of pseudo-labels (Fig. 4)", curves, ("iterations after stage 0", steps)).save, format="PNG"))
    except OSError as error:
        raise common.UserError(f"--out {out}: cannot be written ({error.strerror}); name a file such as fig4.png") from None
    for name, (curve,) in curves.items():
        print(f"{name:24}{curve[0]:6.1f} at first, {curve[-1]:6.1f} at last")
    print(f"picture   {out}")


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    if args.compare:
        return compare(args.compare, Path(args.out or "pseudo_miou.png"))
    common.check_range(args, 1, math.inf, "seeds")
    if args.dataset == "mnist":
        return couple(args, device) if common.is_main() else None
    args.rectify = args.mutual in ("peer", "indirect") if args.rectify is None else args.rectify
    common.check_range(args, 0, math.inf, "stages", "stage0_iterations")
    common.check_range(args, 1e-12, math.inf, "stage0_lr", "stage0_head_lr", "setr_lr")
    common.check_range(args, 1, math.inf, "prototype_min_cells")
    common.check_range(args, 0, 1, "dropout", "drop_path", "threshold", "ema_decay", "prototype_decay")
    each = each_student(args)
    args.backbone = ",".join(dict.fromkeys(own.backbone for own in each))  # as it is, for result.json
    args.cell = 4 if "tiny" in args.backbone else 8  # DeepLabv2's stride
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    train(args, each, data, labeled, unlabeled, device)


if __name__ == "__main__":
    common.run_main(main)
