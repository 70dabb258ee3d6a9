"""Semi-supervised Semantic Segmentation with Mutual Knowledge Distillation (MKD)
Jianlong Yuan, Qi Qian, Fan Wang, Jinchao Ge, Zhibin Wang, Yifan Liu. arXiv 2208.11499 (ACM MM 2023)

Two students of different initialization learn from labeled pictures and from each other's
pseudo-labels. Each has a mean teacher, whose pseudo-labels supervise the other student. Teachers
see weak views of the unlabeled pictures, students strong views: one photometric operation, and
boxes of the next picture of the batch (CutMix). Feature augmentation shifts the students' features
along the directions in which features of their class vary: one more term in the logits.

    python mkd.py                           (drawn streets, on a CPU, a few minutes)
    torchrun --nproc_per_node=4 mkd.py --dataset cityscapes --data-root DIR --labels 372

paper -> code
    Fig. 1, Algorithm 1   train(); pictures of a batch: draw()
    Eq. 1, Table 4        mean teachers: update_teachers(), --gamma
    Eq. 2, Sect. 3.1      L_st, teacher to the other student; L_ss, between students: train()
    Sect. 3.2             weak views (WDA): common.Stream; strong (SDA): strong_view(), cutmix()
    Eq. 3                 feature augmentation (FD, FDA): augment_features(), ClassStatistics
    Eqs. 4, 5, Table 5    L, and its part L_s on labeled pictures: train(), --alpha, --beta
    Tables 1 to 5         PAPER_MIOU has the flags of each row
"""

import argparse
import copy
import math

import common  # before torch: it sets how torch's threads wait
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as V

from common import IGNORE, integer, need, numbered, real

# ---- arguments -----------------------------------------------------------------------------------

# Numbers of Sects. 4.1 and 4.3 by dataset. "The code" is github.com/jianlong-yuan/semi-mmseg.
# Open: what a batch of 16 is; 16 labeled and 16 unlabeled pictures, as in the code   --batch-size
# Open: scale, iterations; the code's for VOC; Cityscapes: 40,000, our choice   --scale --iterations
PAPER = {
    "vocaug": dict(
        labels="662", size=None, crop=(512, 512), scale=(0.5, 2.0), batch_size=16,
        network="deeplabv3plus", head="plain", backbone="resnet50", weights="imagenet",
        batch_norm="sync",
        optimizer="sgd", lr=0.0025, weight_decay=5e-4, iterations=30_000,
        teachers="mutual", gamma=0.4, threshold=0.0, strong=True, cutmix=True,
        features="diagonal", lambda0=1.5, weight_gradient=True, unlabeled_class="student",
        alpha=1.5, beta=1.0, warmup=0, loss_stride=8,
        features_of_teachers=False, labeled_consistency=False, weak_photometric=False,
        workers=4, log_every=50, eval_every=5000, save_every=1000),
}  # fmt: skip
# Our rows: small networks from scratch need slower teachers, a smaller lambda (tests/RESULTS.md).
PAPER["streets"] = PAPER["vocaug"] | dict(
    labels="8", size=(64, 128), crop=(64, 64), scale=(0.75, 1.5), batch_size=4,
    backbone="tiny", weights="none", batch_norm="frozen",
    optimizer="adamw", lr=3e-3, weight_decay=1e-2, iterations=2400,
    gamma=0.99, cutmix=False, lambda0=0.3, warmup=500, loss_stride=2,
    workers=0, eval_every=600, save_every=100)
PAPER["voc"] = PAPER["vocaug"] | dict(labels="183")
PAPER["cityscapes"] = PAPER["vocaug"] | dict(
    labels="372", size=(1024, 2048), crop=(512, 1024),
    lr=0.01, iterations=40_000)
PAPER["camvid-tiny"] = PAPER["streets"] | dict(
    labels="1/8", size=(180, 240), crop=(96, 128),
    lr=2e-3, iterations=1500, warmup=600, cutmix=True, eval_every=500)
