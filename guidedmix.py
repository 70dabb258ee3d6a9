"""GuidedMix-Net: Learning to Improve Pseudo Masks Using Labeled Images as Reference
Peng Tu, Yawen Huang, Rongrong Ji, Feng Zheng, Ling Shao. arXiv 2106.15064

Labeled pictures guide the learning from unlabeled pictures. Each unlabeled picture is blended with
the most similar labeled picture of the batch, and the network predicts a mask for the blend. The
mask that it predicts for the labeled picture, times lambda, is subtracted: the rest is the target
(pseudo-mask) of its direct prediction for the unlabeled picture. Two labeled pictures are blended
in the same way, and there the rest is compared with the prediction for the second one (L_dec). The
decoder (MITrans) has non-local blocks: each position of the blend uses similar positions in it.

    python guidedmix.py                                     drawn streets, on a CPU, in minutes
    torchrun --nproc_per_node=4 guidedmix.py --dataset vocaug --data-root DIR --labels 1/8

paper -> code   (the authors' repository holds another method; choices: grep "# Open:" guidedmix.py)
    Eq. 1      L_ce                  cross_entropy()
    Eqs. 2, 6  lambda, x_mix, M_mix  sample_lambda(), blend(); --lambda-cap (Tables 1, 6, 8)
    Eq. 3      similar pairs         distances(), pair(); --pairs (Table 2)
    Eqs. 4, 5  MITrans, Figs. 2, 4   NonLocal, MITrans, GuidedMixNet; --no-mitrans (Table 2)
    Eqs. 7, 8  M_u-dec               decouple(); --decoupling (Table 2)
    Eqs. 9-11  L, L_usup, L_sup      train(), step 3; mask_error(), classifier_loss(); --omega
    Eq. 12     L_dec                 decoupling_loss(); --dec-weight
    Tables     3; 4, 5, 7, 9; 10     per_class in result.json; --labels; --crop, --scales, --flip
    Figs.      1, 5; 6, 7            draw(): batch_*.png; val_*.png. Fig. 3 is not drawn
    Sects.     3.2; 4.1; 4.2         train_supervised(), --warmup; rotate(), --scale; update()
"""

import argparse
import math
from functools import partial

import common  # before torch: it sets how torch's threads wait
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode, functional as V

from common import ABOVE_0, IGNORE, all_reduce, autocast, integer, need, rank, real, rng
from common import to_float, world_size

# ---- arguments -----------------------------------------------------------------------------------

# Rows: DATASET-PRESET/LABELS. Lines: data, network, optimizer, method, run (Sects. 4.1, 4.2).
PAPER = {}
# Open: 12 of what; 12 labeled and 12 unlabeled; batch norm: all GPUs   --batch-size, --batch-norm
# Open: how long labels train alone (Sect. 3.2); the first 5 %, in small presets 20 %   --warmup
PAPER["vocaug"] = dict(
    labels="1/8", size=None, crop=(321, 321), scale=(0.5, 2.0), rotation=10.0, batch_size=12,
    network="guidedmix", backbone="resnet101", weights="imagenet", batch_norm="sync",
    optimizer="sgd", lr=1e-3, weight_decay=1e-4, iterations=40_000, warmup=2000,
    lambda_cap=0.5, alpha=1.0, pairs="similar", distance="pooled", classifier=True, mitrans=True,
    masks="probabilities", decoupling="soft", labeled_decoupling="hard",
    usup_target="decoupled", labeled_stop_gradient=True, omega=1.5, ramp=0.1, dec_weight=1.0,
    workers=4, log_every=50, eval_every=5000, save_every=1000,
)
PAPER["voc"] = PAPER["vocaug"]
# Open: which 500 or 1000 (Table 4); any of all 10,582, as in the authors' lists   --split
for count in ("500", "1000", "1464"):  # Tables 1 to 4
    PAPER[f"vocaug/{count}"] = PAPER["vocaug"] | dict(labels=count, backbone="resnet50")
