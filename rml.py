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
    Footnote 2      soft pseudo-labels          --soft; cross_entropy()
    Eq. 3           direct mutual learning      MUTUAL["direct"]
    Eq. 4           labels of mean teachers     train(), step 2; alone: --no-rectify (IML, Table 4)
    Eq. 5           peer and self supervision   train(), step 3, loss_pseudo
    Eq. 6           rectified pseudo-label      rectify(), hard_label()
    Eq. 9           class-wise confidence       rectify(); Eqs. 7 and 8 derive it
    Eq. 10          prototypes of all pictures  start_stage()
    Eq. 11          moving average of them      update_prototypes()
    Sect. 4.1       input noise, model noise    strong_view(), add_model_noise()
    Sect. 5.2       network, schedule, stages   PAPER, update_students(), main()
    Figs. 2, 4      coupling; pseudo-labels     tests/figure_rml.py coupling; compare RUN RUN ..
    Tables 1-4      results, ablations          a row of PAPER_MIOU has the flags of a row there
    Table 5         CNN and Transformer         --network deeplabv2,setr; arguments_of_students()
"""

import argparse
import copy
import math
import re
from pathlib import Path

import common  # before torch: it sets how torch's threads wait
import torch
import torch.nn.functional as F
from torchvision.models.efficientnet import MBConv
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as V

from common import ABOVE_0, integer, numbered, real

# ---- arguments -----------------------------------------------------------------------------------

# The arguments by dataset. cityscapes: the paper's (Sect. 5.2), or French et al.'s, ProDA's, ours.
PAPER = {}
PAPER["cityscapes"] = dict(
    # Open: what "batch size 4" counts; we take 4 labeled and 4 unlabeled pictures   --batch-size
    labels="372", size=(512, 1024), crop=(256, 512), scale=(1.0, 1.0), batch_size=4, workers=4,
    # Open: DeepLabv2's head; we take ProDA's, whose 256 features give prototypes   --head plain
    network="deeplabv2", backbone="resnet101", weights="imagenet", head="bottleneck",
    # Open: batch norm; we freeze it as loaded, like French et al.   --batch-norm
    batch_norm="frozen",
    optimizer="sgd", lr=1e-4, weight_decay=2e-4, setr_lr=1.0,
    stage0_iterations=40_000, stage0_lr=2.5e-4, stage0_head_lr=10.0,
    iterations=90_000, stages=2, mutual="indirect", threshold=0.0, soft=False, pseudo_weight=1.0,
    photometric=True, cutmix=True, dropout=0.5, drop_path=0.2, linear_drop_path=False,
    ema_decay=0.999, prototype_decay=0.9999, prototype_min_cells=10, interpolate="prob",
    log_every=50, eval_every=5000, save_every=1000)
# A small network from scratch on a CPU. It has few weights, so we give it less noise.
PAPER["streets"] = PAPER["cityscapes"] | dict(
    labels="8", size=(64, 128), crop=(64, 128), workers=0,
    backbone="tiny", weights="none",
    optimizer="adamw", lr=3e-3, weight_decay=1e-2, setr_lr=0.3,
    stage0_iterations=400, stage0_lr=3e-3, stage0_head_lr=1.0,
    iterations=900, ema_decay=0.99, dropout=0.1, drop_path=0.05,
    prototype_decay=0.999, prototype_min_cells=1, eval_every=300, save_every=100)
PAPER["camvid-tiny"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128),
    lr=2e-3, stage0_iterations=2000, iterations=2000, eval_every=500)
# With a weight of 1 and two stages of 600 steps the teachers get worse (tests/RESULTS.md).
PAPER["camvid-cpu"] = PAPER["streets"] | common.CPU_PRESET | dict(
    stage0_iterations=1200, stage0_lr=2e-4, stage0_head_lr=10.0,
    stages=1, iterations=1200, lr=1e-4, pseudo_weight=0.2)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=(360, 480), crop=(256, 352),
    stage0_iterations=10_000, iterations=20_000, eval_every=2000)
PAPER["folder-tiny"] = PAPER["camvid-tiny"] | common.FOLDER["tiny"]
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | common.FOLDER["cpu"]
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | common.FOLDER["gpu"] | dict(
    stage0_iterations=5000, iterations=10_000)
PAPER["vocaug"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=None, crop=(321, 321), scale=(0.5, 1.5), batch_size=10, iterations=60_000)
# Open: 1/8 of VOC; 1,323 of 1,464 (text): voc; of 10,582 (tables): vocaug   --dataset --split
PAPER["voc"] = PAPER["vocaug"] | dict(labels="1323", extra="all")
# The rows of the paper's tables | dataset and flags | labels: mIoU (of models 1 / 2).
# Open: noise in Table 5; none (Sect. 5.4), but its DeepLabv2 pair has the full noises of Table 4
IML = "cityscapes --stages 1 --no-rectify"
NO_NOISE = f"{IML} --no-photometric --no-cutmix --dropout 0 --drop-path 0"
PAPER_MIOU = f"""
Table 1, Deeplabv2 | cityscapes --supervised | 100: 45.40, 372: 56.08, 744: 60.91, 2975: 67.14
Table 1, Ours | cityscapes | 100: 58.25, 372: 63.97, 744: 66.15
Table 2, Deeplabv2 | voc --supervised | 106: 36.25, 212: 46.30, 529: 55.92, 1323: 63.73
Table 2, Deeplabv2, Full | vocaug --supervised | 10582: 72.62
Table 2, Ours | voc | 106: 53.77, 212: 64.63, 529: 68.82, 1323: 70.34
Table 3, Ours | voc --weights coco | 106: 63.60, 212: 68.66, 529: 71.19, 1323: 73.38
Table 4, supervised baseline | cityscapes --supervised | 372: 56.03
Table 4, IML | {NO_NOISE} | 372: 60.09
Table 4, IML (+ model noises) | {IML} --no-photometric --no-cutmix | 372: 60.51
Table 4, IML (+ input noises) | {IML} --dropout 0 --drop-path 0 | 372: 60.49
Table 4, IML (+ full noises) | {IML} | 372: 61.25
Table 4, RML | cityscapes --stages 1 | 372: 62.85
Table 4, RML (two stages) | cityscapes | 372: 63.65
Table 5, Deeplabv2 baseline | cityscapes --supervised --stages 1 | 372: 54.52
Table 5, SETR baseline | cityscapes --supervised --stages 1 --network setr | 372: 57.79
Table 5, Deeplabv2-Deeplabv2 IML | {IML} | 372: 61.25 / 61.53
Table 5, SETR-SETR IML | {NO_NOISE} --network setr | 372: 64.15 / 63.74
Table 5, Deeplabv2-SETR IML | {NO_NOISE} --network deeplabv2,setr | 372: 63.96 / 64.35
Table 5, SETR-Deeplabv2 IML | {NO_NOISE} --network setr,deeplabv2 | 372: 64.35 / 63.96
"""
# Which networks predict pseudo-labels; from which models students 1 and 2 learn, the peer first.
MUTUAL = {
    "none": ("student", ([0], [1])),  # Eq. 2
    "mean-teacher": ("teacher", ([0], [1])),
    "direct": ("student", ([1], [0])),  # Eq. 3
    "peer": ("teacher", ([1], [0])),  # Eq. 3 with the labels of Eq. 4
    "indirect": ("teacher", ([1, 0], [0, 1])),  # Eqs. 4 and 5
}


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=common.idea(__doc__),
        epilog="Defaults are in the table PAPER in rml.py; a run writes all values to args.json.")
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("robust mutual learning").add_argument
    add("--mutual", choices=MUTUAL, help="whose pseudo-labels teach (Sect. 3, 4.1; Fig. 4)")
    add("--rectify", action=switch, help="rectify labels (Sect. 4.2); default: peer, indirect")
    add("--stages", **integer(0, 1000), help="stages after stage 0 (Table 4)")
    add("--threshold", **real(0, 1), help="tau of Eq. 2; labels below it are ignored")
    add("--soft", action=switch, help="learn probabilities, not hard labels (footnote 2)")
    add("--pseudo-weight", **real(0), help="weight of each loss on pseudo-labels (Eq. 5: 1)")
    add("--interpolate", choices=["prob", "logits"], help="what is upsampled for pseudo-labels")
    add("--photometric", action=switch, help="photometric RandAugment (Sect. 4.1)")
    add("--cutmix", action=switch, help="CutMix (Sect. 4.1)")
    add("--dropout", **real(0, 1), help="dropout before the last classifier (Sect. 5.2)")
    add("--drop-path", **real(0, 1), help="probability to drop a residual branch (Sect. 5.2)")
    add("--linear-drop-path", action=switch, help="probability grows linearly with depth")
    add("--ema-decay", **real(0, 1), help="decay of the mean teachers (Sect. 4.1)")
    add("--prototype-decay", **real(0, 1), help="lambda of Eq. 11")
    add("--prototype-min-cells", **integer(1),
        help="cells of a class that a picture needs (Eq. 10)")
    add("--stage0-iterations", **integer(0), help="iterations on labels alone, before stage 1")
    add("--stage0-lr", **real(ABOVE_0), help="learning rate at the start of stage 0")
    add("--stage0-head-lr", **real(ABOVE_0),
        help="learning rate of the head, in units of --stage0-lr")
    add("--setr-lr", **real(ABOVE_0), help="learning rate of SETR, in units of the others")
    common.add_arguments(parser, common.NETWORKS + common.TRANSFORMERS, several=True)
    return parser


def paper_miou(args):
    """The rows of the paper's tables with this setting: ["63.97 (Table 1, Ours)", ..]."""
    # vocaug: labels that a seed draws are not the paper's, those of a list can be.
    dataset = "voc" if args.dataset == "vocaug" and args.split else args.dataset
    found = []
    for line in PAPER_MIOU.strip().splitlines():
        row, flags, numbers = line.split(" | ")
        wanted = common.parse_args(get_parser(), PAPER, f"--dataset {flags}".split())
        names = {"supervised", *args.changed, *wanted.changed} - {"split", "split_seed"}
        same = all(getattr(args, name) == getattr(wanted, name) for name in names)
        miou = re.search(rf"\b{args.labels}: ([^,]+)", numbers)
        if same and miou and dataset == wanted.dataset:
            found.append(f"{miou[1]} ({row})")
    return found


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