# With alpha 1.5, beta 1 the pseudo-labels get worse here (tests/RESULTS.md).
PAPER["camvid-cpu"] = PAPER["streets"] | common.CPU_PRESET | dict(
    iterations=3600, warmup=1200, alpha=0.3, beta=0.2, cutmix=True, loss_stride=4)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(
    labels="1/8", size=(360, 480), crop=(256, 352),
    iterations=20_000, eval_every=2000)
PAPER["folder-tiny"] = PAPER["camvid-tiny"] | common.FOLDER["tiny"] | dict(
    iterations=3000, warmup=1500, cutmix=False)
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | common.FOLDER["cpu"]
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | common.FOLDER["gpu"] | dict(iterations=10_000)
# Code: these five values are the authors', not the paper's. We leave out two passes for the two
#   kinds of pictures, teachers that normalize by their batches, and losses on padding   --preset
for name in ("vocaug", "voc", "streets"):
    PAPER[f"{name}-official"] = PAPER[name] | dict(
        gamma=0.6, weight_gradient=False,
        features_of_teachers=True, labeled_consistency=True, weak_photometric=True)

# Heads: table | argument | its values. Rows: dataset and flags | mIoU, ResNet-50 | ResNet-101
# Open: Table 4's setting; our default, for which Table 3 has 74.02, not 72.82   --gamma
# Open: what Table 5 varies; beta (its text) and alpha (72.52 lacks teachers in Table 3)   --beta
PAPER_MIOU = """
Table 1 | labels | 92 183 366 732 1464
voc | 60.60 66.74 71.01 72.73 | 65.35 70.18 74.44 75.90
voc --extra all | 64.92 69.48 74.25 75.89 77.59 | 69.10 74.63 76.76 78.66 80.02
voc --extra all --threshold .95 |  | 74.40 75.92 77.74 78.68 80.80
Table 1, no dagger | labels | 1464
voc --extra all | 78.14 | 79.96
Table 2 | labels | 662 1323 2646 5291
vocaug | 74.02 75.24 76.09 76.92 | 75.90 76.59 77.62 78.94
vocaug --split U2PL | 76.03 78.03 77.56 77.37 | 78.44 79.74 79.55 80.60
Table 2 | labels | 186 372 744 1488
cityscapes | 75.47 78.07 79.95 80.52 | 77.19 79.20 80.80 81.04
Table 3 | labels | 662
vocaug --teachers none --no-strong --features none | 68.82
vocaug --teachers own --no-strong --features none | 68.85
vocaug --no-strong --features none | 70.19
vocaug --teachers none --features none | 72.52
vocaug --teachers none --no-strong | 70.76
vocaug --features none | 73.66
vocaug | 74.02
Table 4 | gamma | 0 0.2 0.4 0.6 0.8
vocaug | 72.41 72.68 72.82 72.74 72.78 | 74.53 74.60 75.34 75.17 75.07
Table 5 | beta | 0 0.5 1 1.5 2
vocaug --features none | 72.52 72.80 73.66 73.43 73.49 | 74.44 75.81 75.44 75.80 75.64
Table 5 | alpha | 0 0.5 1 1.5 2
vocaug --features none | 72.52 72.80 73.66 73.43 73.49 | 74.44 75.81 75.44 75.80 75.64"""

TEACHERS = {"none": (), "own": (0, 1), "mutual": (1, 0)}  # of students 1 and 2; 0 is the first


