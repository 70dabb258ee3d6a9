"""Robust Mutual Learning for Semi-supervised Semantic Segmentation
Pan Zhang, Bo Zhang, Ting Zhang, Dong Chen, Fang Wen. arXiv 2106.00609

Two students learn from few labeled and many unlabeled pictures. Each student has a mean teacher,
and both students learn from the pseudo-labels of both teachers. To keep the students different,
each one gets different strong perturbations (RandAugment's photometric operations, CutMix) and
different model noise (dropout, stochastic depth). A teacher rectifies its pseudo-labels before they
are used: it trusts a class where the features lie near the prototype of that class. When a stage
ends, new soft pseudo-labels are predicted, and the next stage starts from them.

    python rml.py                               # drawn streets on a CPU, in minutes
    torchrun --nproc_per_node=4 rml.py --dataset cityscapes --data-root DIR --labels 372

paper -> code                                   (what the paper leaves open: grep "# Open:" rml.py)
    Eq. 1           supervised loss             train_supervised() and train(), step 3
    Eq. 2           threshold tau               hard_label(), --mutual none --threshold
    Eq. 3           direct mutual learning      MUTUAL["direct"]
    Eq. 4           labels of mean teachers     train(), step 2; alone: --no-rectify (IML, Table 4)
    Eq. 5           peer and self supervision   train(), step 3, loss_pseudo
    Eq. 6           rectified pseudo-label      rectify(), hard_label()
    Eq. 9           class-wise confidence       rectify(); Eqs. 7 and 8 derive it
    Eq. 10          prototypes of all pictures  start_stage()
    Eq. 11          moving average of them      update_prototypes()
    Sect. 4.1, 5.2  input noise, model noise    strong_view(), add_model_noise()
    Figs. 2, 4      coupling; pseudo-labels     tests/figure_rml.py coupling; compare RUN RUN ..
    Tables 1-4      results, ablations          PAPER_MIOU, PAPER_ABLATIONS; flags in README.md
    Table 5         CNN and Transformer         --network deeplabv2,setr; arguments_of_students()
"""

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as V

import common

# ---- arguments -----------------------------------------------------------------------------------

# The arguments by dataset: data, network, optimizer, method, run. Cityscapes has the paper's values
# (Sect. 5.2). Where the paper has none, they come from French et al., from ProDA, or from us.
PAPER = {}
PAPER["cityscapes"] = dict(
    # Open: what "batch size 4" counts; we take 4 labeled and 4 unlabeled pictures   --batch-size
    labels="372", size=(512, 1024), crop=(256, 512), scale=(1.0, 1.0), batch_size=4, workers=4,
    # Open: DeepLabv2's head, which has no layer before its classifier for prototypes; we take that
    #   of ProDA (256 features, group norm), also in the baseline   --head plain
    network="deeplabv2", backbone="resnet101", weights="imagenet", head="bottleneck",
    # Open: batch norm; we freeze it as loaded, like French et al.   --batch-norm
    batch_norm="frozen",
    optimizer="sgd", lr=1e-4, weight_decay=2e-4, setr_lr=1.0,
    stage0_iterations=40_000, stage0_lr=2.5e-4, stage0_head_lr=10.0,
    iterations=90_000, ema_decay=0.999, dropout=0.5, drop_path=0.2,
    prototype_decay=0.9999, prototype_min_cells=10,
    log_every=50, eval_every=5000, save_every=1000)
# A small network from scratch on a CPU. It has few weights, so we give it less noise.
PAPER["streets"] = PAPER["cityscapes"] | dict(
    labels="8", size=(64, 128), crop=(64, 128), workers=0,
    backbone="tiny", weights="none",
    optimizer="adamw", lr=3e-3, weight_decay=1e-2, setr_lr=0.3,
    stage0_iterations=400, stage0_lr=3e-3, stage0_head_lr=1.0,
    iterations=900, ema_decay=0.99, dropout=0.1, drop_path=0.05,
    prototype_decay=0.999, prototype_min_cells=1, eval_every=300, save_every=100)
PAPER["camvid-cpu"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128),
    lr=2e-3, stage0_iterations=2000, iterations=2000, eval_every=500)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=(360, 480), crop=(256, 352),
    stage0_iterations=10_000, iterations=20_000, eval_every=2000)
