"""Semi-supervised Semantic Segmentation with Mutual Knowledge Distillation
Jianlong Yuan, Qi Qian, Fan Wang, Jinchao Ge, Zhibin Wang, Yifan Liu. ACM Multimedia 2023, arXiv 2208.11499

Two students of different initialisation learn from each other, and each has a mean teacher that supervises the other one. Teachers see
weak views of the unlabeled pictures (WDA); students see strong ones (SDA): one photometric operation, and boxes of the next picture of the
batch pasted in (CutMix, on the teachers' logits too). On top of that comes feature augmentation (FD, FDA): features move, in thought, along all
directions in which features of their class vary. The loss over infinitely many such moves has an upper bound that needs only one term
more in the logits. The term depends on a pixel's class alone, so that it costs a table of classes by classes.

    python mkd.py                                                                        drawn streets, a CPU, minutes
    torchrun --nproc_per_node=4 mkd.py --dataset cityscapes --data-root DIR --labels 372

paper -> code
    Eq. 1   mean teachers                          update_teacher(); gamma of Table 4: --gamma
    Eq. 2   L_st, teacher to the other student     train(), step 3: loss_st
    Sect. 3.2  SDA, CutMix                         strong_view(), cutmix_mask(), cutmix()
    Eq. 3   FD                                     ClassStatistics (Sigma), augmentation_table(), augment_features()
    Eq. 4   L, with alpha and beta                 train(), step 3: loss; --alpha, --beta (Table 5)
    Eq. 5   L_s, supervised                        train(), step 3: loss_labeled
    CPS     L_ss, student to student               train(), step 3: loss_ss
    Algorithm 1                                    train(): the loop, EMA first
    Table 1  '*': --threshold .95, dagger: --dataset voc --extra all
    Table 3  co-training: --teachers none --no-strong --features none; + MT: --teachers own; + Mutual MT: --teachers mutual; + SDA: --strong;
             + FDA: --features diagonal

Choices that the paper leaves open, and why
    EMA. The decay is min(1 - 1/t, gamma) (authors' code), so that teachers begin as their students at t = 1. .4 is the paper's best and "used for all
        the experiments"; the code ends at .6. Buffers are copied.                                       --gamma
    Batch size 16 is 16 labeled and 16 unlabeled pictures (code: 4 + 4 on each of 4 GPUs). They go through a student in one pass, so batch
        norm, which is trained in the backbone too and synchronised, sees them together (code: two passes).  --batch-norm
    Both students see the same views; only their initialisations tell them apart (of the heads, where the backbone is pretrained).
    SDA: one of colour jitter, blur, equalize, solarize, greyscale, with the code's weights. CutMix, for every picture: three boxes, each of a
        third of 25 to 50 % of the area, off again where two overlap (code). In Table 3 it belongs to SDA; not used on streets.  --cutmix
    L_st and L_ss: at stride 8 of the crop, where logits are sampled (code); L_s at the crop's size.     --loss-stride
        Means over the pixels that count: padding, and teachers' labels below --threshold, do not.
    FD: w and Sigma are detached (code; in ISDA, where it comes from, only Sigma), so it shifts logits and nothing else. The class y of a
        pixel, in v as in Sigma, is its label, on unlabeled pictures the student's own prediction (code; the paper says
        "pseudo-labels"). Sigma is of all features that the student has seen so far; its diagonal (code), or whole.  --features full
        lambda rises from 0 to 1.5 along half a cosine (code).                                           --lambda0
        FD is for unlabeled pixels alone (Algorithm 1); L_ss takes its targets after it, as written there.
    alpha is 1.5, beta 1 (Table 5, code). By its numbers Table 5 is without FDA, and varies the weight of L_st, not of L_ss as Eq. 4 has
        it: 0 gives Table 3's row without teachers (72.52), 1 the one with them (73.66).                 --alpha, --beta
    Cityscapes' number of iterations is not stated: 40,000 is ours. Scale .5 to 2 and 30,000 iterations on VOC are the code's.
    Students from scratch (the tiny backbone) begin with labels alone: without, they agreed on road below and sky above in every picture.  --warmup
    --preset official (voc, vocaug, streets) is the code where it departs from the paper: gamma .6; FD of teachers, too; L_st and L_ss on
        labeled pictures, too; photometric distortion of the labeled and weak views. Not taken over: two passes (above); teachers that
        normalise by their own batches; batch-norm momentum .001; losses on padding; the mean of a loss by GPU; pictures resized to 512
        first; the stem of three convs (--weights FILE with the weights of ResNetV1c brings it).
    The baseline (--supervised) is one student on labels alone, with the same weak views, learning rate and number of steps.
    Reported: all networks at the last iteration, and the students' mean logits; the headline is student 1.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as V

import common
from common import IGNORE

# ---- arguments -------------------------------------------------------------------------------------------------------

# Per dataset, by the argument's name: Sect. 4.1, and the authors' code (scale, iterations and loss stride of VOC).
PAPER = {
    "vocaug": dict(
        labels="662", size=None, crop=(512, 512), scale=(.5, 2.), batch_size=16, network="deeplabv3plus", head="plain", backbone="resnet50", weights="imagenet",
        batch_norm="sync", optimizer="sgd", lr=.0025, weight_decay=5e-4, iterations=30_000, warmup=0, cutmix=True, gamma=.4, lambda0=1.5, loss_stride=8,
        workers=4, log_every=50, eval_every=5000, save_every=1000),
    # Drawn scenes and a small network from scratch, minutes on a CPU: slower teachers, weaker FD and no CutMix; why, README.md tells.
    "streets": dict(
        labels="8", size=(64, 128), crop=(64, 64), scale=(.75, 1.5), batch_size=4, network="deeplabv3plus", head="plain", backbone="tiny", weights="none",
        batch_norm="frozen", optimizer="adamw", lr=3e-3, weight_decay=1e-2, iterations=2400, warmup=500, cutmix=False, gamma=.99, lambda0=.3, loss_stride=2,
        workers=0, log_every=50, eval_every=600, save_every=100),
}
PAPER["voc"] = PAPER["vocaug"] | dict(labels="183")
PAPER["cityscapes"] = PAPER["vocaug"] | dict(labels="372", size=(1024, 2048), crop=(512, 1024), lr=.01, iterations=40_000)
PAPER["camvid-cpu"] = PAPER["streets"] | dict(labels="1/8", size=(180, 240), crop=(96, 128), lr=2e-3, iterations=1500, warmup=600, cutmix=True, eval_every=500)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(labels="1/8", size=(360, 480), crop=(256, 352), iterations=20_000, eval_every=2000)
# Pictures of one's own: at most so large, square crops at changing scale; all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(labels="1/1", size=(256,), crop=(128, 128), scale=(.75, 1.5), iterations=3000, warmup=1500, cutmix=False)
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(labels="1/1", size=(640,), crop=(320, 320), scale=(.5, 1.5), iterations=10_000)
OFFICIAL = dict(gamma=.6, features_of_teachers=True, labeled_consistency=True, weak_photometric=True)  # the authors' code
PAPER |= {f"{name}-official": PAPER[name] | OFFICIAL for name in ("vocaug", "voc", "streets")}

# The paper's mIoU by (dataset, --extra, backbone, threshold, labels): Tables 1 and 2, there with the CPS splits. On vocaug a list may be U2PL's,
# for which Table 2 has other numbers, so that none is told with --split.
PAPER_MIOU = {(dataset, extra, backbone, threshold, n): miou for dataset, extra, backbone, threshold, row in [
    ("voc", None, "resnet50", 0, {92: 60.60, 183: 66.74, 366: 71.01, 732: 72.73}),
    ("voc", None, "resnet101", 0, {92: 65.35, 183: 70.18, 366: 74.44, 732: 75.90}),
    ("voc", "all", "resnet50", 0, {92: 64.92, 183: 69.48, 366: 74.25, 732: 75.89, 1464: 77.59}),  # without the dagger Table 1 has 78.14 for the
    ("voc", "all", "resnet101", 0, {92: 69.10, 183: 74.63, 366: 76.76, 732: 78.66, 1464: 80.02}),  # same pictures, and 79.96
    ("voc", "all", "resnet101", .95, {92: 74.40, 183: 75.92, 366: 77.74, 732: 78.68, 1464: 80.80}),
    ("vocaug", None, "resnet50", 0, {662: 74.02, 1323: 75.24, 2646: 76.09, 5291: 76.92}),
    ("vocaug", None, "resnet101", 0, {662: 75.90, 1323: 76.59, 2646: 77.62, 5291: 78.94}),
    ("cityscapes", None, "resnet50", 0, {186: 75.47, 372: 78.07, 744: 79.95, 1488: 80.52}),
    ("cityscapes", None, "resnet101", 0, {186: 77.19, 372: 79.20, 744: 80.80, 1488: 81.04})] for n, miou in row.items()}

# Whose teacher student 1 and student 2 learn from (0 and 1 are the two branches).
TEACHERS = {"none": None, "own": (0, 1), "mutual": (1, 0)}


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     epilog="What is left out comes from the table PAPER at the top of mkd.py, by dataset; a run writes all values to args.json.")
    a = parser.add_argument_group("mutual knowledge distillation").add_argument
    a("--teachers", choices=list(TEACHERS), default="mutual", help="whose mean teacher a student learns from, besides the other student (Table 3: none, MT, mutual MT)")
    a("--strong", action=argparse.BooleanOptionalAction, default=True, help="strong views for the students; without, weak ones (Table 3, SDA)")
    a("--cutmix", action=argparse.BooleanOptionalAction, help="CutMix as a part of the strong view (Sect. 3.2)")
    a("--features", choices=["none", "diagonal", "full"], default="diagonal", help="feature augmentation, by the diagonal of the covariance or all of it (Eq. 3; Table 3, FDA)")
    a("--lambda0", type=float, metavar="X", help="strength of the feature augmentation at the end (Eq. 3)")
    a("--gamma", type=float, metavar="X", help="decay of the mean teachers (Eq. 1; Table 4)")
    a("--alpha", type=float, metavar="X", default=1.5, help="weight of L_st (Eq. 4; default: %(default)s)")
    a("--beta", type=float, metavar="X", default=1., help="weight of L_ss (Eq. 4; Table 5; default: %(default)s)")
    a("--warmup", type=int, metavar="N", help="iterations on labels alone before L_st and L_ss come in: 0 for pretrained students, as in the paper")
    a("--threshold", type=float, metavar="X", default=0., help="teachers' labels below this confidence are ignored (Table 1, *: .95)")
    a("--loss-stride", type=int, metavar="N", help="L_st and L_ss are taken at this stride of the crop")
    a("--features-of-teachers", action=argparse.BooleanOptionalAction, help="feature augmentation of the teachers, too (authors' code)")
    a("--labeled-consistency", action=argparse.BooleanOptionalAction, help="L_st and L_ss on labeled pictures, too (authors' code)")
    a("--weak-photometric", action=argparse.BooleanOptionalAction, help="photometric distortion of labeled pictures and weak views (authors' code)")
    common.add_arguments(parser)
    return parser


# ---- perturbations ---------------------------------------------------------------------------------------------------

def color_jitter(image, r):
    """Brightness, contrast and saturation times .5 to 1.5, hue moved by up to a quarter of the circle, in random order."""
    factors = r.uniform(.5, 1.5, 3)
    steps = [lambda x: V.adjust_brightness(x, factors[0]), lambda x: V.adjust_contrast(x, factors[1]), lambda x: V.adjust_saturation(x, factors[2]),
             lambda x, hue=r.uniform(-.25, .25): V.adjust_hue(x, hue)]
    for i in r.permutation(4):
        image = steps[i](image)
    return image


def blur(image, r):
    return V.gaussian_blur(image, [int(r.choice([3, 5, 7]))] * 2, [r.uniform(.1, 2.)] * 2)


# Weight and operation; one of them is applied. image (3, H, W) uint8, r a seeded generator -> the same.
OPERATIONS = ((3, color_jitter), (5, blur), (1, lambda image, r: V.equalize(image)), (1, lambda image, r: V.solarize(image, 128)),
              (5, lambda image, r: V.rgb_to_grayscale(image, 3)))


def strong_view(images, generators):
    """SDA: one random operation for each picture. images (B, 3, H, W) uint8, generators: a seeded one for each -> the same shape."""
    weights, operations = zip(*OPERATIONS)
    shares = [weight / sum(weights) for weight in weights]
    chosen = [operations[r.choice(len(operations), p=shares)] for r in generators]
    return torch.stack([operation(image, r) for operation, image, r in zip(chosen, images, generators)])


def distort(images, generators):
    """Photometric distortion as in MMSegmentation, for --weak-photometric: each part with probability .5. images (B, 3, H, W) uint8 -> the same."""
    distorted = []
    for image, r in zip(images, generators):
        parts = [lambda x, by=r.uniform(-32, 32): (x.float() + by).clamp(0, 255).to(torch.uint8), lambda x, by=r.uniform(.5, 1.5): V.adjust_saturation(x, by),
                 lambda x, by=r.uniform(-.1, .1): V.adjust_hue(x, by)]
        parts.insert((1, 3)[r.randint(2)], lambda x, by=r.uniform(.5, 1.5): V.adjust_contrast(x, by))  # contrast comes second, or last
        for part in parts:
            image = part(image) if r.uniform() < .5 else image
        distorted.append(image)
    return torch.stack(distorted)


def cutmix_mask(size, generator, device="cpu"):
    """(H, W) bool: three boxes of u/3 of the area, u from .25 to .5, each at any place; where two overlap it is off again."""
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    for _ in range(3):
        u = generator.uniform(.25, .5)
        height = u ** generator.uniform()  # as a fraction, between u and 1; the width is u / height
        h, w = round(size[0] * height / 3 ** .5), round(size[1] * u / height / 3 ** .5)
        top, left = generator.randint(size[0] - h + 1), generator.randint(size[1] - w + 1)
        mask[top:top + h, left:left + w].logical_not_()
    return mask


def cutmix(x, mask):
    """(1 - m) x_i + m x_j, where j is the next picture: x (B, .., H, W) with mask m (B, H, W) bool -> the same. After the last comes the first.

    Pictures beyond those of the mask serve as a next one alone."""
    B, mask = len(mask), mask if x.ndim == 3 else mask[:, None]
    return x[:B].where(~mask, x.roll(-1, 0)[:B])


def sample(x, size):
    """Labels or masks (B, H, W) at another size, nearest."""
    return x if x.shape[1:] == tuple(size) else F.interpolate(x[:, None].float(), size, mode="nearest-exact")[:, 0].to(x.dtype)


# ---- feature augmentation --------------------------------------------------------------------------------------------

class ClassStatistics(nn.Module):
    """Mean and covariance of each class's features over all batches so far (Sigma of Eq. 3).

    Buffers: count (K,) int64, mean (K, C), covariance (K, C), the diagonal, or with full (K, C, C)."""

    def __init__(self, classes, channels, full=False):
        super().__init__()
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))  # float32 would stop counting at 2^24
        self.register_buffer("mean", torch.zeros(classes, channels))
        self.register_buffer("covariance", torch.zeros(classes, *[channels] * (2 if full else 1)))

    @torch.no_grad()
    def update(self, features, label):
        """features (B, C, h, w), label (B, h, w) with 255 for unknown: afterwards the biased covariance of the union of all pixels of all processes.

        Works on a few pictures at a time, so that no copy of all features is made."""
        (K, C), B = self.mean.shape, len(features)
        few = max(1, 2 ** 21 // features[0].numel()) if B else 1
        parts = list(zip(features.flatten(2).split(few), label.flatten(1).split(few)))
        one_hot = [(y[:, None] == torch.arange(K, device=y.device)[:, None]).float() for _, y in parts]  # (b, K, hw); unknown is no class
        sums = self.mean.new_zeros(K, C + 1)
        for (f, y), is_class in zip(parts, one_hot):
            sums[:, :C] += (is_class @ f.float().transpose(1, 2)).sum(0)
            sums[:, C] += is_class.sum((0, 2))
        sums, n = common.all_reduce(sums).split([C, 1], 1)
        mean = sums / n.clamp(min=1)  # mu_b, (K, C)
        squares = torch.zeros_like(self.covariance)
        for (f, y), is_class in zip(parts, one_hot):
            deviation = f.float() - mean[y.clamp(max=K - 1)].transpose(1, 2)  # (b, C, hw); what it is for unknown pixels does not matter
            if squares.ndim == 2:
                squares += (is_class @ deviation.square_().transpose(1, 2)).sum(0)
            else:
                for k in range(K):
                    squares[k] += (deviation * is_class[:, k:k + 1] @ deviation.transpose(1, 2)).sum(0)
        covariance = common.all_reduce(squares) / n.clamp(min=1).view(-1, *[1] * (squares.ndim - 1))  # Sigma_b
        r = (n[:, 0] / (n[:, 0] + self.count).clamp(min=1)).view(-1, *[1] * (squares.ndim - 1))  # share of the new pixels; an absent class has 0
        gap = self.mean - mean
        gap = gap.square() if squares.ndim == 2 else gap[:, :, None] * gap[:, None]
        self.covariance.copy_((1 - r) * self.covariance + r * covariance + r * (1 - r) * gap)
        self.mean.lerp_(mean, r.view(-1, 1))
        self.count += n[:, 0].long()


def augmentation_table(weight, covariance):
    """v^T Sigma_y v of Eq. 3 with v = w_j - w_y, for all y and j: weight (K, C), covariance (K, C) or (K, C, C) -> (K, K), 0 on the diagonal."""
    v = weight - weight[:, None]  # v[y, j], (K, K, C); differences first: the expanded square could become negative
    if covariance.ndim == 2:
        return (v.square() * covariance[:, None]).sum(2)
    return (v @ covariance * v).sum(2)


def augment_features(features, logits, label, weight, statistics, strength):
    """FD: the logits of augmented features, p + lambda/2 v^T Sigma v (Sect. 3.2), with lambda the strength.

    features (B, C, h', w') update the statistics first; logits (B or fewer, K, h, w) of the last of these pictures, label (B, h, w),
    weight (K, C) of the classifier -> logits of the same shape. Where the label is 255 nothing changes. The term has no gradient."""
    if features.shape[2:] != logits.shape[2:]:
        features = F.interpolate(features.float(), logits.shape[2:], mode="bilinear", align_corners=False)
    statistics.update(features, label)
    table = strength / 2 * augmentation_table(weight.detach().float(), statistics.covariance)
    rows = F.pad(table, (0, 0, 0, 1))  # one more row, of zeros, for unknown
    label = label[len(label) - len(logits):].clamp(max=len(table))
    return logits + rows[label].permute(0, 3, 1, 2)


# ---- EMA -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def update_teacher(teacher, student, decay):
    """theta_t <- gamma theta_t + (1 - gamma) theta_s; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)  # Eq. 1
    torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------