# RandAugment's photometric operations, level v = 1 .. 9: (3, H, W) uint8 -> (3, H, W) uint8.
PHOTOMETRIC = (
    lambda image, v: image,
    lambda image, v: V.autocontrast(image),
    lambda image, v: V.equalize(image),
    lambda image, v: V.adjust_brightness(image, 0.09 * v + 0.05),
    lambda image, v: V.adjust_saturation(image, 0.09 * v + 0.05),
    lambda image, v: V.adjust_contrast(image, 0.09 * v + 0.05),
    lambda image, v: common.sharpness(image, 0.09 * v + 0.05),
    lambda image, v: V.posterize(image, int(0.4 * v) + 4),
    lambda image, v: V.solarize(image, 256 - int(25.6 * v)),
)


def photometric(images, boxes, generators):
    """Two random operations, each with probability .5, inside the boxes of (B, 3, H, W) uint8."""
    strong = images.clone()
    for image, (top, bottom, left, right), generator in zip(strong, boxes, generators):
        picture = inside = image[:, top:bottom, left:right]
        # Open: how many operations, and how strong; two, each at a random level   --no-photometric
        for _ in range(2):
            operation = PHOTOMETRIC[generator.randint(len(PHOTOMETRIC))]
            apply = generator.uniform() < 0.5
            level = generator.randint(1, 10)
            if apply:
                picture = operation(picture, level)
        inside.copy_(picture)
    return strong