# Your own pictures: the longer side is at most --size, and all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(
    labels="1/1", size=(256,), crop=(128, 128), scale=(0.75, 1.5))
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(
    labels="1/1", size=(640,), crop=(320, 320), scale=(0.5, 1.5),
    stage0_iterations=5000, iterations=10_000)
PAPER["vocaug"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=None, crop=(321, 321), scale=(0.5, 1.5), batch_size=10, iterations=60_000)
# Open: what 1/8 of VOC counts; the text says of the 1,464 standard pictures, the tables' "Full" are
#   10,582: voc draws 1,323 of the 1,464, vocaug 1,323 of all 10,582   --dataset --labels --split
PAPER["voc"] = PAPER["vocaug"] | dict(labels="1323", extra="all")
# The paper's mIoU (Tables 1, 2, 3) by --supervised, data and weights, then labels.
PAPER_MIOU = {
    (True, "cityscapes", "imagenet"): {100: 45.40, 372: 56.08, 744: 60.91, 2975: 67.14},
    (True, "voc", "imagenet"): {106: 36.25, 212: 46.30, 529: 55.92, 1323: 63.73, 10582: 72.62},
    (False, "cityscapes", "imagenet"): {100: 58.25, 372: 63.97, 744: 66.15},
    (False, "voc", "imagenet"): {106: 53.77, 212: 64.63, 529: 68.82, 1323: 70.34},
    (False, "voc", "coco"): {106: 63.60, 212: 68.66, 529: 71.19, 1323: 73.38},
}
# Tables 4, 5 (Cityscapes, 372 labels; of student 1), by --network and what differs from PAPER.
# Open: noise in Table 5; none (Sect. 5.4), but its DeepLabv2 pair has the full noises of Table 4
IML = "cutmix=False drop_path=0.0 dropout=0.0 photometric=False rectify=False stages=1"
PAPER_ABLATIONS = {
    f"deeplabv2 {IML}": 60.09,  # indirect mutual learning
    "deeplabv2 cutmix=False photometric=False rectify=False stages=1": 60.51,  # + model noises
    "deeplabv2 drop_path=0.0 dropout=0.0 rectify=False stages=1": 60.49,  # + input noises
    "deeplabv2 rectify=False stages=1": 61.25,  # + full noises
    "deeplabv2 stages=1": 62.85,  # RML
    "setr supervised=True": 57.79,  # baseline
    f"setr {IML}": 64.15,
    f"deeplabv2,setr {IML}": 63.96,
    f"setr,deeplabv2 {IML}": 64.35,
}
# Which networks predict the pseudo-labels, and whose labels student 1 and student 2 learn from:
# those of model 0, model 1, or both (the peer first).
MUTUAL = {
    "none": ("student", ([0], [1])),  # Eq. 2
    "mean-teacher": ("teacher", ([0], [1])),
    "direct": ("student", ([1], [0])),  # Eq. 3
    "peer": ("teacher", ([1], [0])),  # Eq. 3 with the labels of Eq. 4
    "indirect": ("teacher", ([1, 0], [0, 1])),  # Eqs. 4 and 5
}


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n\n")[1],
        epilog="Defaults are in the table PAPER in rml.py; a run writes all values to args.json.")
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("robust mutual learning").add_argument
    add("--mutual", choices=MUTUAL, default="indirect",
        help="from whose pseudo-labels the students learn (Sect. 3, 4.1; Fig. 4)")
    add("--rectify", action=switch, help="rectify labels (Sect. 4.2); default: peer, indirect")
    add("--stages", type=int, default=2, help="stages after stage 0 (Table 4)")
    add("--threshold", type=float, default=0.0, help="tau of Eq. 2; labels below it are ignored")
    add("--photometric", action=switch, default=True, help="photometric RandAugment (Sect. 4.1)")
    add("--cutmix", action=switch, default=True, help="CutMix (Sect. 4.1)")
    add("--dropout", type=float, help="dropout before the last classifier (Sect. 5.2)")
    add("--drop-path", type=float, help="probability to drop a residual branch (Sect. 5.2)")
    add("--linear-drop-path", action="store_true", help="probability grows linearly with depth")
    add("--ema-decay", type=float, help="decay of the mean teachers (Sect. 4.1)")
    add("--prototype-decay", type=float, help="lambda of Eq. 11")
    add("--prototype-min-cells", type=int, help="cells of a class that a picture needs (Eq. 10)")
    add("--stage0-iterations", type=int, help="iterations on labels alone, before stage 1")
    add("--stage0-lr", type=float, help="learning rate at the start of stage 0")
    add("--stage0-head-lr", type=float, help="learning rate of the head, in units of --stage0-lr")
    add("--setr-lr", type=float, help="learning rate of SETR, in units of the others")
    common.add_arguments(parser, common.NETWORKS + common.TRANSFORMERS, several=True)
    return parser