def get_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=common.idea(__doc__),
        epilog="Defaults are in the table PAPER in mkd.py; a run writes all values to args.json.")
    add = parser.add_argument_group("mutual knowledge distillation").add_argument
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--teachers", choices=TEACHERS, help="a student's mean teacher (Table 3: -, MT, Mutual MT)")
    add("--strong", **switch, help="strong views for the students (Table 3, SDA)")
    add("--cutmix", **switch, help="CutMix as a part of the strong view (Sect. 3.2)")
    add("--features", choices=["none", "diagonal", "full"], help="Sigma of FDA (Eq. 3; Table 3)")
    add("--weight-gradient", **switch, help="gradient through w in the term of Eq. 3")
    add("--unlabeled-class", choices=["student", "teacher"], help="whose label is y of Eq. 3")
    add("--lambda0", **real(0), help="lambda of Eq. 3 at the last iteration")
    add("--gamma", **real(0, 1), help="decay of the mean teachers (Eq. 1; Table 4)")
    add("--alpha", **real(0), help="weight of L_st (Eq. 4; Table 5)")
    add("--beta", **real(0), help="weight of L_ss (Eq. 4; Table 5)")
    add("--warmup", **integer(0), help="iterations on labels alone at first (paper: 0)")
    add("--threshold", **real(0, 1), help="confidence that labels of L_st need (Table 1, *: .95)")
    add("--loss-stride", type=int, choices=[1, 2, 4, 8, 16], help="stride of p in L_st and L_ss")
    add("--features-of-teachers", **switch, help="FDA for teachers as well (authors' code)")
    add("--labeled-consistency", **switch, help="L_st, L_ss of labeled pictures (authors' code)")
    add("--weak-photometric", **switch, help="photometric distortion of weak views (authors' code)")
    common.add_arguments(parser, networks=["deeplabv2", "deeplabv3plus"])
    return parser  # fmt: skip


def paper_miou(args):
    """What the paper's tables report for these arguments: ["74.02 (Table 3: vocaug ..)", ..]."""
    found = []
    for line in PAPER_MIOU.splitlines()[1:]:
        row, *columns = line.split(" | ")
        if row.startswith("Table"):
            table, (varied, values) = row, columns
            continue
        wanted = common.parse_args(get_parser(), PAPER, f"--dataset {row}".split())
        names = {"dataset", "labels", "supervised", *args.changed, *wanted.changed}
        names -= {varied, "backbone", "split", "split_seed"}
        same = all(str(getattr(args, name)) == str(getattr(wanted, name)) for name in names)
        column = dict(zip(("resnet50", "resnet101"), columns)).get(args.backbone, "")
        value = f"{getattr(args, varied):g}"
        miou = dict(zip(values.split(), column.split())).get(value)
        if same and miou and (args.split or not wanted.split):
            note = ", without --preset official" if args.table_preset else ""
            found.append(f"{miou} ({table}: {row} --{varied} {value}{note})")
    return found


# ---- perturbations -------------------------------------------------------------------------------

def color_jitter(image, r):
    """Brightness, contrast, saturation times .5 to 1.5, hue by up to +-.25, in random order."""
    steps = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue]
    factors = [*r.uniform(0.5, 1.5, 3), r.uniform(-0.25, 0.25)]
    for i in r.permutation(4):
        image = steps[i](image, factors[i])
    return image


# Open: the share of each operation, and its range; the code's
SHARES = [share / 15 for share in (3, 5, 1, 1, 5)]
OPERATIONS = [
    color_jitter,
    lambda image, r: V.gaussian_blur(image, int(r.choice([3, 5, 7])), r.uniform(0.1, 2.0)),
    lambda image, r: V.equalize(image),
    lambda image, r: V.solarize(image, 128),
    lambda image, r: V.rgb_to_grayscale(image, 3),
]


def strong_view(image, r):
    """SDA of a picture: one random operation (Sect. 3.2); CutMix follows in train()."""
    operation = OPERATIONS[r.choice(len(OPERATIONS), p=SHARES)]
    return operation(image, r)


def views(operation, batch, args, name):
    """operation(picture, r) on each picture, not on its padding; r: its generator. (B, 3, H, W)"""
    result = batch["image"].clone()
    for image, inside, position in zip(result, batch["inside"], batch["position"]):
        top, bottom, left, right = inside
        picture = image[:, top:bottom, left:right]
        if min(picture.shape[1:]) > 3:  # the widest blur mirrors three pixels
            picture.copy_(operation(picture, common.rng(args.seed, name, position)))
    return result