def cutmix_mask(size, generator, device="cpu"):
    """(H, W) bool, True inside one box of half the area, at a random place."""
    # Open: the mask; we take one box of half the area, like French et al.   --no-cutmix
    share = math.exp(generator.uniform() * math.log(0.5))  # of the height, in [.5, 1]
    rows, columns = round(share * size[0]), round(0.5 / share * size[1])
    top = generator.randint(size[0] - rows + 1)
    left = generator.randint(size[1] - columns + 1)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[top : top + rows, left : left + columns] = True
    return mask


def join(batches, name):
    return torch.cat([batch[name] for batch in batches])


def strong_view(unlabeled, targets, args, stage, student):
    """Gamma, drawn anew for each student: photometric operations, then CutMix. unlabeled: a batch
    and its partners; targets of both models: (2B, H, W), soft (2B, K, H, W). -> view, targets"""
    view = join(unlabeled, "image")  # (2B, 3, H, W), without CutMix (B, 3, H, W)
    if args.photometric:
        boxes, generators = [], []
        for name, batch in zip("up", unlabeled):  # unlabeled, partners
            keys = args.seed, "photometric", stage, student, name
            generators += [common.rng(*keys, place) for place in batch["position"]]
            boxes += batch["inside"]  # padding is neither changed nor counted
        view = photometric(view, boxes, generators)
    if not args.cutmix:
        return view, targets
    # Open: the partners; a second, independent batch, labels are rectified before   --no-cutmix
    keys = args.seed, "cutmix", stage, student
    generators = [common.rng(*keys, place) for place in unlabeled[0]["position"]]
    masks = [cutmix_mask(view.shape[2:], generator, view.device) for generator in generators]
    mask = torch.stack(masks)[:, None]  # (B, 1, H, W), True: from the partner
    image, partner = view.chunk(2)  # (B, 3, H, W) each
    target, partner_target = torch.stack(targets).chunk(2, 1)  # (2, B, H, W) each
    mask_of_target = mask if target.dim() == 5 else mask[:, 0]  # soft: (2, B, K, H, W)
    return partner.where(mask, image), partner_target.where(mask_of_target, target)