def paper_miou(args):
    """The paper's mIoU of the setting that these arguments make, or None."""
    data = args.dataset.removesuffix("aug"), args.weights
    if not set(args.changed) - {"weights"}:  # everything else as in the table PAPER
        return PAPER_MIOU.get((args.supervised, *data), {}).get(args.labels)
    if data != ("cityscapes", "imagenet") or args.labels != 372:
        return None
    changed = sorted(set(args.changed) - {"network"})
    if args.supervised:
        changed.append("supervised")
    values = [f"{name}={getattr(args, name)}" for name in changed]
    return PAPER_ABLATIONS.get(" ".join([args.network, *values]))


def arguments_of_students(args):
    """The arguments of each student: --network, --backbone and --weights may name two (Table 5)."""
    students = [copy.copy(args) for _ in range(1 if args.supervised else 2)]
    for name in ("network", "backbone", "weights"):
        text = getattr(args, name)
        values = [text] if Path(text).is_file() else text.split(",")
        common.need(len(values) <= len(students), f"--{name} {text}: there are two students, and "
                    "with --supervised one student")
        for student, value in zip(students, values * 2):
            setattr(student, name, value)
    for student in students:
        # Open: SETR's decoder and backbone; we take PUP, ViT-B/16   --network setr-naive --backbone
        is_setr = student.network in common.TRANSFORMERS
        if is_setr and student.backbone != "tiny" and "backbone" not in args.given:
            student.backbone = "vit_b_16"
    return students


# ---- perturbations -------------------------------------------------------------------------------

def sharpness(image, factor):
    """PIL's Sharpness, 0: smooth, 1: unchanged. (torchvision's is a sync point on a GPU.)"""
    original = image.float()
    smooth = image.float()
    box = F.avg_pool2d(original, 3, stride=1, divisor_override=1)  # sums of 3x3 pixels
    smooth[:, 1:-1, 1:-1] = ((box + 4 * original[:, 1:-1, 1:-1]) / 13).round()
    blended = smooth * (1 - factor) + original * factor
    return blended.clamp(0, 255).byte()


# RandAugment's photometric operations, level v = 1 .. 9: (3, H, W) uint8 -> (3, H, W) uint8.
PHOTOMETRIC = (
    lambda image, v: image,
    lambda image, v: V.autocontrast(image),
    lambda image, v: V.equalize(image),
    lambda image, v: V.adjust_brightness(image, 0.09 * v + 0.05),
    lambda image, v: V.adjust_saturation(image, 0.09 * v + 0.05),
    lambda image, v: V.adjust_contrast(image, 0.09 * v + 0.05),
    lambda image, v: sharpness(image, 0.09 * v + 0.05),
    lambda image, v: V.posterize(image, int(0.4 * v) + 4),
    lambda image, v: V.solarize(image, 256 - int(25.6 * v)),
)


def photometric(images, generators):
    """Two random operations on each picture, each with probability .5: (B, 3, H, W) uint8."""
    strong = []
    for image, generator in zip(images, generators):
        # Open: how many operations, and how strong; two, each at a random level   --no-photometric
        for _ in range(2):
            operation = PHOTOMETRIC[generator.randint(len(PHOTOMETRIC))]
            apply = generator.uniform() < 0.5
            level = generator.randint(1, 10)
            if apply:
                image = operation(image, level)
        strong.append(image)
    return torch.stack(strong)


def cutmix_mask(size, generator, device="cpu"):
    """(H, W) bool, True inside one box of half the area, at a random place."""
    # Open: the mask; we take one box of half the area, like French et al.   --no-cutmix
    height, width = size
    share = math.exp(generator.uniform() * math.log(0.5))  # of the height, in [.5, 1]
    box_height = round(share * height)
    box_width = round(0.5 / share * width)
    top = generator.randint(height - box_height + 1)
    left = generator.randint(width - box_width + 1)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[top : top + box_height, left : left + box_width] = True
    return mask