# Open: L_cla with random pairs; yes on VOC (Table 2), no on Cityscapes (Sect. 4.4)   --classifier
# Open: the size of Cityscapes' pictures; the full one: half has 512 rows, the crop 513   --size
PAPER["cityscapes"] = PAPER["vocaug"] | dict(
    size=(1024, 2048), crop=(513, 513), batch_size=8,
    lambda_cap=0.3, pairs="random", classifier=False)
PAPER["context"] = PAPER["vocaug"] | dict(
    crop=(480, 480), batch_size=8,
    lambda_cap=0.4, omega=0.5)
# Drawn scenes, a small network from scratch, no classifier (our choice): minutes on a CPU.
PAPER["streets"] = PAPER["vocaug"] | dict(
    labels="8", size=(64, 128), crop=(64, 64), scale=(0.75, 1.5), rotation=0.0, batch_size=4,
    backbone="tiny", weights="none", batch_norm="frozen",
    optimizer="adamw", lr=3e-3, weight_decay=1e-2, iterations=3000, warmup=600,
    classifier=False, workers=0, eval_every=1000, save_every=100,
)
PAPER["camvid-tiny"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128), lr=2e-3, iterations=4000, warmup=800)
# With the decoupled masks as targets the network gets worse (tests/RESULTS.md).
PAPER["camvid-cpu"] = PAPER["streets"] | common.CPU_PRESET | dict(
    network="guidedmix", iterations=2400, warmup=1200,
    labeled_decoupling="soft", usup_target="direct", omega=1.0)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    size=(360, 480), crop=(257, 353), iterations=20_000, warmup=1000, eval_every=2000)
PAPER["folder-tiny"] = PAPER["camvid-tiny"] | common.FOLDER["tiny"]
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | common.FOLDER["cpu"]
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | common.FOLDER["gpu"] | dict(
    crop=(321, 321), iterations=10_000, warmup=500)

# Rows: dataset, fixed arguments, one more argument, and the paper's mIoU for each of its values.
VOC_TRAIN = dict(backbone="resnet50", labels=1464)
LARGE = dict(crop=[512, 512])
LARGE_MS = LARGE | dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=True)
TABLE_1 = {0.1: 67.9, 0.2: 69.5, 0.3: 70.7, 0.4: 71.4, 0.5: 73.7}
TABLE_6 = {0.1: 64.3, 0.2: 64.0, 0.3: 65.8, 0.4: 65.5, 0.5: 65.7}
TABLE_8 = {0.1: 37.6, 0.2: 39.4, 0.3: 39.8, 0.4: 40.3, 0.5: 40.1}
PAPER_MIOU = [
    ("vocaug", VOC_TRAIN, "lambda_cap", TABLE_1),
    ("vocaug", VOC_TRAIN, "pairs", {"random": 71.9}),  # Table 2
    ("vocaug", VOC_TRAIN, "mitrans", {False: 72.7}),  # Table 2
    ("vocaug", VOC_TRAIN, "decoupling", {"hard": 71.4}),  # Table 2
    ("vocaug", dict(backbone="resnet50"), "labels", {500: 65.4, 1000: 68.1}),  # Table 4
    ("vocaug", {}, "labels", {1323: 73.4, 2646: 75.5, 5291: 76.5}),  # Table 5
    ("cityscapes", dict(labels=372), "lambda_cap", TABLE_6),
    ("cityscapes", {}, "labels", {100: 56.9, 744: 67.5, 1488: 69.8}),  # Table 7
    ("context", dict(labels=625), "lambda_cap", TABLE_8),  # 1/8 of 4998 pictures
    ("context", dict(labels=624), "lambda_cap", TABLE_8),  # 1/8 of the lists' 4996
    ("context", {}, "labels", {1250: 41.7, 1249: 41.7}),  # Table 9
    ("vocaug", LARGE, "labels", {1323: 75.2, 2646: 76.5, 5291: 77.1}),  # Table 10
    ("vocaug", LARGE_MS, "labels", {1323: 76.4, 2646: 77.8, 5291: 78.2}),  # Table 10
]


