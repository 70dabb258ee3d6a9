"""A Three-Stage Self-Training Framework for Semi-Supervised Semantic Segmentation
Rihuan Ke, Angelica I. Aviles-Rivero, Saurabh Pandey, Saikumar Reddy, Carola-Bibiane Schönlieb.
IEEE Transactions on Image Processing 31, 2022. arXiv 2012.00827

Stage 1 learns from the labeled pictures and predicts a pseudo-mask of every training picture.
Stages 2 and 3 start anew, and each learns two tasks. Task 1 is the segmentation: it learns from
labels, and its prediction for a strongly perturbed picture must agree with the mean teacher's for
the same picture unperturbed. Task 2 reproduces the pseudo-masks of the stage before, which contain
errors: a second branch learns it, and the network learns from it only through the shared blocks.
The second branch has its own last two blocks in stage 2, and its own last block in stage 3.

    python three_stage.py                       # drawn streets on a CPU, in minutes
    torchrun --nproc_per_node=4 three_stage.py --dataset cityscapes --data-root DIR --labels 372

paper -> code     (grep "# Open:" for what the paper leaves open, "# Code:" where its code differs)
    Eq. 1           consistency loss L_con        train(), step 3: loss_consistency
    Eq. 2           supervised loss L_seg         train_supervised() and train(), step 3
    Eq. 3           pseudo-mask loss L_pl         train(), step 3: loss_pseudo
    Eqs. 4, 5       losses of stages 2 and 3      train(), step 3: loss
    Algorithm 1     the three stages              main()
    A, B            RandAugment, Cutout           strong_view(), warp(), cutout()
    Figs. 2, 3      loss curves; lambdas          log.jsonl; --lambda1, --lambda2
    Figs. 4, 5      predictions of the stages     pictures/stages.png and val_stage_*.png
    Tables II-VI    results, ablations            PAPER_MIOU has the flags of each row
    Table VII       Fig. 1: f, g-hat, g-tilde     SecondBranch, TwoBranches
"""

import argparse
import copy
import math

import common  # before torch: it sets how torch's threads wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as V

from common import IGNORE, Stream, all_reduce, autocast, build_network, integer
from common import real, rng, to_float, to_tensor, truth_for_the_log, upsample

# ---- arguments -----------------------------------------------------------------------------------

# The arguments by dataset and labels (Sect. IV-B): data, network, optimizer, method, run.
PAPER = {}
PAPER["cityscapes"] = dict(
    # Open: whose size is 1, or 3; Sub-batch 1's (L and U) in the paper, here Sub-batch 2's (L), as
    #   in the authors' code: 1 of 5 pictures is labeled   --labeled-batch-size --batch-size
    # Open: the batch size of stage 1; that of both sub-batches together   --stage1-batch-size
    labels="372", size=(512, 1024), crop=(256, 512), scale=(1.0, 1.0), workers=4,
    batch_size=4, labeled_batch_size=1, stage1_batch_size=5,
    # Open: the size of val's masks; 512x1024 too, as the pictures   --full-size-labels
    # Code: has strides in 1x1 convs, as Caffe; here in 3x3 convs, as torchvision's weights need
    # Open: batch norm; frozen as loaded, as in the authors' code   --batch-norm
    network="deeplabv2", head="plain", backbone="resnet101", weights="imagenet",
    batch_norm="frozen",
    # Code: has lower rates for pretrained layers, 20,000 steps in stage 1   --head-lr
    optimizer="adamw", lr=3e-5, weight_decay=0.0,  # without decay it is Adam
    stages=3, iterations=60_000, consistency=True, pseudo_masks=True, lambda1=0.5, lambda2=0.5,
    # Open: the decay of the EMA; as in the authors' code, see decay_at()   --ema-decay
    # Open: who predicts masks; theta' (paper: theta; code: theta in stage 1)   --pseudo-masks-of
    strong=True, cutout=32, ema=True, ema_decay=(0.99, 0.995, 0.9975, 0.999),
    pseudo_masks_of="teacher", log_every=50, eval_every=5000, save_every=1000)