def join(batches, name):
    """One tensor of several batches."""
    return torch.cat([batch[name] for batch in batches])


def strong_view(unlabeled, pseudo_labels, args, stage, student):
    """Gamma, drawn anew for each student: photometric operations on each picture, then CutMix.

    unlabeled: a batch and, for CutMix, the batch of its partners; pseudo_labels: of each model,
    (2B, H, W), without CutMix (B, H, W). Returns the view (B, 3, H, W) uint8, and its labels."""
    view = join(unlabeled, "image")  # (2B, 3, H, W)
    if args.photometric:
        generators = []
        for name, batch in zip("up", unlabeled):  # unlabeled, partners
            for place in batch["position"]:
                generator = common.rng(args.seed, "photometric", stage, student, name, place)
                generators.append(generator)
        view = photometric(view, generators)
    if not args.cutmix:
        return view, pseudo_labels
    # Open: the partners, and when labels are mixed; partners come from a second, independent batch,
    #   and hard labels are mixed, after rectification   --no-cutmix
    masks = []
    for place in unlabeled[0]["position"]:
        generator = common.rng(args.seed, "cutmix", stage, student, place)
        masks.append(cutmix_mask(view.shape[2:], generator, view.device))
    mask = torch.stack(masks)  # (B, H, W), True: from the partner
    image, partner = view.chunk(2)  # (B, 3, H, W) each
    image_label, partner_label = torch.stack(pseudo_labels).chunk(2, 1)  # (2, B, H, W) each
    return partner.where(mask[:, None], image), partner_label.where(mask, image_label)


def add_model_noise(network, dropout, drop_path, linear=False):
    """Add dropout before the last classifier, stochastic depth to residual branches. Call once."""
    network.dropout = torch.nn.Dropout(dropout)
    kinds = BasicBlock, Bottleneck, EncoderBlock
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    for depth, block in enumerate(blocks, 1):
        # Open: whether .8 (Sect. 5.2) holds for every block; yes   --linear-drop-path
        probability = drop_path * depth / len(blocks) if linear else drop_path
        # Registered on the block: a frozen norm is always in eval mode, which is without noise.
        block.stochastic_depth = StochasticDepth(probability, mode="row")
        if isinstance(block, EncoderBlock):  # both branches end with a dropout of probability 0
            block.dropout = block.stochastic_depth
            block.mlp[-1] = block.stochastic_depth
        else:  # the residual branch ends with a norm
            last_norm = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            last_norm.register_forward_hook(
                lambda norm, inputs, output, drop=block.stochastic_depth: drop(output))


# ---- EMA -----------------------------------------------------------------------------------------