def cutmix_mask(mask, r):
    """m of CutMix: inverts three boxes, each u / 3 of the area, in mask (H, W) bool, all False."""
    # Open: the shape of m; the code's. Off on streets, where it costs mIoU   --cutmix
    height, width = mask.shape
    for _ in range(3):
        u = r.uniform(0.25, 0.5)
        tall = u ** r.uniform()  # between u and 1; the box is u / tall wide
        h = round(height * tall / math.sqrt(3))
        w = round(width * u / tall / math.sqrt(3))
        top = r.randint(height - h + 1)
        left = r.randint(width - w + 1)
        mask[top : top + h, left : left + w].logical_not_()
    return mask


def cutmix(x, mask, start=0):
    """x = (1 - m) x_i + m x_j (Sect. 3.2); j is the next picture, for the last one the first.

    m: mask (B, H, W) bool. x (start + B, .., H, W), or one more as last j; keeps x[:start]."""
    if x.ndim == 4:
        mask = mask[:, None]  # for all channels
    x_i = x[start : start + len(mask)]
    x_j = x[start:].roll(-1, 0)[: len(mask)]
    return torch.cat([x[:start], x_i.where(~mask, x_j)])


def at_stride(maps, stride, args):
    """Maps (B, C, ..) of this stride, thinned out or upsampled to --loss-stride: (B, C, h, w)."""
    size = [math.ceil(side / args.loss_stride) for side in args.crop]
    if stride > args.loss_stride:
        return common.upsample(maps, size, stride // args.loss_stride)
    step = args.loss_stride // stride
    return maps[:, :, ::step, ::step].float()


# Feature augmentation (FD, FDA; Sect. 3.2). Features of one class vary: a car is red or white, near
# or far. Sigma_y, the covariance of the features of class y, says in which directions. FDA moves
# each feature f_i, of class y_i, along them by draws from N(0, lambda Sigma_yi). With ever more
# draws the mean cross entropy of the classifier (w, b) is at most, with v = w_j - w_yi,
#     mean over i of log sum_j exp(v^T f_i + (b_j - b_yi) + lambda / 2 v^T Sigma_yi v)  (Eq. 3):
# one more term, which raises the logit of each class j != y_i, and depends on (y_i, j) alone.
class ClassStatistics(nn.Module):
    """Sigma of Eq. 3: the covariance of each class's features (K, C, C), or its diagonal (K, C)."""

    # Open: the pixels of Sigma, and its form; all labeled (y) and unlabeled ones (y_u) so far, and
    #   the diagonal, both as in the code; ISDA's form is full   --features
    def __init__(self, classes, channels, full=False):
        super().__init__()
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))  # exact over 2^24
        self.register_buffer("mean", torch.zeros(classes, channels))
        size = (classes, channels, channels) if full else (classes, channels)
        self.register_buffer("covariance", torch.zeros(size))

    @torch.no_grad()
    def update(self, features, label):
        """Add a batch of all processes: features (B, C, h, w), label (B, h, w), 255 for unknown.

        A class has n_b pixels in the batch, of mean mu_b, covariance Sigma_b. r = n_b / (n + n_b):
            Sigma <- (1 - r) Sigma + r Sigma_b + r (1 - r) (mu - mu_b) (mu - mu_b)^T
            mu    <- (1 - r) mu + r mu_b"""
        features = features.flatten(2).float()  # (B, C, hw)
        classes = torch.arange(len(self.mean), device=label.device)[:, None]
        one_hot = (label.flatten(1)[:, None] == classes).float()  # (B, K, hw), 0 for unknown
        n_b = common.all_reduce(one_hot.sum((0, 2))[:, None])  # (K, 1)
        mu_b = common.all_reduce((one_hot @ features.mT).sum(0)) / n_b.clamp(min=1)
        r = n_b / (self.count[:, None] + n_b).clamp(min=1)  # 0 for an absent class
        gap = self.mean - mu_b
        self.count += n_b.squeeze(1).long()
        self.mean.lerp_(mu_b, r)
        deviation = (mu_b.mT @ one_hot).sub_(features)  # (B, C, hw), not used where unknown
        if self.covariance.ndim == 2:
            squares = (one_hot @ deviation.square_().mT).sum(0)  # (K, C)
            gap = gap.square()
        else:
            classes = one_hot.split(1, 1)
            squares = torch.stack([(deviation * one @ deviation.mT).sum(0) for one in classes])
            gap = torch.einsum("kc,kd->kcd", gap, gap)
            n_b = n_b[..., None]  # (K, 1, 1)
            r = r[..., None]
        sigma_b = common.all_reduce(squares) / n_b.clamp(min=1)
        self.covariance = (1 - r) * self.covariance + r * sigma_b + r * (1 - r) * gap