def paper_miou(args):
    """The mIoU that the paper reports for these arguments; None if it reports none."""
    for dataset, setting, name, values in PAPER_MIOU:
        wanted = setting | {"dataset": dataset, "supervised": False}
        same = wanted.items() <= vars(args).items()
        if same and set(args.changed) <= {*wanted, name, "split"}:
            return values.get(getattr(args, name))


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=common.idea(__doc__),
        epilog="Arguments that are not given have the values of the table PAPER in guidedmix.py.")
    add = parser.add_argument_group("GuidedMix-Net").add_argument
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--lambda-cap", **real(ABOVE_0, 0.5),
        help="upper limit of lambda, at most 0.5 (Tables 1, 6, 8)")
    add("--alpha", **real(ABOVE_0), help="lambda is drawn from Beta(X, X)")
    add("--pairs", choices=["similar", "random"], help="labeled pictures to blend with (Table 2)")
    add("--distance", choices=["pooled", "places"], help="Eq. 3 on means over positions, or on all")
    add("--classifier", **switch, help="image-level classifier on the encoder's features (L_cla)")
    add("--mitrans", **switch, help="non-local blocks in MITrans (Eq. 5; Table 2)")
    add("--decoupling", choices=["soft", "hard"], help="Eq. 8 or Eq. 7 in L_usup (Table 2)")
    add("--labeled-decoupling", choices=["soft", "hard"], help="Eq. 8 or Eq. 7 in L_dec")
    add("--masks", choices=["probabilities", "logits", "softmax"],
        help="what M holds; softmax: decouple logits, then compare the softmax of both sides")
    add("--usup-target", choices=["decoupled", "direct", "none"], help="which mask of L_usup is a "
        "target, without gradient; direct, none: not the paper's")
    add("--labeled-stop-gradient", **switch, help="no gradient into M_l and M^_l of L_dec")
    add("--omega", **real(0), help="weight of L_usup after its ramp-up (Eq. 9)")
    add("--dec-weight", **real(0), help="weight of L_dec (Eq. 11)")
    add("--warmup", **integer(0), help="iterations with L_ce and L_cla alone (Sect. 3.2)")
    add("--ramp", **real(0, 1), help="share of the iterations in which omega rises")
    add("--rotation", **real(0, 180), help="rotate pictures by up to X degrees (Sect. 4.1)")
    common.add_arguments(parser, ["guidedmix"])
    return parser


# ---- perturbations -------------------------------------------------------------------------------

def rotate(image, label, top, left, crop, generator, degrees):
    """Cut the crop out of a picture (3, H, W) and label (H, W), rotated by at most these degrees.
    Returns image (3, h, w), label (h, w), valid (h, w) bool, False beyond the picture."""
    # Open: "slight rotation" (Sect. 4.1); by up to 10 degrees about the center   --rotation
    angle = generator.uniform(-degrees, degrees)
    h, w = crop
    margin = math.ceil((math.hypot(h, w) - min(h, w)) / 2)  # the window holds the crop at any angle
    window = top - margin, left - margin, h + 2 * margin, w + 2 * margin
    maps = V.crop(torch.stack([label, torch.ones_like(label)]), *window)  # label, valid
    color = torch.tensor(common.MEAN_COLOR, dtype=torch.uint8)
    image = V.crop(image, *window).where(maps[1] > 0, color[:, None, None])
    image = V.rotate(image, angle, InterpolationMode.BILINEAR, fill=color.tolist())
    maps = V.rotate(maps, angle, InterpolationMode.NEAREST)
    label, valid = V.center_crop(maps, [h, w])
    return V.center_crop(image, [h, w]), label, valid > 0


def sample_lambda(alpha, cap, generator):
    """lambda ~ Beta(alpha, alpha), then min(lambda, 1 - lambda); drawn anew until below the cap."""
    # Open: alpha, how to stay below the cap; 1, and drawing again. One lambda a batch   --alpha
    # Open: what lambda weights; x_l (Eq. 2), so a low cap hides x_l. Sect. 4.3.1 says the opposite,
    # and then the caps of Tables 1, 6, 8 mean the opposite   --lambda-cap
    for _ in range(100_000):
        lam = generator.beta(alpha, alpha)
        lam = min(lam, 1 - lam)
        if lam < cap:
            return lam
    raise common.UserError(f"--alpha {alpha} --lambda-cap {cap}: none of 100,000 draws was below "
                           "the cap; use a smaller --alpha or a larger --lambda-cap")