for labels in ("1/2", "1448", "1488"):  # Sect. IV-A says 1448, Table II says 1488
    PAPER[f"cityscapes/{labels}"] = PAPER["cityscapes"] | dict(batch_size=2, labeled_batch_size=3)
# Code: has scales .5, .6 .. 1.5 and pads on all sides; here any scale, and padding right and below
PAPER["vocaug"] = PAPER["cityscapes"] | dict(
    labels="1/50", size=None, crop=(321, 321), scale=(0.5, 1.5),
    batch_size=9, labeled_batch_size=1, stage1_batch_size=10,
    lambda1=0.25, lambda2=0.25)
PAPER["vocaug/529"] = PAPER["vocaug/1/20"] = PAPER["vocaug"] | dict(
    lambda1=1.25, lambda2=1.25)
PAPER["vocaug/1323"] = PAPER["vocaug/1/8"] = PAPER["vocaug"] | dict(
    batch_size=8, labeled_batch_size=2,
    lambda1=0.625, lambda2=0.625)
PAPER["streets"] = PAPER["cityscapes"] | dict(  # drawn scenes, a small network from scratch
    labels="8", size=(64, 128), crop=(64, 128),
    workers=0, batch_size=4, labeled_batch_size=2, stage1_batch_size=4,
    backbone="tiny", weights="none",
    lr=2e-3, iterations=1900, stage1_iterations=700,
    ema_decay=(0.98, 0.99, 0.99, 0.995), cutout=8, eval_every=500, save_every=100)
PAPER["camvid-tiny"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128),
    iterations=2000, stage1_iterations=2000, cutout=12)
# With lambda1 .5 rare classes come late, too late for so few steps (tests/RESULTS.md).
PAPER["camvid-cpu"] = PAPER["streets"] | common.CPU_PRESET | dict(
    labeled_batch_size=4, iterations=1200, stage1_iterations=900, lambda1=0.1, cutout=24)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=(360, 480), crop=(256, 352),
    iterations=20_000, eval_every=2000)
PAPER["folder-tiny"] = PAPER["camvid-tiny"] | common.FOLDER["tiny"] | dict(cutout=16)
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | common.FOLDER["cpu"]
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | common.FOLDER["gpu"] | dict(iterations=10_000)