def augment_features(features, logits, label, weight, statistics, strength):
    """FD: p_j + lambda / 2 v^T Sigma_y v, the exponent of Eq. 3 plus p_y, which softmax cancels.

    p: logits (B, K, h, w). y: label (B, h, w), 255 for unknown. Of features (B, C, h, w) statistics
    (Sigma) is updated first. v = w_j - w_y of w: weight (K, C, 1, 1). lambda: strength."""
    statistics.update(features.detach(), label)
    w = weight.flatten(1)
    v = w - w[:, None]  # v[y, j], (K, K, C); the expanded square would lose digits
    if statistics.covariance.ndim == 2:
        table = (v.square() * statistics.covariance[:, None]).sum(2)  # (K, K)
    else:
        table = (v @ statistics.covariance * v).sum(2)
    table = F.pad(strength / 2 * table, (0, 0, 0, 256 - len(table)))  # 0 for unknown pixels, 255
    return logits + F.embedding(label, table).permute(0, 3, 1, 2)  # Eq. 3


# ---- EMA -----------------------------------------------------------------------------------------

@torch.no_grad()
def update_teachers(teachers, students, iteration, gamma):
    """theta_t <- gamma theta_t + (1 - gamma) theta_s (Eq. 1) of parameters; buffers are copied."""
    # Open: gamma in the first steps; at most 1 - 1 / t in step t, as in the code   --gamma
    gamma = min(1 - 1 / (iteration + 1), gamma)
    for teacher, student in zip(teachers, students):
        theta_t = list(teacher.parameters())
        theta_s = list(student.parameters())
        torch._foreach_lerp_(theta_t, theta_s, 1 - gamma)  # Eq. 1
        torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))


# ---- pseudo-labels -------------------------------------------------------------------------------

def hard_label(logits, valid):
    """arg max over classes of logits (B, K, h, w), 255 where valid (B, h, w) is False: int64."""
    best = logits.detach().max(1).indices  # on a CPU max is much faster than argmax
    return best.masked_fill(~valid, IGNORE)


# ---- losses --------------------------------------------------------------------------------------

class WithFeatures(nn.Sequential):
    """A network that returns its features (B, C, h, w) and its logits (B, K, h, w)."""

    def forward(self, image):
        features = self[0].features(image)
        return features, self[0].classifier(features)


class Ensemble(nn.ModuleList):
    """The mean of the networks' logits."""

    def forward(self, image):
        return sum(network(image) for network in self) / len(self)


def cross_entropy(logits, label):
    """l_ce of logits (B, K, H, W), label (B, H, W): mean over known pixels; 0 if there are none."""
    # Open: which pixels count; not padding; in L_st, not those below the threshold   --threshold
    count = common.all_reduce((label != IGNORE).sum())
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total * common.world_size() / count.clamp(min=1)  # DDP averages over processes


# ---- training ------------------------------------------------------------------------------------

def update_students(args, keep, students, loss, iteration):
    """Backward, and a step of the optimizer. Returns the learning rate, "poly" (Sect. 4.1)."""
    scaler = keep["scaler"]
    decay = (1 - iteration / args.iterations) ** 0.9
    common.decay_lr(keep["optimizer"], decay)
    keep["optimizer"].zero_grad()
    scaler.scale(loss).backward()
    scaler.step(keep["optimizer"])
    scaler.update()
    common.average_buffers(students)
    return args.lr * decay