def describe(v, distance="pooled"):
    """The features by which pictures are compared: (B, C, h, w) -> (B, C), or (B, C h w)."""
    # Open: Eq. 3 sums over positions, Sect. 3.1.1 pools; we pool, padding included   --distance
    v = v.detach().float()
    return v.flatten(1) if distance == "places" else v.mean((2, 3))


def distances(features, guides):
    """d(x_l, x_u) = sqrt(sum (Gamma_enc(x_l) - Gamma_enc(x_u))^2): (B, D), (n, D) -> (B, n)."""
    exact = "donot_use_mm_for_euclid_dist"  # the fast mode loses digits where pictures are alike
    return torch.cdist(features, guides, compute_mode=exact)  # Eq. 3


def pair(args, positions, features, guides, labeled):
    """The index in guides of each picture's guide: (B,). labeled: none is its own guide."""
    # Open: which of two chooses the other; x_u (Sect. 3.1.1), in Sect. 4.3.1 x_l   --pairs
    first = rank() * len(positions)  # the index in guides of this process's first labeled picture
    if args.pairs == "similar":
        distance = distances(features, guides["features"])
        if labeled:
            distance[:, first : first + len(distance)].fill_diagonal_(math.inf)
        return distance.argmin(1)
    count = len(guides["image"])  # below: shift 0 is the picture itself, so labeled begins at 1
    shifts = [rng(args.seed, "pair", labeled, p).randint(labeled, count) for p in positions]
    partners = [(i + shift) % count for i, shift in enumerate(shifts, first)]
    return torch.tensor(partners).to(features.device, non_blocking=True)


class Gather(torch.autograd.Function):
    """x of all processes, one after the other. Each process gets the gradient of its part."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.contiguous()).chunk(world_size())[rank()]


# ---- EMA: none; pseudo-labels --------------------------------------------------------------------

def to_mask(logits, masks):
    """The mask M that is decoupled, of logits (B, K, h, w)."""
    # Open: what M holds; probabilities, for Eq. 11. So M_mix sums to 1, not 2 as in Eq. 6   --masks
    return logits.float().softmax(1) if masks == "probabilities" else logits.float()


def blend(args, learner, guide, image, *key):
    """lambda, x_mix = lambda x_l + (1 - lambda) x_u, M_mix = Gamma(x_mix) (Eq. 6: about M_l + M_u).
    guide: x_l, image: x_u (B, 3, H, W) uint8; key: seeds the draw of lambda."""
    lam = sample_lambda(args.alpha, args.lambda_cap, rng(args.seed, *key))
    x_mix = lam * to_float(guide) + (1 - lam) * to_float(image)  # Eq. 2
    # Open: batch norm of blends; by their own batch, running statistics stay   --batch-norm
    norms = [module for module in learner.modules() if hasattr(module, "track_running_stats")]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with autocast(args, x_mix.device):
            logits = learner(x_mix)
    finally:
        for norm in norms:
            norm.track_running_stats = True
    return lam, x_mix, to_mask(logits, args.masks)  # Eq. 6


def decouple(M_mix, M_l, lam, decoupling="soft"):
    """M_u-dec = M_mix - M_l (hard), or M_mix - lambda M_l (soft), of any shape."""
    if decoupling == "hard":
        return M_mix - M_l  # Eq. 7
    return M_mix - lam * M_l  # Eq. 8


# ---- network -------------------------------------------------------------------------------------

class NonLocal(nn.Module):
    """v'_n = 1 / C(x) sum_m f(Q_n, K_m) V_m + v_n, with f(Q_n, K_m) = exp(Q_n . K_m): each position
    n takes up the features of similar positions m. v (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 2, 1)  # Q
        self.key = nn.Conv2d(channels, channels // 2, 1)  # K
        self.value = nn.Conv2d(channels, channels, 1)  # V

    def forward(self, v):
        # Attention without a (hw, hw) map needs V as wide as Q: two heads halve V, and share Q, K.
        maps = self.query(v), self.key(v)  # (B, C/2, h, w) each
        maps = [x.flatten(2).mT for x in maps]  # (B, hw, C/2) each
        query, key = [torch.stack([x, x], 1) for x in maps]  # (B, 2, hw, C/2) each
        value = self.value(v).flatten(2).mT.chunk(2, 2)  # its halves, (B, hw, C/2) each
        value = torch.stack(value, 1)  # (B, 2, hw, C/2)
        # Open: the softmax "over the channel dimension"; over positions m, as the sum of Eq. 5
        context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return v + context.mT.reshape(v.shape)  # Eq. 5


class MITrans(nn.Module):
    """A step of the decoder (Fig. 4): v (B, C, h, w), skip (B, S, H, W) -> (B, width, H, W)."""

    def __init__(self, channels, skip, width, norm, non_local=True):
        super().__init__()
        # Open: the convs; 1x1 before PixelShuffle, two 3x3 after the skip. --no-mitrans keeps them
        self.non_local = NonLocal(channels) if non_local else nn.Identity()
        self.shuffle = nn.Sequential(nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2))
        conv = partial(common.ConvNormReLU, norm_layer=norm)  # 3x3
        self.fuse = nn.Sequential(*conv(width + skip, width), *conv(width, width))

    def forward(self, v, skip):
        h, w = skip.shape[2:]
        v = self.shuffle(self.non_local(v))
        v = v[:, :, :h, :w]  # 41 -> 82, the skip has 81: drop the last; cell i is at one pixel
        return self.fuse(torch.cat([v, skip], 1))