# The paper's mIoU: {dataset and flags: {number of labeled pictures: mIoU}}.
PAPER_MIOU = {
    "cityscapes": {100: 54.85, 372: 62.82, 744: 65.80, 1448: 67.11, 1488: 67.11},  # Table II
    "vocaug": {106: 55.13, 212: 62.71, 529: 68.23, 1323: 69.36},  # Table III
    "vocaug --weights coco": {106: 63.82, 212: 70.77, 529: 71.90, 1323: 72.95},  # Table IV
    # DeepLabv2 [2] in these tables: results of others, with their number of steps, no teacher
    "cityscapes --supervised": {372: 56.2, 744: 60.2, 2975: 66.0},
    "vocaug --supervised": {212: 48.3, 529: 56.8, 1323: 62.0, 10582: 70.7},
    "vocaug --supervised --weights coco": {212: 53.2, 529: 58.7, 1323: 65.2, 10582: 73.6},
    "vocaug --weights coco --lambda1 .5 --lambda2 .5": {212: 70.8},  # Fig. 3; others only drawn
}
for flags, cityscapes, voc in [
    ("--stages 1", 46.91, 55.20),  # Table V: S1, which has no teacher: compare "student"
    ("--stages 2", 53.25, 68.50),  # S1, S2; Table VI: S2
    ("--no-consistency", 50.2, 59.82),  # without CR
    ("--no-pseudo-masks", 52.63, 68.21),  # without T2
    ("--no-strong", 47.96, 64.37),  # without SA
    ("--branch g-hat", 53.80, 69.52),  # without N2
    ("--no-ema --stages 2", 51.68, 64.88),  # Table VI: S2
    ("--no-ema", 53.37, 66.83),  # S3
    ("--stages 4", 55.21, 70.89),  # Sect. IV-C
]:
    PAPER_MIOU[f"cityscapes {flags}"] = {100: cityscapes}
    PAPER_MIOU[f"vocaug --weights coco {flags}"] = {212: voc}


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=common.idea(__doc__),
        epilog="Defaults: the table PAPER in three_stage.py; a run writes all values to args.json.")
    switch = dict(action=argparse.BooleanOptionalAction)
    add = parser.add_argument_group("three-stage self-training").add_argument
    add("--stages", **integer(1, 1000), help="number of stages (Table V, Sect. IV-C)")
    add("--consistency", **switch, help="the consistency loss, Eq. 1 (Table V, CR)")
    add("--pseudo-masks", **switch, help="Task 2, Eq. 3, in all stages (Table V, T2)")
    add("--strong", **switch, help="RandAugment and Cutout (Table V, SA)")
    add("--branch", choices=["g-hat", "g-tilde"], help="default: g-hat, from stage 3 g-tilde (N2)")
    add("--ema", **switch, help="a mean teacher; without, the teacher is the student (Table VI)")
    add("--ema-decay", **real(0, 1), nargs=4,
        help="of the teacher from 0, 1/3, 2/3, 5/6 of a stage on")
    add("--lambda1", **real(0), help="weight of the consistency loss (Eqs. 4, 5; Fig. 3)")
    add("--lambda2", **real(0), help="weight of the pseudo-mask loss (Eqs. 4, 5; Fig. 3)")
    add("--pseudo-masks-of", choices=["teacher", "student"], help="network that predicts the masks")
    add("--labeled-batch-size", **integer(1),
        help="pictures from L in a step; --batch-size: from L u U")
    add("--stage1-batch-size", **integer(1), help="labeled pictures in a step of stage 1")
    add("--stage1-iterations", **integer(1),
        help="iterations of stage 1 (default: PAPER, --iterations)")
    add("--cutout", **integer(1), help="side of Cutout's squares in pixels")
    common.add_arguments(parser, ["deeplabv2", "deeplabv3plus"])
    return parser


def paper_miou(args):
    """The paper's mIoU of the setting that these arguments make, or None."""
    for flags, values in PAPER_MIOU.items():
        row = common.parse_args(get_parser(), PAPER, f"--dataset {flags}".split())
        names = {"dataset", "supervised", *args.changed, *row.changed} - {"split", "split_seed"}
        if all(getattr(args, name) == getattr(row, name) for name in names):
            return values.get(args.labels)


# ---- perturbations -------------------------------------------------------------------------------

GREY = 128  # Open: the fill; mid-grey beyond the border of a moved picture, in Cutout's squares
# RandAugment. Photometric operations: image (3, H, W) uint8, level from 1 to 9 -> image.
PHOTOMETRIC = {
    "Identity": lambda image, level: image,
    "AutoContrast": lambda image, level: V.autocontrast(image),
    "Equalize": lambda image, level: V.equalize(image),
    "Solarize": lambda image, level: V.solarize(image, 256 - 25.6 * level),
    "Posterize": lambda image, level: V.posterize(image, 4 - int(0.4 * level)),
    "Color": lambda image, level: V.adjust_saturation(image, 0.18 * level + 0.1),
    "Contrast": lambda image, level: V.adjust_contrast(image, 0.18 * level + 0.1),
    "Brightness": lambda image, level: V.adjust_brightness(image, 0.18 * level + 0.1),
    "Sharpness": lambda image, level: common.sharpness(image, 0.18 * level + 0.1),
}


def affine(a=1, b=0, c=0, d=0, e=1, f=0):
    """As in PIL: pixel (x, y) shows what was at (a x + b y + c, d x + e y + f)."""
    return np.array([[a, b, c], [d, e, f], [0, 0, 1]])