def train_supervised(args, run, stream, students, learners, teachers, keep, begin, stop):
    """Learn from labels alone, from iteration begin until stop: the warm-up, and the baseline."""
    run.phase = None if args.supervised else "warm-up"
    run.images = args.batch_size
    batches = common.batches(stream, args, run.device, begin, stop)
    for iteration, labeled in enumerate(batches, begin):
        # 5 EMA: Algorithm 1 has it first (line 6)
        update_teachers(teachers, students, iteration, args.gamma)

        # 1 batch: weak views (lines 7, 9)
        image = labeled["image"]  # (B, 3, H, W)
        if args.weak_photometric:
            image = views(common.distort, labeled, args, "distort labeled")
        # 2 pseudo-labels: none
        # 3 losses (lines 11, 13)
        loss_labeled = []
        for learner in learners:
            with common.autocast(args, run.device):
                _, logits = learner(common.to_float(image))
            logits = common.upsample(logits, args.crop, students[0].stride)
            loss_labeled.append(cross_entropy(logits, labeled["label"]))  # Eq. 5

        # 4 backward
        lr = update_students(args, keep, students, sum(loss_labeled), iteration)

        # 6 log, evaluate, save
        losses = numbered("loss_labeled", loss_labeled)
        run.step(iteration, losses, record=iteration + 1 == stop, lr=lr)
        if run.due():
            run.evaluate(numbered("student", students) | numbered("teacher", teachers))
            run.panel(f"batch_{run.mark}", {"picture": image[:4], "label": labeled["label"][:4]})
        run.save(iteration, keep)