class GuidedMixNet(common.SegmentationNetwork):
    """Fig. 2: a ResNet with a PSP module, and a decoder of two MITrans steps. Logits at stride 2.
    50,048,233 parameters with ResNet-50, 21 classes and classifier; with ResNet-101 69,040,361."""

    def __init__(self, spec):
        need(spec["network"] == "guidedmix", "this checkpoint's network is "
             f"{spec['network']}; use the script that trained it")
        need(spec.get("output_stride", 16) == 16, "--output-stride 32: here the encoder has 16")
        caffe = common.STYLES[spec["style"]]["caffe"]
        backbone = common.make_backbone(spec["backbone"], spec["batch_norm"], caffe,
                                        spec["deep_stem"], spec.get("output_stride", 8))
        super().__init__(backbone, spec["style"])
        self.first = int(spec["backbone"] == "efficientnet_lite0")  # its strides are twice as large
        self.stride = 2
        width = {"tiny": 64, "efficientnet_lite0": 128}.get(spec["backbone"], 512)
        norm = nn.BatchNorm2d if width == 512 else common.group_norm
        if spec["backbone"] == "tiny":
            backbone.maxpool = nn.MaxPool2d(3, 2, 1)  # stride 8, as in the others
        self.psp = common.PyramidPooling(backbone.widths[-1], width, norm)
        # Open: stride and skips; 8 (dilated) as PSPNet, layer1 and stem: so masks are at stride 2
        fine, middle = backbone.widths[self.first :][:2]
        self.step1 = MITrans(width, middle, width // 2, norm, spec["mitrans"])
        self.step2 = MITrans(width // 2, fine, width // 4, norm, spec["mitrans"])
        self.last = nn.Conv2d(width // 4, spec["classes"], 1)
        self.presence = nn.Linear(width, spec["present"]) if spec["present"] else None

    def forward(self, image, aux=False):
        """(B, 3, H, W) in [0, 1] -> logits (B, K, H/2, W/2); aux: Gamma_enc and L_cla's logits."""
        layers = self.backbone.layers(self.normalize(image))
        stem, layer1, *_, layer4 = layers[self.first :]
        v = self.psp(layer4)  # Eq. 4: Gamma_enc (B, 512, H/8, W/8)
        present = self.presence(v.mean((2, 3))) if aux and self.presence else None
        features = self.step1(v, layer1)  # (B, 256, H/4, W/4)
        features = self.step2(features, stem)  # (B, 128, H/2, W/2)
        logits = self.last(features)
        if self.first:
            logits = common.upsample(logits, layers[0].shape[2:], 2)
        return (logits, v, present) if aux else logits


# ---- losses --------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    """L_ce = - sum_i y_i log(y^_i), the mean over known pixels (Eq. 1 prints y^_i log(y_i)).
    logits (B, K, h, w) at stride 2, label (B, H, W) with 255. 0 if no pixel is known."""
    logits = common.upsample(logits, label.shape[1:], 2)  # (B, K, H, W)
    # Gradients are averaged over processes: each returns its share times their number.
    known = all_reduce((label != IGNORE).sum())
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total * world_size() / known.clamp(min=1)  # Eq. 1


def classifier_loss(logits, label, classes):
    """L_cla, of logits (B, K') of the last K' classes, and label (B, H, W) with 255."""
    # Open: the loss; binary cross-entropies of all classes but background   --classifier
    present = torch.zeros(len(label), 256, device=label.device)
    present.scatter_(1, label.flatten(1), 1.0)  # 1 for each class in the label
    target = present[:, classes - logits.shape[1] : classes]  # without background
    return F.binary_cross_entropy_with_logits(logits.float(), target)


def mask_error(M_dec, M, valid, masks="logits"):
    """1 / (H W) sum sum (M_dec - M)^2 of masks (B, K, h, w), over the valid (B, H, W) pixels."""
    if masks == "softmax":
        M_dec = M_dec.softmax(1)
        M = M.softmax(1)
    valid = valid[:, ::2, ::2]  # Open: what sums and H W cover; all classes, valid cells of M
    count = all_reduce(valid.sum())
    error = (M_dec - M).square()  # (B, K, h, w)
    total = (error * valid[:, None]).sum()
    return total * world_size() / count.clamp(min=1)  # Eqs. 10, 12


def decoupling_loss(args, learner, labeled, M_l, features, guides, iteration):
    """L_dec = 1 / (H W) sum sum (M_dec - M^_l)^2, with M_dec = M_mix - M_l, of a labeled batch with
    masks M_l and features. x^_l, M^_l: other labeled pictures, and their predicted masks."""
    partner = pair(args, labeled["position"], features, guides, labeled=True)  # Eq. 3
    image = guides["image"][partner]  # x^_l
    M_partner = guides["mask"][partner]  # M^_l
    lam, _, M_mix = blend(args, learner, labeled["image"], image, "lambda labeled", iteration)
    # Open: what L_dec trains; M_mix alone. Each mask sums to 1, so a hard L_dec would also fall if
    # M_l and M^_l became flat: no gradient into them   --labeled-stop-gradient
    if args.labeled_stop_gradient:
        M_l, M_partner = M_l.detach(), M_partner.detach()
    # Open: whether L_dec is soft, as L_usup is; hard, as above Eq. 12   --labeled-decoupling
    M_dec = decouple(M_mix, M_l, lam, args.labeled_decoupling)
    valid = labeled["valid"] & guides["valid"][partner]
    return mask_error(M_dec, M_partner, valid, args.masks)  # Eq. 12


# ---- training ------------------------------------------------------------------------------------

def update(args, keep, loss, iteration):
    """A step of the optimizer, with polynomial decay (Sect. 4.2). Returns the learning rate."""
    decay = (1 - iteration / args.iterations) ** 0.9
    optimizer, scaler = keep["optimizer"], keep["scaler"]
    common.decay_lr(optimizer, decay)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    common.average_buffers([keep["student"]])
    return args.lr * decay


def train_supervised(args, run, learner, keep, stream, begin, stop):
    """Learn from labels alone, iterations begin to stop - 1: the warm-up, and the baseline."""
    student = keep["student"]
    run.phase = None if args.supervised else "warm-up"
    run.images = args.batch_size
    batches = common.batches(stream, args, run.device, begin, stop)
    for iteration, labeled in enumerate(batches, begin):
        # 1 batch: labeled pictures
        label = labeled["label"]  # (B, H, W)

        # 2 pseudo-labels: none
        # 3 losses
        # Open: the baseline's losses; L_ce alone (L_cla belongs to the warm-up)   --supervised
        with autocast(args, run.device):
            logits, v, present = learner(to_float(labeled["image"]), aux=True)
        losses = {"loss_labeled": cross_entropy(logits, label)}  # Eq. 1
        if student.presence:
            losses["loss_cla"] = classifier_loss(present, label, logits.shape[1])
        loss = sum(losses.values())

        # 4 backward
        lr = update(args, keep, loss, iteration)

        # 5 EMA: none
        # 6 log, evaluate, save
        run.step(iteration, losses, record=iteration + 1 == stop, lr=lr)
        if run.due():
            run.evaluate({"student": student})
            columns = {"labeled picture": labeled["image"], "label": label, "prediction": logits}
            draw(run, labeled["valid"], columns)
        run.save(iteration, keep)


def train(args, run, learner, keep, streams, warmup, begin):
    """GuidedMix-Net's loop (Sect. 3), from iteration begin to the last one."""
    run.phase = None
    run.images = args.batch_size * (2 if args.omega else 1)
    stop = args.iterations
    batches = [common.batches(stream, args, run.device, begin, stop) for stream in streams]
    for iteration, (labeled, unlabeled) in enumerate(zip(*batches), begin):
        # 1 batch: x_l and x_u in one pass; blends follow, since pairing needs its results
        image = labeled["image"]  # x_l (B, 3, H, W)
        B = len(image)
        if args.omega:
            image = torch.cat([image, unlabeled["image"]])  # x_l, x_u (2B, 3, H, W)
        with autocast(args, run.device):
            logits, v, present = learner(to_float(image), aux=True)  # Open: batch norm; joint
        M_l, M_u = to_mask(logits, args.masks).tensor_split([B])  # (B, K, h, w) each
        features_l, features_u = describe(v, args.distance).tensor_split([B])  # (B, C) each
        guides = {"image": labeled["image"], "valid": labeled["valid"],
                  "mask": M_l, "features": features_l}
        if world_size() > 1:  # the n labeled pictures of all processes
            guides = {name: Gather.apply(x.contiguous()) for name, x in guides.items()}

        # 2 pseudo-labels: M_u-dec, decoupled from blends of x_u with its guides
        if args.omega:
            partner = pair(args, unlabeled["position"], features_u, guides, labeled=False)  # Eq. 3
            guide = guides["image"][partner]  # x_l of each x_u
            M_guide = guides["mask"][partner]  # M_l
            valid = unlabeled["valid"] & guides["valid"][partner]  # padding of either is left out
            if args.usup_target == "direct":  # M_mix alone learns: not the paper's
                M_u, M_guide = M_u.detach(), M_guide.detach()
            # Open: gradient into the pseudo-mask; none, since it is a target   --usup-target
            with torch.set_grad_enabled(args.usup_target != "decoupled"):
                lam, x_mix, M_mix = blend(  # Eqs. 2, 6
                    args, learner, guide, unlabeled["image"], "lambda", iteration)
                M_u_dec = decouple(M_mix, M_guide, lam, args.decoupling)  # Eqs. 7, 8

        # 3 losses
        losses = {"loss_labeled": cross_entropy(logits[:B], labeled["label"])}  # Eq. 1
        if args.classifier:
            losses["loss_cla"] = classifier_loss(present[:B], labeled["label"], logits.shape[1])
        if args.dec_weight:
            losses["loss_dec"] = decoupling_loss(
                args, learner, labeled, M_l, features_l, guides, iteration)
        if args.omega:
            losses["loss_usup"] = mask_error(M_u_dec, M_u, valid, args.masks)  # Eq. 10
        # Open: w, ramp-up; CCT's 30 / K (its mean is our sum; 1.4 on VOC), 10 %   --omega, --ramp
        ramp = max(1, args.ramp * args.iterations)
        t = min(1, (iteration - warmup) / ramp)  # after the warm-up
        omega = args.omega * math.exp(-5 * (1 - t) ** 2)
        loss_sup = losses["loss_labeled"] + args.dec_weight * losses.get("loss_dec", 0)
        loss_sup = loss_sup + losses.get("loss_cla", 0)  # Eq. 11
        loss = loss_sup + omega * losses.get("loss_usup", 0)  # Eq. 9

        # 4 backward
        lr = update(args, keep, loss, iteration)

        # 5 EMA: none
        # 6 log, evaluate, save
        numbers = {"lr": lr}
        pseudo_labels = {}
        if args.omega:
            numbers |= {"omega": omega, "lambda": lam}
            pseudo_labels["pseudo_miou"] = M_u_dec.max(1).indices
            pseudo_labels["direct_miou"] = M_u.max(1).indices
        truth = unlabeled["truth"][:, ::2, ::2]  # nothing learns from it
        run.step(iteration, losses, pseudo_labels, truth, **numbers)
        if run.due():
            run.evaluate({"student": keep["student"]})
            if args.omega:  # Fig. 5
                draw(run, valid, {
                    "labeled partner": guide,
                    "its prediction": M_guide,
                    "unlabeled picture": unlabeled["image"],
                    f"mix, lambda {lam:.2f}": (255 * x_mix).round().byte(),
                    "prediction of the mix": M_mix,
                    "decoupled pseudo-mask": M_u_dec,
                    "direct prediction": M_u,
                    "truth (not used)": unlabeled["truth"],
                })
        run.save(iteration, keep)


def draw(run, valid, columns):
    """pictures/batch_MARK.png: pictures, labels, masks' most likely classes where valid."""
    H, W = valid.shape[1:]
    for title, cells in columns.items():
        if cells.is_floating_point():  # masks
            label = cells.max(1).indices.repeat_interleave(2, 1).repeat_interleave(2, 2)
            columns[title] = label[:, :H, :W].masked_fill(~valid, IGNORE)
    run.panel(f"batch_{run.mark}", columns, rows=4)


# ---- main ----------------------------------------------------------------------------------------

def check(args, labeled):
    """A UserError for values that do not fit each other."""
    sample_lambda(args.alpha, args.lambda_cap, rng(args.seed, "check"))
    if args.supervised:
        return
    need(args.warmup < args.iterations or args.iterations == 0, f"--warmup {args.warmup}: leaves "
         f"none of the {args.iterations} iterations for the method; use a lower one")
    need(min(labeled, args.batch_size) > 1 or args.dec_weight == 0,
         f"--labels {labeled} --batch-size {args.batch_size}: L_dec blends two labeled pictures of "
         "a batch; use 2 or more, or --dec-weight 0")
    if args.dec_weight and labeled < args.batch_size:
        common.warn(f"{labeled} labeled pictures, --batch-size {args.batch_size}: L_dec "
                    "blends some of them with another view of themselves")


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device, GuidedMixNet)
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    check(args, len(labeled))
    cut = partial(rotate, degrees=args.rotation) if args.rotation else None
    streams = [common.Stream(data, labeled, "labeled", args, cut=cut),
               common.Stream(data, unlabeled, "unlabeled", args, labeled=False, cut=cut)]
    present = 0  # outputs of the classifier
    if args.classifier and not args.supervised:
        present = len(data.names) - (data.names[0] == "background")
    student = common.build_network(
        args, data, device, make=GuidedMixNet, mitrans=args.mitrans, present=present)
    learner = common.parallel(student.train(), device)  # averages gradients over processes
    optimizer = common.make_optimizer(args, args.lr, student)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    method = "guidedmix-supervised" if args.supervised else "guidedmix"
    stages = {1: args.iterations}
    run = common.Run(method, args, data, labeled, unlabeled, device, stages, "student")
    keep = {"student": student, "optimizer": optimizer, "scaler": scaler}
    begin = run.restore(keep)
    warmup = args.iterations if args.supervised else min(args.warmup, args.iterations)
    train_supervised(args, run, learner, keep, streams[0], begin, warmup)
    if not args.supervised:
        train(args, run, learner, keep, streams, warmup, max(begin, warmup))
    run.finish({"student": student}, paper_miou(args))


if __name__ == "__main__":
    common.run_main(main)