def rotate(level, height, width):
    """A rotation by 3 degrees times the level about the center."""
    angle = math.radians(3 * level)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = affine(cos, sin, 0, -sin, cos)
    center = affine(c=width / 2, f=height / 2)
    return center @ turn @ np.linalg.inv(center)


# Geometric operations: level with a sign, height, width of the picture -> matrix (3, 3).
GEOMETRIC = {
    "Rotate": rotate,
    "ShearX": lambda level, *size: affine(b=0.03 * level),
    "ShearY": lambda level, *size: affine(d=0.03 * level),
    "TranslateX": lambda level, *size: affine(c=level),
    "TranslateY": lambda level, *size: affine(f=level),
}
OPERATIONS = [*PHOTOMETRIC, *GEOMETRIC]


def warp(image, labels, matrix):
    """Move a picture (3, H, W) and its label maps (M, H, W), uint8, by a matrix, nearest pixel.
    Beyond the border the picture is GREY and the labels are 255."""
    height, width = image.shape[1:]
    exact = dict(dtype=torch.float64, device=image.device)  # float32 rounds some to a neighbor
    x = torch.arange(width, **exact) + 0.5  # centers of pixels
    y = torch.arange(height, **exact)[:, None] + 0.5
    places = []  # columns, rows (H, W): where each pixel comes from
    for (a, b, c), side in zip(matrix.tolist(), (width, height)):
        place = (a * x + (b * y + c)).floor().clamp(-1, side)
        places.append(place.long() + 1)
    column, row = places
    border = [1] * 4  # all pixels from outside come from the border
    image = F.pad(image, border, value=GREY)
    labels = F.pad(labels, border, value=IGNORE)
    return image[:, row, column], labels[:, row, column]


def cutout(image, side, generator):
    """Draw three grey squares with uniform centers, cut off at the border, into (3, H, W) uint8."""
    # Open: number, size, B; three of 32 x 32, labels stay, as in the authors' code   --cutout
    height, width = image.shape[1:]
    for _ in range(3):
        top = generator.randint(height) - side // 2
        left = generator.randint(width) - side // 2
        image[:, max(top, 0) : top + side, max(left, 0) : left + side] = GREY


def strong_view(images, labels, inside, generators, side):
    """A and B of Eqs. 1 and 3: RandAugment, then Cutout with squares of this side in the pictures.
    images (N, 3, H, W) uint8; labels (N, M, H, W) uint8, 255 beyond a moved picture's border;
    inside: top, bottom, left, right of each picture in its padding; generators: one a picture."""
    images, labels = images.clone(), labels.clone()
    for i, generator in enumerate(generators):
        top, bottom, left, right = inside[i]
        picture = images[i, :, top:bottom, left:right]  # shares memory with images; no padding
        matrix = unmoved = np.eye(3)
        # Open: how many, how strong; 3 of 14, each with probability .5 at level 1-9   --no-strong
        for _ in range(3):
            name = OPERATIONS[generator.randint(len(OPERATIONS))]
            apply = generator.uniform() < 0.5
            level = generator.randint(1, 10)
            sign = (-1, 1)[generator.randint(2)]
            if apply and name in PHOTOMETRIC:
                picture.copy_(PHOTOMETRIC[name](picture, level))
            elif apply:
                matrix = matrix @ GEOMETRIC[name](sign * level, *images.shape[2:])
        # Open: the order; geometric ones last, in one look-up: else Solarize would change GREY
        if matrix is not unmoved:
            images[i], labels[i] = warp(images[i], labels[i], matrix)
        cutout(picture, side, generator)
    return images, labels


# ---- EMA -----------------------------------------------------------------------------------------

@torch.no_grad()
def update_teacher(teacher, student, decay):
    """theta' <- decay theta' + (1 - decay) theta."""
    averages = list(teacher.parameters())
    torch._foreach_lerp_(averages, list(student.parameters()), 1 - decay)
    # Open: the teacher's buffers (running statistics); copied from the student, not averaged
    torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))