@torch.no_grad()
def update_teacher(teacher, student, decay):
    """teacher <- decay teacher + (1 - decay) student. Buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    for teacher_buffer, student_buffer in zip(teacher.buffers(), student.buffers()):
        teacher_buffer.copy_(student_buffer)


# ---- pseudo-labels -------------------------------------------------------------------------------

@torch.no_grad()
def features_and_logits(network, image, args):
    """Features (B, C, h, w) and logits (B, K, h, w) of pictures (B, 3, H, W) uint8; no noise."""
    network.eval()
    with common.autocast(args, image.device):
        # Open: which layer is f; we take the input of the last conv, like ProDA   --head
        features = network.features(common.to_float(image))
        stride, align_corners = cells(network, args)
        ratio = stride // network.stride
        if ratio > 1 and align_corners:
            features = F.avg_pool2d(features, ratio + 1, ratio, ratio // 2, count_include_pad=False)
        elif ratio > 1:
            features = F.avg_pool2d(features, ratio, ceil_mode=True)
        h, w = (math.ceil(side / stride) for side in image.shape[2:])
        features = features[:, :, :h, :w]  # Caffe-style networks have one row and column more
        return features, network.classifier(features)


def cells(network, args):
    """Where the cells of features_and_logits() lie: stride and align_corners of upsample()."""
    # Open: the resolution of Eqs. 6, 9; DeepLabv2's stride, finer features (SETR) are averaged
    stride = max(network.stride, args.cell) if args.rectify else network.stride
    return stride, network.align_corners


def rectify(features, p0, eta):
    """Rectified class probabilities p^t (B, K, h, w), divided by their sum over the classes.

        omega_k = exp(-||f~ - eta_k||) / sum_k' exp(-||f~ - eta_k'||)    Eq. 9
        p_k^t = omega_k p_k^0                                            Eq. 6

    f~: features (B, C, h, w); eta: prototypes (K, C), inf: never seen; p^0: p0 (B, K, h, w)."""
    B, C, h, w = features.shape
    f = features.float().flatten(2).transpose(1, 2)  # (B, hw, C)
    # Open: the scale of the distance; we use no normalization, no temperature, and no square
    distance = torch.cdist(f, eta, compute_mode="donot_use_mm_for_euclid_dist")  # (B, hw, K)
    distance = distance.clamp(max=1e4)  # never seen: omega = 0; if no class was seen: 1 / K
    omega = torch.softmax(-distance, 2).transpose(1, 2).view(B, -1, h, w)  # Eq. 9
    p = omega * p0  # Eq. 6
    return p / p.sum(1, keepdim=True).clamp(min=1e-30)


def hard_label(prob, cells, valid, threshold=0.0):
    """Pseudo-labels (B, H, W) of prob (B, K, h, w): one_hot of Eqs. 2, 4, 6 as class ids; 255
    where valid (B, H, W) is False, or the confidence is not above tau (threshold)."""
    # Open: at which resolution argmax is taken; at that of the crop
    prob = prob.contiguous(memory_format=torch.channels_last)  # faster to upsample
    confidence, pseudo_label = common.upsample(prob, valid.shape[1:], *cells).max(1)
    return pseudo_label.where(valid & (confidence > threshold), common.IGNORE)  # Eq. 2


def class_sums(features, label, classes):
    """The sum of the features (B, C, h, w) of each label (B, h, w) and, in the last column, their
    number: (K, C + 1)."""
    one_hot = F.one_hot(label.flatten(), classes + 1)[:, :classes].float()  # (Bhw, K); K: unknown
    features = features.float().transpose(0, 1).flatten(1)  # (C, Bhw)
    return torch.cat([one_hot.T @ features.T, one_hot.sum(0)[:, None]], 1)


@torch.no_grad()
def update_prototypes(eta, features, logits, valid, decay):
    """Moved prototypes (K, C).

        eta_k <- lambda eta_k + (1 - lambda) eta'_k    Eq. 11

    eta': mean feature of class k in this batch, by the teacher's argmax; lambda: decay.
    features: (B, C, h, w), logits: (B, K, h, w); valid: (B, h, w) bool, False in padding."""
    prediction = logits.max(1).indices.where(valid, len(eta))  # max: faster than argmax
    sums = common.all_reduce(class_sums(features, prediction, len(eta)))
    counts = sums[:, -1:]
    mean = sums[:, :-1] / counts.clamp(min=1)  # eta'
    # Open: classes without eta or eta'; a new class takes eta' at once, an absent one keeps eta
    moved = torch.where(eta.isfinite(), decay * eta + (1 - decay) * mean, mean)  # Eq. 11
    return torch.where(counts > 0, moved, eta)


@torch.no_grad()
def start_stage(networks, folders, data, labeled_ids, unlabeled_ids, args, device):
    """One pass over all training pictures. Writes p^0 to the folders; returns {model: eta (K, C)}.
    As printed (see "Open" below):
        eta_k = 1 / |D_l u D_u| sum_x mean_i^HW(f~(x)^i 1(argmax h~(x)^i == k))    Eq. 10"""
    K = len(data.names)
    sums = [torch.zeros(K, network.feature_channels + 1, device=device) for network in networks]
    pictures = (labeled_ids + unlabeled_ids)[common.rank() :: common.world_size()]
    wanted = set(unlabeled_ids)
    for number, id in enumerate(pictures, 1):
        image = common.to_tensor(data.image(id))[None].to(device)
        for network, total, folder in zip(networks, sums, folders):
            features, logits = features_and_logits(network, image, args)
            if id in wanted:
                # Open: what "initial" means; p^0 is of the whole, unaugmented picture, like ProDA
                common.write_soft_label(folder, id, logits[0].float().softmax(0))  # (K, h, w)
            of_picture = class_sums(features, logits.argmax(1), K)
            counts = of_picture[:, -1:]
            # Open: Eq. 10 as printed is no centroid, since it divides by HW |D|; we take the mean
            #   over the pictures that have enough cells of the class   --prototype-min-cells
            enough = counts >= args.prototype_min_cells
            total += of_picture / counts.clamp(min=1) * enough  # mean_i^HW; last column: 1 or 0
        common.progress("pseudo-labels and prototypes of all pictures", number, len(pictures))
    prototypes = {}
    for i, total in enumerate(sums):
        counts = common.all_reduce(total)[:, -1:]
        eta = total[:, :-1] / counts.clamp(min=1)  # Eq. 10
        prototypes[i] = eta.where(counts > 0, math.inf)
    common.barrier()  # every p^0 is on disk before any process reads one
    return prototypes


# ---- losses --------------------------------------------------------------------------------------

def cross_entropy(log_prob, label):
    """H of Eqs. 1, 3, 5: the mean of -log_prob (B, K, H, W) of the label (B, H, W) where not 255.

    DDP averages gradients over processes, so each one returns its share times their number."""
    # Open: what Eq. 2 divides by; we divide by the number of confident pixels   --threshold
    count = common.all_reduce((label != common.IGNORE).sum())
    loss = F.nll_loss(log_prob, label, ignore_index=common.IGNORE, reduction="sum")
    return loss * common.world_size() / count.clamp(min=1)


# ---- training ------------------------------------------------------------------------------------

def numbered(name, things):
    """{name_1: the first thing, name_2: ..}"""
    return {f"{name}_{number}": thing for number, thing in enumerate(things, 1)}


def make_optimizers(students, lr, head_lr, args):
    """An optimizer for each student. The head learns at lr times head_lr."""
    optimizers = []
    for student in students:
        # Open: SETR's optimizer and rate; we use the others' rate times a factor   --setr-lr
        factor = args.setr_lr if student.spec["network"] in common.TRANSFORMERS else 1.0
        parameters = student.backbone.parameters(), student.head_parameters()
        optimizer = common.make_optimizer(args, lr * factor, *parameters)
        for group, multiple in zip(optimizer.param_groups, (1.0, head_lr)):
            group["initial_lr"] = lr * factor * multiple
        optimizers.append(optimizer)
    return optimizers


def update_students(students, optimizers, scaler, progress):
    """Step with polynomial decay (Sect. 5.2); progress: 0 to 1. Returns the rates for the log."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - progress) ** 0.9  # Open: the power; DeepLab's
        scaler.step(optimizer)
    scaler.update()
    common.average_buffers(students)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    return dict(zip(("lr", "lr_2"), rates))  # of the backbones