def train(args, run, streams, students, learners, teachers, keep, begin):
    """Algorithm 1, from iteration begin on; lines are its lines. streams: labeled, unlabeled."""
    run.phase = None
    run.images = 2 * args.batch_size
    statistics = keep["statistics"]  # of students; with --features-of-teachers of teachers, too
    networks = numbered("student", students) | numbered("teacher", teachers)
    mixed = args.strong and args.cutmix
    # Open: the size of p in L_st and L_ss; an eighth of the crop, as in the code   --loss-stride
    step = args.loss_stride
    stride = students[0].stride
    batches = [
        common.batches(streams[0], args, run.device, begin, args.iterations),
        common.batches(streams[1], args, run.device, begin, args.iterations, overlap=mixed)]
    for iteration, (labeled, unlabeled) in enumerate(zip(*batches), begin):  # line 5
        # 5 EMA: Algorithm 1 has it first (line 6)
        update_teachers(teachers, students, iteration, args.gamma)

        # 1 batch (lines 7, 8): weak and strong views (line 9), the same for both students
        image = labeled["image"]  # (B, 3, H, W)
        label = labeled["label"]  # (B, H, W)
        weak = unlabeled["image"]  # (B, 3, H, W); with several processes B + 1: common.batches()
        strong = views(strong_view, unlabeled, args, "strong") if args.strong else weak
        if args.weak_photometric:
            image = views(common.distort, labeled, args, "distort labeled")
            weak = views(common.distort, unlabeled, args, "distort")
        B = len(image)
        mask = torch.zeros_like(label, dtype=torch.bool)  # m, (B, H, W)
        if mixed:
            for m, position in zip(mask, unlabeled["position"]):
                cutmix_mask(m, common.rng(args.seed, "cutmix", position))
        strong = cutmix(strong, mask)  # (B, 3, H, W)
        L = B if args.labeled_consistency else 0  # labeled pictures in L_st and L_ss
        small_mask = mask[:, ::step, ::step]  # (B, h, w)
        small_label = label[:, ::step, ::step]
        valid = torch.cat([labeled["valid"][:L], unlabeled["valid"]])  # (L + B, H, W)
        valid = valid[:, ::step, ::step]
        valid = cutmix(valid, small_mask, L)  # (L + B, h, w), False on padding
        # Open: lambda; half a cosine up to 1.5 after the warm-up, as in the code   --lambda0
        progress = (iteration + 1 - args.warmup) / (args.iterations - args.warmup)
        strength = args.lambda0 * (1 - math.cos(math.pi * progress)) / 2 if statistics else 0.0

        # 2 pseudo-labels: of both teachers on weak views; their logits are mixed like the pictures
        pseudo_labels = []
        teacher_input = common.to_float(torch.cat([image[:L], weak]))  # (L + B, 3, H, W)
        for i, teacher in enumerate(teachers):
            with torch.no_grad(), common.autocast(args, run.device):
                features, p = WithFeatures(teacher)(teacher_input)  # line 10
            p = cutmix(at_stride(p, stride, args), small_mask, L)  # p_t, (L + B, K, h, w)
            confidence = p.softmax(1).amax(1)
            if args.features_of_teachers and statistics:
                features = cutmix(at_stride(features, stride, args), small_mask, L)
                y = torch.cat([small_label[:L], hard_label(p[L:], valid[L:])])
                p = augment_features(
                    features, p, y, teacher.last.weight, statistics[2 + i], strength)
            pseudo_labels.append(hard_label(p, valid & (confidence >= args.threshold)))  # y_t

        # 3 losses
        # Open: a pass for each kind of picture, or one; one, for joint batch norm   --batch-norm
        student_input = common.to_float(torch.cat([image, strong]))  # (2B, 3, H, W)
        loss_labeled = []
        student_logits = []
        for i, learner in enumerate(learners):
            with common.autocast(args, run.device):
                features, p = learner(student_input)  # lines 11, 12
            p_labeled = common.upsample(p[:B], args.crop, stride)  # p_s^l, (B, K, H, W)
            loss_labeled.append(cross_entropy(p_labeled, label))  # Eq. 5, line 13
            p = at_stride(p, stride, args)  # (2B, K, h, w)
            if statistics:
                # Open: whose "pseudo-labels" y of unlabeled pixels are; the student's own arg max,
                #   as in the code: line 12 has no other label to give FD   --unlabeled-class
                y_u = hard_label(p[B:], valid[L:])
                if args.unlabeled_class == "teacher":
                    y_u = pseudo_labels[TEACHERS[args.teachers][i]][L:]
                # Open: gradient through w; yes, as in ISDA; else |w| diverges   --weight-gradient
                w = students[i].last.weight
                w = w if args.weight_gradient else w.detach()
                features = at_stride(features.detach(), stride, args)
                y = torch.cat([small_label, y_u])  # the labeled half only updates Sigma if L = 0
                p = augment_features(features, p, y, w, statistics[i], strength)  # line 12
            student_logits.append(p[B - L :])  # p_s^u, (L + B, K, h, w)
        loss_st = []
        for p, i in zip(student_logits, TEACHERS[args.teachers]):
            loss_st.append(cross_entropy(p, pseudo_labels[i]))  # Eq. 2, line 14
        # Open: whether L_ss takes its labels before or after FD; after, as line 15 reads
        y_s1, y_s2 = (hard_label(p, valid) for p in student_logits)
        loss_ss = [cross_entropy(p, y) for p, y in zip(student_logits, (y_s2, y_s1))]  # line 15
        # Eq. 4, line 16
        loss = sum(loss_labeled) + args.alpha * sum(loss_st) + args.beta * sum(loss_ss)

        # 4 backward
        lr = update_students(args, keep, students, loss, iteration)

        # 6 log, evaluate, save
        losses = numbered("loss_labeled", loss_labeled) | numbered("loss_st", loss_st)
        losses |= numbered("loss_ss", loss_ss)
        numbers = {"lr": lr} | ({"lambda": strength} if statistics else {})
        pseudo_labels = numbered("pseudo_miou", [y[L:] for y in pseudo_labels])
        truth = cutmix(unlabeled["truth"], mask)  # nothing learns from it
        run.step(iteration, losses, pseudo_labels, truth[:, ::step, ::step], **numbers)
        if run.due():
            ensemble = {"ensemble": students} if run.last else {}
            run.evaluate(networks | ensemble, shown=networks)
            draw(run, weak, strong, truth, pseudo_labels.values(), [y_s1[L:], y_s2[L:]])
        run.save(iteration, keep)