def decay_at(progress, decays):
    """The decay at this share of a stage, 0 to 1: one of four, from 0, 1/3, 2/3 and 5/6 on."""
    return decays[np.searchsorted((1 / 3, 2 / 3, 5 / 6), progress, "right")]


# ---- pseudo-labels -------------------------------------------------------------------------------

@torch.no_grad()
def make_pseudo_masks(args, run, keep, data, labeled, unlabeled, stage):
    """y_i = arg max f(x_i), i in L u U: a PNG of each in pseudo_labels/stage_<stage>/.
    stage: whose f (--pseudo-masks-of). keep["pseudo_miou"] gets their mIoU on unlabeled pictures,
    whose truth is for the log alone. Each process takes its share; existing masks stay."""
    folder = run.folder / f"pseudo_labels/stage_{stage}"
    run.claim(folder)
    network = keep[folder.name].eval()
    classes = len(data.names)
    table = torch.zeros(classes, classes, dtype=torch.int64)
    ids = (labeled + unlabeled)[common.rank() :: common.world_size()]
    for number, id in enumerate(ids, 1):
        if not common.pseudo_label_path(folder, id).exists():
            # Open: how; from the whole picture in one pass, without --scales, --flip, --base-size
            # Code: sets the car's bonnet in Cityscapes' pseudo-masks to 255; here it stays
            image = to_tensor(data.image(id))[None].to(run.device)
            prob = common.predict(
                network, image, args, image.shape[2:], scales=[1.0], flip=False, base_size=0)
            label = prob.argmax(1)[0].byte().cpu().numpy()  # Algorithm 1, lines 5, 9
            common.write_pseudo_label(folder, id, label, data.colors)
        if id not in labeled:
            label = to_tensor(common.read_pseudo_label(folder, id))
            truth = to_tensor(truth_for_the_log(data, id, label.shape))
            table += common.confusion_matrix(truth, label, classes)
        common.progress(f"stage {stage}, pseudo-masks", number, len(ids))
    miou = common.mean_iou(all_reduce(table.to(run.device)))
    common.say(f"stage {stage}   pseudo-masks: mIoU {miou:.1f} on unlabeled pictures (for the log)")
    keep["pseudo_miou"][folder.name] = miou if math.isfinite(miou) else None
    common.barrier()


# ---- networks: the second branch -----------------------------------------------------------------

class SecondBranch(nn.Module):
    """The blocks of g-hat or g-tilde that f does not share (Table VII): logits (B, K, h, w).
    g-hat: conv4 -> conv6 (conv5 at half the width) -> ASPP_2. g-tilde: conv5 -> ASPP_3."""

    def __init__(self, network, classes, kind):
        super().__init__()
        backbone = network.backbone
        conv5 = backbone.layer4
        channels = backbone.widths[-1]
        self.conv6 = None
        if kind == "g-hat":
            channels //= 2
            backbone.inplanes = conv5[0].conv1.in_channels  # from which _make_layer() begins
            self.conv6 = backbone._make_layer(type(conv5[0]), 256, len(conv5), stride=2)
            backbone.dilate(self.conv6, 4, first=4)  # in place of the stride
            if isinstance(backbone.bn1, nn.SyncBatchNorm):
                self.conv6 = nn.SyncBatchNorm.convert_sync_batchnorm(self.conv6)
        # Code: adds only two of the four rates, by a misplaced return   --aspp-branches 2
        self.aspp = nn.ModuleList()
        for conv in network.branches:
            rate = conv.dilation
            self.aspp.append(nn.Conv2d(channels, classes, 3, padding=rate, dilation=rate))
        # Open: conv6's weights and batch norm; N(0, .01) and the identity, as in the authors' code
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.01)

    def forward(self, layers):
        conv4, conv5 = layers[-2:]
        x = self.conv6(conv4) if self.conv6 else conv5
        return sum(conv(x) for conv in self.aspp)