def hard_label(logits, valid):
    """arg max of logits (B, K, h, w) over the classes, 255 where valid (B, h, w) is False -> (B, h, w) int64."""
    return logits.detach().max(1).indices.masked_fill(~valid, IGNORE)  # on a CPU max is much faster than argmax


def confident(logits, threshold):
    """(B, h, w) bool: where the highest of softmax(logits) is at least the threshold."""
    return torch.ones_like(logits[:, 0], dtype=torch.bool) if threshold == 0 else logits.softmax(1).amax(1) >= threshold


# ---- losses and networks ---------------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    """Mean over the valid pixels of all processes: logits (B, K, H, W), label (B, H, W) with 255 -> 0-dim; 0 if nothing is valid.

    Each process returns its share times their number, since gradients are averaged over processes."""
    count = common.all_reduce((label != IGNORE).sum())
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") * common.world_size() / count.clamp(min=1)


class WithFeatures(nn.Module):
    """A network whose forward gives its features too: images (B, 3, H, W) float -> (B, C, h, w), (B, K, h, w)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        features = self.network.features(image)
        return features, self.network.classifier(features)


class Ensemble(nn.Module):
    """The mean of the networks' logits."""
    align_corners = False

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image):
        return sum(network(image) for network in self.networks) / len(self.networks)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args, data, labeled, unlabeled, device):
    students = [common.build_network(args, data, device, member) for member in range(1 if args.supervised else 2)]
    if len(students) == 2 and torch.equal(students[0].last.weight, students[1].last.weight):
        raise common.UserError(f"--weights {args.weights}: both students would begin with the same weights and stay one network; use a backbone's weights, not those of a "
                               "whole network")
    run = common.OldRun("mkd-supervised" if args.supervised else "mkd", args, data, labeled, unlabeled, device, {1: args.iterations})
    learns_from = None if args.supervised else TEACHERS[args.teachers]
    teachers = [copy.deepcopy(student).requires_grad_(False).eval() for student in students] if learns_from else []
    networks = {f"student_{i}": s for i, s in enumerate(students, 1)} | {f"teacher_{i}": t for i, t in enumerate(teachers, 1)}
    evaluated = networks | ({} if args.supervised else {"ensemble": Ensemble(students)})
    learners = [common.parallel(WithFeatures(student), device) for student in students]
    K, members = len(data.names), range(len(students))
    augmented = [] if args.supervised or args.features == "none" else students + teachers * bool(args.features_of_teachers)
    statistics = nn.ModuleList(ClassStatistics(K, network.feature_channels, args.features == "full") for network in augmented).to(device)
    optimizer = common.make_optimizer(args, args.lr, [p for student in students for p in student.parameters()])
    scaler, begin, tables = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"), 0, None
    mixed, loss_size = bool(args.strong and args.cutmix), [math.ceil(n / args.loss_stride) for n in args.crop]

    def save(iteration):
        run.save("student_1", networks, stage=1, iteration=iteration, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), statistics=statistics.state_dict())

    if run.state:  # go on where the checkpoint was written
        begin = run.state["iteration"]
        for name, network in networks.items():
            network.load_state_dict(run.state["models"][name])
        optimizer.load_state_dict(run.state["optimizer"])
        scaler.load_state_dict(run.state["scaler"])
        statistics.load_state_dict(run.state["statistics"])
        run.state = None
    else:
        save(0)

    loaders = [common.batches(common.Stream(data, labeled, "labeled", args), args, device, begin, args.iterations)]
    if not args.supervised:
        loaders.append(common.batches(common.Stream(data, unlabeled, "unlabeled", args, labeled=False), args, device, begin, args.iterations,
                                      overlap=mixed))
    pseudo_tables, covered = [torch.zeros(K, K, dtype=torch.int64, device=device) for _ in teachers], []

    for iteration, batch in enumerate(zip(*loaders), begin):
        # 5 EMA, which comes first here (Algorithm 1, line 6)
        for teacher, student in zip(teachers, students):
            update_teacher(teacher, student, min(1 - 1 / (iteration + 1), args.gamma))

        # 1 batch: weak views; of each unlabeled picture a strong view, too, mixed with its neighbour's by a mask
        image, label = batch[0]["image"], batch[0]["label"]  # (B, 3, H, W), (B, H, W)
        B, semi = len(image), not args.supervised and iteration >= args.warmup
        if args.weak_photometric:
            image = distort(image, [common.rng(args.seed, "distort labeled", place) for place in batch[0]["position"]])
        student_input, pseudo_labels, losses, student_logits = image, [], {}, []
        if semi:
            weak, places = batch[1]["image"], batch[1]["position"]  # (B, 3, H, W); with several processes B + 1, see cutmix()
            strong = strong_view(weak, [common.rng(args.seed, "strong", place) for place in places]) if args.strong else weak
            if args.weak_photometric:
                weak = distort(weak, [common.rng(args.seed, "distort", place) for place in places])
            mask = torch.zeros(B, *args.crop, dtype=torch.bool, device=device)
            if mixed:
                mask = torch.stack([cutmix_mask(tuple(args.crop), common.rng(args.seed, "cutmix", place), device) for place in places[:B]])
            strong, truth = cutmix(strong, mask), cutmix(batch[1]["truth"], mask)
            student_input = torch.cat([image, strong])  # (2B, 3, H, W)
            # What L_st and L_ss are taken on, at their stride: the B unlabeled pictures; with --labeled-consistency after n labeled ones, n = B
            n, mask, label_at_stride = B * bool(args.labeled_consistency), sample(mask, loss_size), sample(label, loss_size)
            valid = torch.cat([sample(batch[0]["valid"][:n], loss_size), cutmix(sample(batch[1]["valid"], loss_size), mask)])  # (n + B, h, w)
            strength = args.lambda0 * (1 - math.cos(math.pi * (iteration + 1) / args.iterations)) / 2  # lambda of Eq. 3

        # 2 pseudo-labels: of both teachers on weak views; their logits are mixed like the pictures
        for i, teacher in enumerate(teachers) if semi else ():
            with torch.no_grad():
                with common.autocast(args, device):
                    features = teacher.features(common.to_float(torch.cat([image[:n], weak])))
                    logits = teacher.classifier(features)
                p = common.upsample(logits, loss_size)
                p = torch.cat([p[:n], cutmix(p[n:], mask)])  # p_t, (n + B, K, h, w)
                sure = valid & confident(p, args.threshold)
                if statistics and args.features_of_teachers:
                    features = F.interpolate(features.float(), loss_size, mode="bilinear", align_corners=False)
                    features = torch.cat([features[:n], cutmix(features[n:], mask)])
                    own = torch.cat([label_at_stride[:n], hard_label(p, valid)[n:]])
                    p = augment_features(features, p, own, teacher.last.weight.flatten(1), statistics[2 + i], strength)
                pseudo_labels.append(hard_label(p, sure))  # y_t, (n + B, h, w)

        # 3 losses
        for j in members:
            if not students[j].training:
                learners[j].train()
            with common.autocast(args, device):
                features, logits = learners[j](common.to_float(student_input))
            losses[f"loss_labeled_{j + 1}"] = cross_entropy(common.upsample(logits[:B], args.crop), label)  # Eq. 5
            if semi:
                p = common.upsample(logits[B - n:], loss_size)  # p_s, (n + B, K, h, w)
                if statistics:  # by the label on labeled pictures, by its own prediction on the others
                    own = torch.cat([label_at_stride, hard_label(p, valid)[n:]])
                    p = augment_features(features.detach(), p, own, students[j].last.weight.flatten(1), statistics[j], strength)
                student_logits.append(p)
        for j, p in enumerate(student_logits):
            if teachers:
                losses[f"loss_st_{j + 1}"] = cross_entropy(p, pseudo_labels[learns_from[j]])  # Eq. 2
            losses[f"loss_ss_{j + 1}"] = cross_entropy(p, hard_label(student_logits[1 - j], valid))  # as in CPS
        loss_s, loss_st, loss_ss = (sum(losses[name] for name in losses if name[:-2] == term) for term in ("loss_labeled", "loss_st", "loss_ss"))
        loss = loss_s + args.alpha * loss_st + args.beta * loss_ss  # Eq. 4

        # 4 backward
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - iteration / args.iterations) ** .9
        scaler.step(optimizer)
        scaler.update()
        common.average_buffers(students)

        # 6 log, evaluate, save
        run.watch(1, iteration, losses)
        done, last = iteration + 1, iteration + 1 == args.iterations
        run.watch_pseudo_labels(*[y[n:] for y in pseudo_labels])
        if pseudo_labels:  # the truth of unlabeled pictures is used here and nowhere else
            truth_at_stride = sample(truth, loss_size)
            for table, y in zip(pseudo_tables, pseudo_labels):
                table += common.confusion_matrix(truth_at_stride, y[n:], K)
            covered.append(torch.stack([(y[n:] != IGNORE).float().mean() for y in pseudo_labels]).mean())
        if done % args.log_every == 0 or done in (args.warmup, args.iterations) or done % args.eval_every == 0:
            extra = {"lr": optimizer.param_groups[0]["lr"]} | ({"lambda": strength} if semi and statistics else {})
            if pseudo_labels:
                extra |= {f"pseudo_miou_{i + 1}": common.mean_iou(common.all_reduce(pseudo_tables[i])) for i in members}
                extra["pseudo_coverage"] = float(common.all_reduce(torch.stack(covered).mean())) / common.world_size()
                pseudo_tables, covered = [torch.zeros_like(table) for table in pseudo_tables], []
            run.images, run.phase = args.batch_size * (1 + semi), None if semi or args.supervised else "warm-up"
            run.log(1, done, **extra)
        if done % args.eval_every == 0 or last:
            tables = common.evaluate(evaluated if last else networks, data, args, device)
            run.log(1, done, val=tables)
            run.predictions(f"val_{done:06d}", networks)
            columns = {"labeled picture": image, "label": label}
            if semi:
                columns = {"weak view": weak, "strong view" + ", mixed" * mixed: strong, "truth" + ", mixed" * mixed + " (not used)": truth}
                columns |= {f"label of teacher {i + 1}" + ", mixed" * mixed: sample(y[n:], args.crop) for i, y in enumerate(pseudo_labels)}
                columns |= {f"student {j + 1} predicts": sample(hard_label(p, valid)[n:], args.crop) for j, p in enumerate(student_logits)}
            run.panel(f"batch_{done:06d}", {title: cells[:min(4, B)] for title, cells in columns.items()})
        if done % args.save_every == 0 or last:
            save(done)

    paper = None if args.supervised or set(args.changed) - {"backbone", "extra", "threshold", "split" * (args.dataset != "vocaug")} else PAPER_MIOU.get(
        (args.dataset, args.extra, args.backbone, args.threshold, args.labels))
    run.finish("student_1", tables or common.evaluate(evaluated, data, args, device), paper)


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    common.check_range(args, 1, min(args.crop), "loss_stride")
    common.check_range(args, 0, 1, "gamma", "threshold")
    common.check_range(args, 0, math.inf, "alpha", "beta", "lambda0", "warmup")
    if args.cutmix and args.strong and not args.supervised and args.batch_size < 2:
        raise common.UserError(f"--batch-size {args.batch_size}: CutMix mixes neighbours of a batch; use 2 or more, or --no-cutmix")
    if args.warmup >= args.iterations > 0 and not args.supervised:
        raise common.UserError(f"--warmup {args.warmup}: of {args.iterations} iterations none is left for the method; lower it, or raise --iterations")
    if args.network == "pspnet" or (args.network == "deeplabv2" and args.head == "plain"):
        raise common.UserError(f"--network {args.network} --head {args.head}: this method needs a network that ends in one linear classifier (Eq. 3) and has no "
                               "auxiliary head; use --network deeplabv3plus, or deeplabv2 with --head bottleneck")
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    train(args, data, labeled, unlabeled, device)


if __name__ == "__main__":
    common.run_main(main)