def draw(run, weak, strong, truth, pseudo_labels, predictions):
    """pictures/batch_*.png: unlabeled pictures as teachers and students see them (Fig. 1)."""
    columns = {"weak view": weak, "strong view": strong, "truth (not used)": truth}
    labels = numbered("teacher", pseudo_labels) | numbered("student", predictions)
    for title, label in labels.items():
        label = F.interpolate(label[:, None].float(), truth.shape[1:])  # (B, 1, H, W)
        columns[title] = label[:, 0].long()
    run.panel(f"batch_{run.mark}", {title: cells[:4] for title, cells in columns.items()})


# ---- main ----------------------------------------------------------------------------------------

def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    need(args.network == "deeplabv3plus" or args.head == "bottleneck",
         "--network deeplabv2 --head plain: Eq. 3 needs one linear classifier; --head bottleneck")
    mixed = args.cutmix and args.strong and not args.supervised
    need(args.batch_size > 1 or not mixed,
         "--batch-size 1: CutMix mixes neighbors of a batch; use 2 or more, or --no-cutmix")
    need(args.warmup < args.iterations or args.iterations == 0 or args.supervised,
         f"--warmup {args.warmup}: no iteration is left for the method; raise --iterations")
    need(args.unlabeled_class == "student" or args.teachers != "none",
         "--unlabeled-class teacher: there is no teacher; leave out --teachers none")
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    # Open: in what the students differ; initial weights only (with a pretrained backbone, the head)
    # Open: the baseline; one student on the same weak views, for as many steps   --supervised
    members = range(1 if args.supervised else 2)
    students = Ensemble(common.build_network(args, data, device, i) for i in members)  # line 3
    students.stride = students[0].stride
    students.align_corners = True
    teachers = Ensemble()
    statistics = nn.ModuleList()
    if not args.supervised:
        same = torch.equal(students[0].last.weight, students[1].last.weight)
        need(not same, f"--weights {args.weights}: both students would begin with the same "
             "weights; use those of a backbone, not those of a whole network")
        if args.teachers != "none":
            # Open: how teachers normalize; by the students' statistics (the code: by their batches)
            teachers = copy.deepcopy(students).requires_grad_(False).eval()  # line 4
        if args.features != "none":
            augmented = students + teachers if args.features_of_teachers else students
            sizes = (len(data.names), students[0].feature_channels, args.features == "full")
            statistics = nn.ModuleList(ClassStatistics(*sizes) for _ in augmented).to(device)
    learners = [common.parallel(WithFeatures(student), device) for student in students]
    optimizer = common.make_optimizer(args, args.lr, students)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    # Open: which network is reported; student 1. The last table has all, and the students' mean.
    method = "mkd-supervised" if args.supervised else "mkd"
    run = common.Run(method, args, data, labeled, unlabeled, device, {1: args.iterations},
                     "student_1")
    networks = numbered("student", students)
    networks |= numbered("teacher", teachers)
    keep = networks | {"statistics": statistics, "optimizer": optimizer, "scaler": scaler}
    begin = run.restore(keep)
    streams = [
        common.Stream(data, labeled, "labeled", args),
        common.Stream(data, unlabeled, "unlabeled", args, labeled=False)]
    # Open: how students from scratch begin; on labels alone, else they collapse   --warmup
    stop = args.iterations if args.supervised else min(args.warmup, args.iterations)
    if begin < stop:
        train_supervised(args, run, streams[0], students, learners, teachers, keep, begin, stop)
    if not args.supervised:
        train(args, run, streams, students, learners, teachers, keep, max(begin, stop))
        networks["ensemble"] = students
    rows = paper_miou(args)
    for row in rows:
        common.say(f"paper     {row}")
    run.finish(networks, float(rows[0].split()[0]) if rows else None)


if __name__ == "__main__":
    common.run_main(main)