def add_model_noise(network, dropout, drop_path, linear=False):
    """Add dropout before the last classifier, stochastic depth to residual branches. Call once."""
    network.dropout = torch.nn.Dropout(dropout)
    kinds = BasicBlock, Bottleneck, EncoderBlock, MBConv
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    for depth, block in enumerate(blocks, 1):
        # Open: whether .8 (Sect. 5.2) holds for every block; yes   --linear-drop-path
        probability = drop_path * depth / len(blocks) if linear else drop_path
        # Registered on the block: a frozen norm is always in eval mode, which is without noise.
        block.stochastic_depth = StochasticDepth(probability, mode="row")
        if isinstance(block, EncoderBlock):
            last = [block.dropout, block.mlp]
        else:  # MBConv drops its branch itself
            last = [] if isinstance(block, MBConv) else [getattr(block, "bn3", block.bn2)]
        for module in last:  # of a residual branch
            module.register_forward_hook(
                lambda module, inputs, output, drop=block.stochastic_depth: drop(output))


# ---- EMA -----------------------------------------------------------------------------------------

@torch.no_grad()
def update_teachers(teachers, students, decay):
    """teacher <- decay teacher + (1 - decay) student."""
    for teacher, student in zip(teachers, students):
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
        # Open: the teachers' buffers; we copy them, like ProDA (French et al. average them)
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
        # Open: the resolution of Eqs. 6, 9; DeepLabv2's stride, finer features (SETR) are averaged
        ratio = network.cell // network.stride
        if ratio > 1:
            edge = int(network.align_corners)  # a cell is centred on a pixel: odd windows
            features = F.avg_pool2d(
                features, ratio + edge, ratio, edge * ratio // 2, True, count_include_pad=False)
        h, w = (math.ceil(side / network.cell) for side in image.shape[2:])
        features = features[:, :, :h, :w]  # Caffe-style networks have one row and column more
        return features, network.classifier(features)


def rectify(features, p0, eta):
    """Rectified class probabilities p^t (B, K, h, w), divided by their sum over the classes.
        omega_k = exp(-||f~ - eta_k||) / sum_k' exp(-||f~ - eta_k'||)    Eq. 9
        p_k^t = omega_k p_k^0                                            Eq. 6
    f~: features (B, C, h, w); eta: prototypes (K, C), inf: never seen; p^0: p0 (B, K, h, w)."""
    f = features.float().flatten(2).mT  # (B, hw, C)
    # Open: the scale of the distance; we use no normalization, no temperature, and no square
    distance = torch.cdist(f, eta, compute_mode="donot_use_mm_for_euclid_dist")  # (B, hw, K)
    distance = distance.clamp(max=1e4)  # never seen: omega = 0; if no class was seen: 1 / K
    omega = torch.softmax(-distance, 2).mT.view_as(p0)  # Eq. 9
    p = omega * p0  # Eq. 6
    return p / p.sum(1, keepdim=True).clamp(min=1e-30)


def upsample_prob(prob, network, args):
    """Probabilities (B, K, h, w) of a network's cells at the pixels of the crop."""
    # Open: what is upsampled; probabilities, like ProDA (French et al.: logits)   --interpolate
    cells = args.crop, network.cell, network.align_corners
    prob = prob.contiguous(memory_format=torch.channels_last)  # faster to upsample
    if args.interpolate == "logits":
        return common.upsample(prob.clamp(min=1e-30).log(), *cells).softmax(1)
    return common.upsample(prob, *cells)


def hard_label(prob, valid, threshold=0.0):
    """(B, H, W): one_hot of Eqs. 2, 4, 6 of prob (B, K, H, W) as class ids; 255 where valid
    (B, H, W) is False, or the confidence is not above tau (threshold)."""
    confidence, pseudo_label = prob.max(1)
    return pseudo_label.where(valid & (confidence > threshold), common.IGNORE)  # Eq. 2


def class_sums(features, label, classes):
    """(K, C + 1): sums of the features (B, C, h, w) by label (B, h, w); last: their numbers."""
    one_hot = F.one_hot(label, classes + 1)[..., :classes].float()  # (B, h, w, K); K: unknown
    sums = torch.einsum("bhwk, bchw -> kc", one_hot, features.float())
    return torch.cat([sums, one_hot.sum((0, 1, 2))[:, None]], 1)


@torch.no_grad()
def update_prototypes(eta, features, logits, valid, decay):
    """Moved prototypes (K, C).
        eta_k <- lambda eta_k + (1 - lambda) eta'_k    Eq. 11
    eta': mean feature of class k in this batch, by the teacher's argmax; lambda: decay.
    features: (B, C, h, w), logits: (B, K, h, w); valid: (B, h, w) bool, False in padding."""
    prediction = logits.max(1).indices.where(valid, len(eta))  # max: faster than argmax
    sums = common.all_reduce(class_sums(features, prediction, len(eta)))
    mean = sums[:, :-1] / sums[:, -1:]  # eta'; NaN: absent
    # Open: a class without eta, or without eta'; it takes eta' at once, even of one cell; keeps eta
    moved = torch.where(eta.isfinite(), decay * eta + (1 - decay) * mean, mean)  # Eq. 11
    return torch.where(mean.isnan(), eta, moved)


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
            # Open: Eq. 10 divides by HW |D|, which gives no centroid; we divide by the class's
            #   cells, and by the pictures that have enough of them   --prototype-min-cells
            enough = counts >= args.prototype_min_cells
            total += of_picture / counts.clamp(min=1) * enough  # mean_i^HW; last column: 1 or 0
        common.progress("pseudo-labels and prototypes of all pictures", number, len(pictures))
    sums = [common.all_reduce(total) for total in sums]
    etas = [total[:, :-1] / total[:, -1:] for total in sums]  # Eq. 10; NaN: never seen
    common.barrier()  # every p^0 is on disk before any process reads one
    return {i: eta.nan_to_num(math.inf) for i, eta in enumerate(etas)}


# ---- losses --------------------------------------------------------------------------------------

def cross_entropy(log_prob, target):
    """H of Eqs. 1, 3, 5: the mean over known pixels of -sum_k target_k log_prob_k (B, K, H, W).
    target: class ids (B, H, W), 255: unknown; or soft, (B, K, H, W), 0: unknown.
    DDP averages gradients over processes, so each one returns its share times their number."""
    if target.dim() == 4:
        known = target.any(1)
        loss = -(target * log_prob).sum()
    else:
        known = target != common.IGNORE
        loss = F.nll_loss(log_prob, target, ignore_index=common.IGNORE, reduction="sum")
    # Open: what Eq. 2 divides by; we divide by the number of confident pixels   --threshold
    count = common.all_reduce(known.sum())
    return loss * common.world_size() / count.clamp(min=1)


# ---- training ------------------------------------------------------------------------------------

def make_optimizers(students, lr, head_lr, args):
    """An optimizer for each student. The head learns at lr times head_lr."""
    optimizers = []
    for student in students:
        # Open: SETR's optimizer and rate; we use the others' rate times a factor   --setr-lr
        factor = args.setr_lr if student.spec["network"] in common.TRANSFORMERS else 1.0
        optimizers.append(common.make_optimizer(args, lr * factor, student, head_lr=head_lr))
    return optimizers


def update_students(students, optimizers, scaler, progress):
    """Step with polynomial decay (Sect. 5.2); progress: 0 to 1. Returns the rates for the log."""
    for optimizer in optimizers:
        common.decay_lr(optimizer, (1 - progress) ** 0.9)  # Open: the power; DeepLab's
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
    return common.upsample(logits, args.crop, network.stride, network.align_corners).log_softmax(1)


def train_supervised(run, students, learners, teachers, data, labeled_ids, args, device):
    """Stage 0, and the baseline: the students learn from labels alone (Eq. 1), without noise."""
    # Open: the first models; labels, a fast head   --stage0-iterations --stage0-lr --stage0-head-lr
    iterations = run.stages[0]
    networks = numbered("student", students) | numbered("teacher", teachers)
    optimizers = make_optimizers(students, args.stage0_lr, args.stage0_head_lr, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    keep = networks | numbered("optimizer", optimizers) | {"scaler": scaler}
    begin = run.restore(keep)
    streams = [common.Stream(data, labeled_ids, f"labeled {j}, stage 0", args)
               for j in range(len(students))]
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
        update_teachers(teachers, students, args.ema_decay)

        # 6 log, evaluate, save
        run.step(iteration, losses, **rates)
        if run.due():
            run.evaluate(networks)
        run.save(iteration, keep)


def train(run, stage, students, learners, teachers, data, labeled_ids, unlabeled_ids, args):
    """One stage: the students learn from labels and from the pseudo-labels of both teachers."""
    # Open: what a new stage keeps; the students, and teachers restart as their copies   --stages
    iterations = run.stages[stage]
    kind, learns_from = MUTUAL[args.mutual]
    predictors = teachers if kind == "teacher" else students
    networks = numbered("student", students) | numbered("teacher", teachers)
    optimizers = make_optimizers(students, args.lr, args.head_lr, args)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.precision == "fp16")
    prototypes = {}  # of both models
    keep = networks | numbered("optimizer", optimizers)
    keep |= {"scaler": scaler, "prototypes": prototypes}
    begin = run.restore(keep)
    models = numbered("model", predictors if args.rectify else [])
    soft_labels = {run.folder / f"soft_labels/stage_{stage}_{name}": model.align_corners
                   for name, model in models.items()}  # of p^0: {folder: where cells lie}
    if args.rectify and begin == 0:
        # Open: whose p^0 and first eta; stage 0's students', later the last stage's teachers'
        sources = students if stage == 1 else predictors
        prototypes |= start_stage(
            sources, soft_labels, data, labeled_ids, unlabeled_ids, args, run.device)
        run.forget_soft_labels(keep=soft_labels)
    if begin == 0:
        update_teachers(teachers, students, decay=0.0)  # copies
    streams = [common.Stream(data, labeled_ids, f"labeled, stage {stage}", args)]
    for name in ("unlabeled", "partner") if args.cutmix else ("unlabeled",):
        streams.append(common.Stream(data, unlabeled_ids, f"{name}, stage {stage}", args,
                                     labeled=False, soft_labels=soft_labels, stride=args.cell))
    streams = [common.batches(stream, args, run.device, begin, iterations) for stream in streams]
    for iteration, (labeled, *unlabeled) in enumerate(zip(*streams), begin):
        # 1 batch: labeled pictures; unlabeled ones and, for CutMix, as many partners: weak views
        weak = join(unlabeled, "image")  # (2B, 3, H, W) uint8, without CutMix (B, 3, H, W)
        valid = join(unlabeled, "valid")  # (2B, H, W), False in padding

        # 2 pseudo-labels: of both models, without noise
        probs, pseudo_labels, targets = [], [], []
        for i, predictor in enumerate(predictors):
            features, logits = features_and_logits(predictor, weak, args)
            prob = logits.float().softmax(1)  # Eq. 4 (of a student: Eqs. 2, 3), (2B, K, h, w)
            probs.append(prob)
            if args.rectify:
                p0 = join(unlabeled, f"soft_{i}")  # (2B, K, h, w)
                eta = prototypes[i].to(run.device, non_blocking=True)  # after a restart on the CPU
                prob = rectify(features, p0, eta)  # Eqs. 6, 9
                # Open: the batch of eta'; unlabeled pictures and partners, not labeled ones
                known = valid[:, :: args.cell, :: args.cell]
                eta = update_prototypes(eta, features, logits, known, args.prototype_decay)
                prototypes[i] = eta  # Eq. 11
            prob = upsample_prob(prob, predictor, args)  # (2B, K, H, W)
            pseudo_label = hard_label(prob, valid, args.threshold)  # (2B, H, W)
            pseudo_labels.append(pseudo_label)
            known = (pseudo_label != common.IGNORE)[:, None]
            targets.append(prob * known if args.soft else pseudo_label)

        # 3 losses: the students get the same weak views; only Gamma_j and the noise differ
        losses = {}
        for j, learner in enumerate(learners):
            view, target = strong_view(unlabeled, targets, args, stage, j)  # Gamma_j
            # Open: noise on labeled pictures; model noise acts on them too, in one pass   --dropout
            image = torch.cat([labeled["image"], view])  # (B + B, 3, H, W): labeled, strong
            log_prob = student_log_prob(learner, image, args, stage, iteration, j)
            log_prob_labeled, log_prob_strong = log_prob.chunk(2)  # (B, K, H, W) each
            loss = cross_entropy(log_prob_labeled, labeled["label"])  # Eq. 1
            losses[f"loss_labeled_{j + 1}"] = loss
            for i in learns_from[j]:
                loss_pseudo = cross_entropy(log_prob_strong, target[i])  # Eq. 5; Eqs. 2, 3
                losses[f"loss_pseudo_{j + 1}_from_{i + 1}"] = loss_pseudo
                loss = loss + args.pseudo_weight * loss_pseudo
            # 4 backward: at once, so that one student's activations are gone before the next one
            optimizers[j].zero_grad()
            scaler.scale(loss).backward()
        rates = update_students(students, optimizers, scaler, iteration / iterations)

        # 5 EMA
        update_teachers(teachers, students, args.ema_decay)

        # 6 log, evaluate, save: only here the truth of unlabeled pictures is read
        logged = numbered("pseudo_miou", pseudo_labels)
        run.step(iteration, losses, logged, join(unlabeled, "truth"), **rates)
        if run.due():
            run.evaluate(networks)
            raw = [hard_label(upsample_prob(*pair, args), valid) for pair in zip(probs, predictors)]
            draw(run, unlabeled, raw, pseudo_labels, students, args)
        run.save(iteration, keep)


def draw(run, unlabeled, raw, pseudo_labels, students, args):
    """Two panels: what both models predict (raw: not rectified), and what both students see."""
    weak = unlabeled[0]["image"][:4]
    labels = {"unlabeled picture": weak, "truth (not used)": unlabeled[0]["truth"][:4]}
    strong = dict(labels)
    for j, student in enumerate(students):
        number = j + 1
        labels[f"teacher {number}, raw"] = raw[j]
        labels[f"pseudo-label {number}"] = pseudo_labels[j]
        prob = common.predict(student.eval(), weak, args, args.crop)
        labels[f"student {number} predicts"] = prob.argmax(1)
        view, targets = strong_view(unlabeled, pseudo_labels, args, run.stage, j)
        peer = MUTUAL[args.mutual][1][j][0]
        strong[f"student {number} sees"] = view
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
    if args.rectify is None:
        args.rectify = args.mutual in ("peer", "indirect")
    choices = arguments_of_students(args)
    args.backbone = ",".join(dict.fromkeys(choice.backbone for choice in choices))
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    students = [common.build_network(choice, data, device, j) for j, choice in enumerate(choices)]
    light = args.backbone in ("tiny", "efficientnet_lite0")
    strides = [student.stride for student in students]
    args.cell = max(4 if light else 8, *strides)  # of p^0: DeepLabv2's, or that of coarser features
    for student in students:
        student.cell = args.cell if args.rectify else student.stride  # of Eqs. 4, 6
    teachers = [copy.deepcopy(student).requires_grad_(False).eval() for student in students]
    learners = [common.parallel(student, device) for student in students]

    stages = {0: args.stage0_iterations}  # stage: iterations; 0: on labels alone
    stages |= dict.fromkeys(range(1, args.stages + 1), args.iterations)
    # Open: which network is reported; teacher 1 (student 1 without teachers), last iteration
    method, headline = "rml", f"{MUTUAL[args.mutual][0]}_1"
    if args.supervised:
        # Open: how long the baseline trains; as long as a student in all stages   --supervised
        stages = {0: sum(stages.values())}
        method, headline = "rml-supervised", "student_1"
    run = common.Run(method, args, data, labeled, unlabeled, device, stages, headline)

    if run.enter(0):
        train_supervised(run, students, learners, teachers, data, labeled, args, device)
    for student in students:
        add_model_noise(student, args.dropout, args.drop_path, args.linear_drop_path)
    for stage in range(1, len(stages)):
        if run.enter(stage):
            train(run, stage, students, learners, teachers, data, labeled, unlabeled, args)
    networks = numbered("student", students) | numbered("teacher", teachers)
    rows = paper_miou(args)
    for row in rows:
        common.say(f"paper     {row}")
    run.finish(networks, float(rows[0].split()[0]) if rows else None)


if __name__ == "__main__":
    common.run_main(main)