class TwoBranches(nn.Module):
    """f and g in one pass: (B, 3, H, W) float -> logits of both, (B, K, h, w); g may be None."""

    def __init__(self, network, branch):
        super().__init__()
        self.network = network
        self.branch = branch

    def forward(self, image):
        layers = self.network.backbone.layers(self.network.normalize(image))
        f = self.network.classifier(self.network.decode(layers))
        g = self.branch(layers) if self.branch else None
        return f, g


# ---- losses --------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    """d_s and d_c: the mean of -log softmax(logits)_label over all pixels with a label, or 0.
    Each process returns its share times the number of processes, since gradients are averaged."""
    # Open: Eqs. 1 to 3 are sums, Sect. IV-B averages; means over known pixels of the step
    count = all_reduce((label != IGNORE).sum())
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total * common.world_size() / count.clamp(min=1)


# ---- training ------------------------------------------------------------------------------------

def start_stage(args, data, device, stage, before):
    """What a stage trains and keeps, for Run.restore(). before: what the stage before has kept."""
    # Open: layers that are not pretrained (the others: Sect. IV-B); new in each stage   --weights
    student = build_network(args, data, device, stage - 1)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    keep = {"student": student, "teacher": teacher, "results": before["results"],
            "pseudo_miou": before["pseudo_miou"]}
    if stage > 1 and args.pseudo_masks:
        new = copy.deepcopy(teacher)  # when resumed, restore() fills it with last.pt's weights
        keep[f"stage_{stage - 1}"] = before.get(args.pseudo_masks_of, new)
        kind = args.branch or ("g-hat" if stage == 2 else "g-tilde")  # Open: stage 4; g-tilde
        common.seed_torch(args.seed, "branch", stage)
        if args.network == "deeplabv2" and isinstance(student.backbone, common.ResNet):
            branch = SecondBranch(student, len(data.names), kind)
        else:
            other = build_network(args, data, device, args.stages + stage)
            branch = common.CopiedBranch(other, kind == "g-hat")
        keep["branch"] = branch.to(device, memory_format=torch.channels_last)
    trained = [keep[name] for name in ("student", "branch") if name in keep]
    keep["optimizer"] = common.make_optimizer(args, args.lr, *trained)
    keep["scaler"] = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return keep


def update_student(keep, learner, loss):
    """A step of the optimizer at a constant rate (Sect. IV-B)."""
    optimizer = keep["optimizer"]
    scaler = keep["scaler"]
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    common.average_buffers([learner])


def train_supervised(args, run, keep, data, labeled_ids, begin):
    """Stage 1, and the baseline: learn from labels alone, L = L_seg (Eq. 2)."""
    student = keep["student"]
    teacher = keep["teacher"]
    learner = common.parallel(student, run.device)
    run.images = args.stage1_batch_size
    stop = run.stages[run.stage]
    stream = Stream(data, labeled_ids, f"labeled, stage {run.stage}", args)
    batches = common.batches(stream, args, run.device, begin, stop, run.images)
    for iteration, labeled in enumerate(batches, begin):
        # 1 batch: labeled pictures
        # 2 pseudo-labels: none
        # 3 losses
        with autocast(args, run.device):
            logits = learner(to_float(labeled["image"]))
        logits = upsample(logits, args.crop, student.stride)  # f_theta(x), (B, K, H, W)
        loss_labeled = cross_entropy(logits, labeled["label"])  # Eq. 2

        # 4 backward
        update_student(keep, learner, loss_labeled)

        # 5 EMA
        # Open: a teacher in stage 1; yes (paper: no), else the EMA's gain would look like stage 2's
        update_teacher(teacher, student, decay_at(iteration / stop, args.ema_decay))

        # 6 log, evaluate, save
        run.step(iteration, {"loss_labeled": loss_labeled}, lr=args.lr)
        if run.due():
            keep["results"][run.stage] = run.evaluate({"student": student, "teacher": teacher})
            columns = {"labeled picture": labeled["image"], "label": labeled["label"]}
            run.panel(f"batch_{run.mark}", columns, rows=4)
        run.save(iteration, keep)


def train(args, run, keep, data, labeled_ids, all_ids, begin):
    """Stages 2, 3, ..: learn both tasks.
        L = L_seg + lambda_1 L_con + lambda_2 L_pl                      Eqs. 4, 5
        L_seg = sum over L of d_s(f_theta(x), y)                        Eq. 2
        L_con = sum over L u U of d_c(f_theta(A x), B f_theta'(x))      Eq. 1
        L_pl = sum over L u U of d_c(g(A x), B y')                      Eq. 3

    f_theta: student; f_theta': teacher; g: the branch g-hat or g-tilde; y': the pseudo-masks y-hat
    or y-tilde of the stage before; L: labeled_ids; L u U: all_ids."""
    student = keep["student"]
    teacher = keep["teacher"]
    learner = common.parallel(TwoBranches(student, keep.get("branch")), run.device)
    before = f"stage_{run.stage - 1}"
    masks = run.folder / "pseudo_labels" / before if args.pseudo_masks else None
    name = f"labeled, stage {run.stage}"  # one name, the same views: with labels, with pseudo-masks
    streams = [
        Stream(data, labeled_ids, name, args),
        Stream(data, labeled_ids, name, args, pseudo_labels=masks),
        Stream(data, all_ids, f"all, stage {run.stage}", args, labeled=args.pseudo_masks,
               pseudo_labels=masks)]
    sizes = [args.labeled_batch_size, args.labeled_batch_size, args.batch_size]
    run.images = args.labeled_batch_size + args.batch_size
    stop = run.stages[run.stage]
    batches = []
    for stream, size in zip(streams, sizes):
        batches.append(common.batches(stream, args, run.device, begin, stop, size))
    for iteration, (labeled, labeled_masks, union) in enumerate(zip(*batches), begin):
        # 1 batch: Sub-batch 2 (N_l pictures of L), then Sub-batch 1 (N pictures of L u U)
        N_l = len(labeled["image"])
        weak = torch.cat([labeled["image"], union["image"]])  # x (N_l + N, 3, H, W)
        valid = torch.cat([labeled["valid"], union["valid"]])  # False in padding, (N_l + N, H, W)

        # 2 pseudo-labels: of the teacher on the weak views, and the masks of the stage before
        targets = {}
        # Open: soft or hard targets of d_c; hard ones without a threshold, as the authors' code
        if args.consistency:
            with torch.no_grad(), autocast(args, run.device):
                logits = teacher(to_float(weak))
            logits = upsample(logits, args.crop, student.stride)
            label = logits.max(1).indices  # f_theta'(x), (N_l + N, H, W)
            targets["pseudo-label"] = label.masked_fill(~valid, IGNORE)
        if args.pseudo_masks:  # y', (N_l + N, H, W)
            targets["pseudo-mask"] = torch.cat([labeled_masks["label"], union["label"]])
        view = weak
        if args.strong and targets:  # A = B = identity for Sub-batch 2 (Sect. IV-B)
            generators = [rng(args.seed, "strong", run.stage, place) for place in union["position"]]
            maps = torch.stack(list(targets.values()), 1)  # (N_l + N, M, H, W)
            strong, maps[N_l:] = strong_view(
                union["image"], maps[N_l:].byte(), union["inside"], generators, args.cutout)
            view = torch.cat([labeled["image"], strong])  # A x
            targets = dict(zip(targets, maps.unbind(1)))  # B f_theta'(x), B y'

        # 3 losses
        with autocast(args, run.device):
            f, g = learner(to_float(view))  # (N_l + N, K, h, w) each
        f = upsample(f, args.crop, student.stride)  # f_theta(A x), (N_l + N, K, H, W)
        losses = {"loss_labeled": cross_entropy(f[:N_l], labeled["label"])}  # Eq. 2
        if args.consistency:
            losses["loss_consistency"] = cross_entropy(f, targets["pseudo-label"])  # Eq. 1
        if args.pseudo_masks:
            g = upsample(g, args.crop, student.stride)  # g(A x), (N_l + N, K, H, W)
            losses["loss_pseudo"] = cross_entropy(g, targets["pseudo-mask"])  # Eq. 3
        loss = losses["loss_labeled"]
        loss = loss + args.lambda1 * losses.get("loss_consistency", 0)
        loss = loss + args.lambda2 * losses.get("loss_pseudo", 0)  # Eqs. 4, 5

        # 4 backward
        update_student(keep, learner, loss)

        # 5 EMA
        update_teacher(teacher, student, decay_at(iteration / stop, args.ema_decay))

        # 6 log, evaluate, save
        moved = {name: target[N_l:] for name, target in targets.items()}
        miou = keep["pseudo_miou"].get(before)
        run.step(iteration, losses, moved, lr=args.lr, pseudo_miou=miou)
        if run.due():
            keep["results"][run.stage] = run.evaluate({"student": student, "teacher": teacher})
            columns = {"picture of L or U": union["image"], "strong view": view[N_l:]}
            run.panel(f"batch_{run.mark}", columns | moved, rows=4)
        run.save(iteration, keep)


def show_stages(run, teacher, data, ids):
    """pictures/stages.png: masks of each stage and the last prediction, on unlabeled pictures."""
    ids = ids[:: max(1, len(ids) // 5)][:5]
    images = [to_tensor(data.image(id)) for id in ids]
    columns = {"unlabeled picture": images}
    columns["truth (not used)"] = [
        to_tensor(truth_for_the_log(data, id, image.shape[1:]))
        for id, image in zip(ids, images)]
    for folder in sorted((run.folder / "pseudo_labels").glob("stage_*")):
        columns[f"pseudo-mask of {folder.name}"] = [
            to_tensor(common.read_pseudo_label(folder, id)) for id in ids]
    run.draw_predictions("stages", columns, {"last prediction": teacher})


# ---- main ----------------------------------------------------------------------------------------

def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args, uneven=True)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    common.need(args.iterations > 0, "--iterations 0: a stage needs 1 or more")
    common.need(args.head == "plain", "--head bottleneck: the paper's branches need --head plain")
    if not args.ema:
        args.ema_decay = [0.0] * 4  # theta' = theta: the Gamma model of Sect. III-A
    data = common.open_dataset(args)
    # Open: the split; by --seed (Cityscapes: of French et al.); paper: of Mittal et al.   --split
    labeled, unlabeled = common.split(args, data)

    stages = dict.fromkeys(range(1, args.stages + 1), args.iterations)  # stage: iterations
    stages[1] = args.stage1_iterations or args.iterations
    method = "three-stage-supervised" if args.supervised else "three-stage"
    if args.supervised:
        # Open: the length of the baseline; as many steps as all stages together   --supervised
        stages = {1: sum(stages.values())}
    common.say(f"stages    {stages} (stage: iterations)")
    # Open: last or best step; the last, of theta' as in the authors' code (Algorithm 1, 13: theta)
    run = common.Run(method, args, data, labeled, unlabeled, device, stages, "teacher")

    keep = {"results": {}, "pseudo_miou": {}}
    for stage in stages:  # Algorithm 1, with its line numbers
        if not run.enter(stage):
            continue
        keep = start_stage(args, data, device, stage, keep)  # 3, 7, 11
        begin = run.restore(keep)
        if stage == 1:
            train_supervised(args, run, keep, data, labeled, begin)  # 4
        else:
            if args.pseudo_masks:
                make_pseudo_masks(args, run, keep, data, labeled, unlabeled, stage - 1)  # 5, 9
            train(args, run, keep, data, labeled, labeled + unlabeled, begin)  # 8, 12
    show_stages(run, keep["teacher"], data, unlabeled or labeled)

    last = keep["results"].pop(run.stage)  # student, teacher
    tables = {f"stage_{stage}": table["teacher"] for stage, table in keep["results"].items()}
    run.finish({}, paper_miou(args), tables | last, pseudo_miou=keep["pseudo_miou"])  # 13


if __name__ == "__main__":
    common.run_main(main)