def student_log_prob(learner, image, args, stage, iteration, j):
    """Log-probabilities (B, K, *crop) of pictures (B, 3, H, W) uint8, with noise."""
    learner.train()
    common.seed_torch(args.seed, "noise", stage, iteration, common.rank(), j)
    with common.autocast(args, image.device):
        logits = learner(common.to_float(image))
    network = getattr(learner, "module", learner)  # without DistributedDataParallel
    logits = common.upsample(logits, args.crop, network.stride, network.align_corners)
    return logits.log_softmax(1)


def train_supervised(run, students, learners, teachers, data, labeled_ids, args, device):
    """Stage 0, and the baseline: the students learn from labels alone (Eq. 1), without noise."""
    # Open: how the first models are trained; on labels alone, with other initial heads and orders
    #   of pictures, and a fast head   --stage0-iterations --stage0-lr --stage0-head-lr
    iterations = run.stages[0]
    networks = numbered("student", students) | numbered("teacher", teachers)
    optimizers = make_optimizers(students, args.stage0_lr, args.stage0_head_lr, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    keep = networks | numbered("optimizer", optimizers) | {"scaler": scaler}
    begin = run.restore(keep)
    names = [f"labeled {j}, stage 0" for j in range(len(students))]
    streams = [common.Stream(data, labeled_ids, name, args) for name in names]
    streams = [common.batches(stream, args, device, begin, iterations) for stream in streams]
    for iteration, batches in enumerate(zip(*streams), begin):
        # 1 batch: labeled pictures, other ones for each student
        # 2 pseudo-labels: none
        # 3 losses
        losses = {}
        for j, (learner, labeled) in enumerate(zip(learners, batches)):
            log_prob = student_log_prob(learner, labeled["image"], args, 0, iteration, j)
            loss_labeled = cross_entropy(log_prob, labeled["label"])  # Eq. 1
            losses[f"loss_labeled_{j + 1}"] = loss_labeled
            # 4 backward
            optimizers[j].zero_grad()
            scaler.scale(loss_labeled).backward()
        rates = update_students(students, optimizers, scaler, iteration / iterations)

        # 5 EMA
        for teacher, student in zip(teachers, students):
            update_teacher(teacher, student, args.ema_decay)

        # 6 log, evaluate, save
        run.step(iteration, losses, **rates)
        if run.due():
            run.evaluate(networks)
        run.save(iteration, keep)


def train(run, stage, students, learners, teachers, data, labeled_ids, unlabeled_ids, args):
    """One stage: the students learn from labels and from the pseudo-labels of both teachers."""
    # Open: what a new stage keeps; the students, and teachers restart as their copies   --stages
    device = run.device
    iterations = run.stages[stage]
    kind, learns_from = MUTUAL[args.mutual]
    predictors = teachers if kind == "teacher" else students
    networks = numbered("student", students) | numbered("teacher", teachers)
    optimizers = make_optimizers(students, args.lr, 1.0, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    prototypes = {}  # of both models
    state = {"scaler": scaler, "prototypes": prototypes}
    keep = networks | numbered("optimizer", optimizers) | state
    begin = run.restore(keep)
    folders = []  # of p^0
    if args.rectify:
        folders = [run.folder / f"soft_labels/stage_{stage}_model_{number}" for number in (1, 2)]
    if args.rectify and begin == 0:
        # Open: whose p^0 and first eta; stage 0's students', later the last stage's teachers'
        sources = students if stage == 1 else predictors
        etas = start_stage(sources, folders, data, labeled_ids, unlabeled_ids, args, device)
        prototypes.update(etas)
        run.forget_soft_labels(keep=folders)
    if begin == 0:
        for teacher, student in zip(teachers, students):
            teacher.load_state_dict(student.state_dict())
    soft_labels = {}
    if args.rectify:
        soft_labels = {f: model.align_corners for f, model in zip(folders, predictors)}
    streams = [common.Stream(data, labeled_ids, f"labeled, stage {stage}", args)]
    for name in ("unlabeled", "partner") if args.cutmix else ("unlabeled",):
        streams.append(common.Stream(data, unlabeled_ids, f"{name}, stage {stage}", args,
                                     labeled=False, soft_labels=soft_labels, stride=args.cell))
    streams = [common.batches(stream, args, device, begin, iterations) for stream in streams]

    for iteration, (labeled, *unlabeled) in enumerate(zip(*streams), begin):
        # 1 batch: labeled pictures; unlabeled ones and, for CutMix, as many partners: weak views
        weak = join(unlabeled, "image")  # (2B, 3, H, W) uint8, without CutMix (B, 3, H, W)
        valid = join(unlabeled, "valid")  # (2B, H, W), False in padding

        # 2 pseudo-labels: of both models, without noise
        probs, pseudo_labels = [], []
        for i, predictor in enumerate(predictors):
            features, logits = features_and_logits(predictor, weak, args)
            prob = logits.float().softmax(1)  # Eq. 4 (of a student: Eqs. 2, 3), (2B, K, h, w)
            probs.append(prob)
            if args.rectify:
                p0 = join(unlabeled, f"soft_{i}")  # (2B, K, h, w)
                eta = prototypes[i].to(device)  # from the CPU, if just restored
                prob = rectify(features, p0, eta)  # Eqs. 6, 9
                # Open: the batch of eta'; unlabeled pictures and partners, not labeled ones
                known = valid[:, ::args.cell, ::args.cell]
                eta = update_prototypes(eta, features, logits, known, args.prototype_decay)
                prototypes[i] = eta  # Eq. 11
            pseudo_label = hard_label(prob, cells(predictor, args), valid, args.threshold)
            pseudo_labels.append(pseudo_label)  # (2B, H, W)

        # 3 losses: the students get the same weak views; only Gamma_j and the noise differ
        losses = {}
        for j, learner in enumerate(learners):
            view, target = strong_view(unlabeled, pseudo_labels, args, stage, j)  # Gamma_j
            image = torch.cat([labeled["image"], view])  # (B + B, 3, H, W): labeled, strong
            log_prob = student_log_prob(learner, image, args, stage, iteration, j)
            log_prob_labeled, log_prob_strong = log_prob.chunk(2)  # (B, K, H, W) each
            loss = cross_entropy(log_prob_labeled, labeled["label"])  # Eq. 1
            losses[f"loss_labeled_{j + 1}"] = loss
            for i in learns_from[j]:
                loss_pseudo = cross_entropy(log_prob_strong, target[i])  # Eq. 5; Eqs. 2, 3
                losses[f"loss_pseudo_{j + 1}_from_{i + 1}"] = loss_pseudo
                loss = loss + loss_pseudo
            # 4 backward: at once, so that one student's activations are gone before the next one
            optimizers[j].zero_grad()
            scaler.scale(loss).backward()
        rates = update_students(students, optimizers, scaler, iteration / iterations)

        # 5 EMA
        for teacher, student in zip(teachers, students):
            update_teacher(teacher, student, args.ema_decay)

        # 6 log, evaluate, save: only here the truth of unlabeled pictures is read
        logged = numbered("pseudo_miou", pseudo_labels)
        run.step(iteration, losses, logged, join(unlabeled, "truth"), **rates)
        if run.due():
            run.evaluate(networks)
            raw = [hard_label(prob, cells(model, args), valid)
                   for prob, model in zip(probs, predictors)]
            draw(run, unlabeled, raw, pseudo_labels, students, args)
        run.save(iteration, keep)


def draw(run, unlabeled, raw, pseudo_labels, students, args):
    """Two panels: what both models predict (raw: not rectified), and what both students see."""
    weak = unlabeled[0]["image"][:4]
    labels = {"unlabeled picture": weak, "truth (not used)": unlabeled[0]["truth"][:4]}
    strong = dict(labels)
    for j, student in enumerate(students):
        labels[f"teacher {j + 1}, raw"] = raw[j]
        labels[f"pseudo-label {j + 1}"] = pseudo_labels[j]
        prob = common.predict(student.eval(), weak, args, args.crop)
        labels[f"student {j + 1} predicts"] = prob.argmax(1)
        view, targets = strong_view(unlabeled, pseudo_labels, args, run.stage, j)
        peer = MUTUAL[args.mutual][1][j][0]
        strong[f"student {j + 1} sees"] = view
        strong[f"label of teacher {peer + 1}"] = targets[peer]
    run.panel(f"pseudo_{run.mark}", labels)
    run.panel(f"strong_{run.mark}", strong)


# ---- main ----------------------------------------------------------------------------------------

def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    common.check_range(args, 0, math.inf, "stages", "stage0_iterations")
    common.check_range(args, 1e-12, math.inf, "stage0_lr", "stage0_head_lr", "setr_lr")
    common.check_range(args, 1, math.inf, "prototype_min_cells")
    common.check_range(args, 0, 1, "dropout", "drop_path", "threshold", "ema_decay")
    common.check_range(args, 0, 1, "prototype_decay")
    if args.rectify is None:
        args.rectify = args.mutual in ("peer", "indirect")
    choices = arguments_of_students(args)
    args.backbone = ",".join(dict.fromkeys(choice.backbone for choice in choices))
    args.cell = 4 if "tiny" in args.backbone else 8  # stride of p^0: DeepLabv2's
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    students = [common.build_network(choice, data, device, j) for j, choice in enumerate(choices)]
    teachers = [copy.deepcopy(student).requires_grad_(False).eval() for student in students]
    learners = [common.parallel(student, device) for student in students]

    stages = {0: args.stage0_iterations}  # stage: iterations; 0: on labels alone
    for stage in range(1, args.stages + 1):
        stages[stage] = args.iterations  # on labels and pseudo-labels
    # Open: which network is reported; teacher 1 (student 1 without teachers), last iteration
    method = "rml"
    headline = f"{MUTUAL[args.mutual][0]}_1"
    if args.supervised:
        # Open: how long the baseline trains; as long as a student in all stages   --supervised
        stages = {0: sum(stages.values())}
        method = "rml-supervised"
        headline = "student_1"
    run = common.Run(method, args, data, labeled, unlabeled, device, stages, headline)

    if run.enter(0):
        train_supervised(run, students, learners, teachers, data, labeled, args, device)
    for student in students:
        add_model_noise(student, args.dropout, args.drop_path, args.linear_drop_path)
    for stage in range(1, len(stages)):
        if run.enter(stage):
            train(run, stage, students, learners, teachers, data, labeled, unlabeled, args)
    networks = numbered("student", students) | numbered("teacher", teachers)
    run.finish(networks, paper_miou(args))


if __name__ == "__main__":
    common.run_main(main)
