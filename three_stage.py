"""A Three-Stage Self-Training Framework for Semi-Supervised Semantic Segmentation
Rihuan Ke, Angelica I. Aviles-Rivero, Saurabh Pandey, Saikumar Reddy, Carola-Bibiane Schönlieb. IEEE Transactions on Image Processing 31, 2022, arXiv 2012.00827

Self-training in three stages, each of which starts anew. Stage 1 learns from the labeled pictures and predicts a first pseudo-mask for every picture.
Stages 2 and 3 learn two tasks at once. Task 1 is the segmentation itself: labels where there are any, and everywhere consistency, that is,
a strongly augmented picture must give what the mean teacher says of the weakly augmented one, moved in the same way. Task 2 is to
reproduce the pseudo-masks of the stage before, which are often wrong: so it gets a branch of its own, and the segmentation
network learns from them only through the blocks that both share. Stage 2 has its own last two blocks, stage 3, whose pseudo-masks are
better, only the last one. Branches are thrown away in the end: what remains is a plain DeepLabv2.

    python three_stage.py                                                                        drawn streets, a CPU, minutes
    torchrun --nproc_per_node=4 three_stage.py --dataset cityscapes --data-root DIR --labels 372

paper -> code
    Eq. 1     consistency loss                              train(), step 3: loss_consistency
    Eq. 2     supervised loss                               train(), step 3: loss_labeled
    Eq. 3     pseudo-mask loss of the second branch         train(), step 3: loss_pseudo
    Eqs. 4, 5 losses of stages 2 and 3                      train(), step 3: loss
    operators A, B: RandAugment and Cutout                  strong_view(), warp(), cutout()
    Algorithm 1                                             train(): one loop over the stages
    Table VII  branches g-hat and g-tilde                   SecondBranch, TwoBranches
    Table V    --stages 1 | 2;  no CR: --no-consistency;  no T2: --no-pseudo-masks;  no SA: --no-strong;  no N2: --branch g-hat
    Table VI   --no-ema;  Fig. 3: --lambda1, --lambda2;  a fourth stage: --stages 4
    Fig. 2     loss_consistency and val in log.jsonl, with and without --no-pseudo-masks;  Figs. 4, 5: pictures/stages.png, val_stage_*.png

Choices that the paper leaves open, and why
    Sub-batches. The paper's Sub-batch 1 (from L and U together) "has size 1", 3 or 2 where there are many labels; in the authors' code it is
        the labeled one that has 1 of 5 pictures (VOC: of 10). Here the labeled one has 1, 3 or 2.     --batch-size, --labeled-batch-size
    Stage 1 has as many labeled pictures a step as the other stages have in all, in the paper's rows.   --stage1-batch-size
    Hard targets, the class of the highest logit, for consistency as for pseudo-masks; no threshold. Pseudo-masks come from the whole
        picture in one pass, without flip. Labeled pictures have them too, and A = B = identity there (Sect. IV-B).
    Who makes them: the mean teacher (authors' code in stage 2; here in stage 1 too); the paper writes f_theta.  --pseudo-masks-of student
    RandAugment (authors' code): three operations of the 14, drawn with replacement, each applied with probability .5 at level
        1 to 9. The geometric ones are composed into one map and sampled once, nearest, after the photometric ones, for
        picture, teacher's label and pseudo-mask alike: what they show stays together to the pixel. What comes from outside
        is mid-grey in the picture and 255 in labels. Cutout: three squares in mid-grey; labels are not cut.
    Start of a stage: the weights of --weights again (a head too, where the file has one that fits); the rest, branch and optimizer are new.
        From scratch (tiny): new weights.
    conv6 of g-hat: three bottlenecks as in conv5, half as wide, new, from N(0, .01) (authors' code). Frozen batch norm does nothing there.
    ASPP has four rates (Table VII); the authors' code returns after two.                               --aspp-branches 2
    The mean teacher's decay takes four values, from 0, 1/3, 2/3 and 5/6 of a stage on: epochs 0, 20, 40, 50 of 60 in the
        authors' code.                                                                                  --ema-decay
    Adam, constant learning rate, no weight decay, batch norm frozen as loaded. The code has a lower rate for pretrained layers.  --backbone-lr-mult
    Each loss is a mean over its valid pixels in all pictures of the step, of all processes; loss terms are logged without lambda.
    Other departures from the code: 60,000 steps in stage 1 too, as the paper says (code: 20,000 or 10,000); logits upsampled without aligned
        corners; the bonnet of Cityscapes' car is not cut out of pseudo-masks; on VOC any scale from .5 to 1.5, not eleven of them.
    Labeled pictures: those of French et al.'s seeds on Cityscapes, else by --seed; the paper's are those of Hung et al.   --split FILE
    The baseline (--supervised) is stage 1 for as many steps as all stages have together.
    Reported: the mean teacher at the last iteration, as the authors' code does for stages 2 and 3. Here stage 1 and the baseline have one too,
        so that its gain is not counted for the method. The student stands beside it, and so do the stages before.
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

# Per dataset and labels, by the argument's name (Sect. IV-B; sub-batches and ema_decay: the authors' code). adamw without weight decay is Adam.
PAPER = {
    "cityscapes": dict(
        labels="372", size=(512, 1024), crop=(256, 512), scale=(1., 1.), batch_size=4, labeled_batch_size=1, stage1_batch_size=5, iterations=60_000,
        lambda1=.5, lambda2=.5, ema_decay=(.99, .995, .9975, .999), cutout=32, network="deeplabv2", head="plain", backbone="resnet101", weights="imagenet",
        batch_norm="frozen", optimizer="adamw", lr=3e-5, weight_decay=0., workers=4, log_every=50, eval_every=5000, save_every=1000),
    # Drawn scenes and a small network from scratch, minutes on a CPU.
    "streets": dict(
        labels="8", size=(64, 128), crop=(64, 128), scale=(1., 1.), batch_size=4, labeled_batch_size=2, stage1_batch_size=4, iterations=1900, stage1_iterations=700,
        lambda1=.5, lambda2=.5, ema_decay=(.98, .99, .99, .995), cutout=8, network="deeplabv2", head="plain", backbone="tiny", weights="none",
        batch_norm="frozen", optimizer="adamw", lr=2e-3, weight_decay=0., workers=0, log_every=50, eval_every=500, save_every=100),
}
PAPER["cityscapes/1488"] = PAPER["cityscapes/1448"] = PAPER["cityscapes/1/2"] = PAPER["cityscapes"] | dict(labels="1488", labeled_batch_size=3, batch_size=2)
PAPER["vocaug"] = PAPER["cityscapes"] | dict(labels="1/50", size=None, crop=(321, 321), scale=(.5, 1.5), batch_size=9, labeled_batch_size=1, stage1_batch_size=10,
                                             lambda1=.25, lambda2=.25)
PAPER["vocaug/1/20"] = PAPER["vocaug/529"] = PAPER["vocaug"] | dict(labels="1/20", lambda1=1.25, lambda2=1.25)
PAPER["vocaug/1/8"] = PAPER["vocaug/1323"] = PAPER["vocaug"] | dict(labels="1/8", lambda1=.625, lambda2=.625, batch_size=8, labeled_batch_size=2)
PAPER["camvid-cpu"] = PAPER["streets"] | dict(labels="1/8", size=(180, 240), crop=(96, 128), cutout=12, iterations=2000, stage1_iterations=2000, eval_every=500)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(labels="1/8", size=(360, 480), crop=(256, 352), iterations=20_000, eval_every=2000)
# Pictures of one's own: at most so large, square crops at changing scale; all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(labels="1/1", size=(256,), crop=(128, 128), scale=(.75, 1.5), cutout=16)
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(labels="1/1", size=(640,), crop=(320, 320), scale=(.5, 1.5), iterations=10_000)

# The paper's mIoU by (dataset, weights, labels): Tables II, III, IV.
PAPER_MIOU = {("cityscapes", "imagenet", 100): 54.85, ("cityscapes", "imagenet", 372): 62.82, ("cityscapes", "imagenet", 744): 65.80,
              ("cityscapes", "imagenet", 1448): 67.11, ("cityscapes", "imagenet", 1488): 67.11,  # Sect. IV-A says 1448, Table II 1488
              ("vocaug", "imagenet", 106): 55.13, ("vocaug", "imagenet", 212): 62.71, ("vocaug", "imagenet", 529): 68.23, ("vocaug", "imagenet", 1323): 69.36,
              ("vocaug", "coco", 106): 63.82, ("vocaug", "coco", 212): 70.77, ("vocaug", "coco", 529): 71.90, ("vocaug", "coco", 1323): 72.95}

BRANCHES = "g-hat", "g-tilde"  # Table VII: with a block and a head of its own (conv6, ASPP_2), with a head alone (ASPP_3)


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     epilog="What is left out comes from the table PAPER at the top of three_stage.py, by dataset and labels; a run writes all "
                                            "values to args.json.")
    a = parser.add_argument_group("three-stage self-training").add_argument
    a("--stages", type=int, metavar="N", default=3, help="stages in all (Table V; Sect. IV-C has a fourth)")
    a("--consistency", action=argparse.BooleanOptionalAction, default=True, help="the consistency loss, Eq. 1 (Table V, CR)")
    a("--pseudo-masks", action=argparse.BooleanOptionalAction, default=True, help="Task 2, Eq. 3 (Table V, T2)")
    a("--strong", action=argparse.BooleanOptionalAction, default=True, help="RandAugment and Cutout; without, A and B are the identity (Table V, SA)")
    a("--branch", choices=BRANCHES, help="in every stage (default: g-hat in stage 2, then g-tilde; Table V, N2)")
    a("--ema", action=argparse.BooleanOptionalAction, default=True, help="a mean teacher; without, the teacher is the student itself (Table VI)")
    a("--ema-decay", type=float, metavar="D", nargs=4, help="of the mean teacher, from 0, 1/3, 2/3, 5/6 of a stage on")
    a("--lambda1", type=float, metavar="X", help="weight of the consistency loss (Eqs. 4, 5; Fig. 3)")
    a("--lambda2", type=float, metavar="X", help="weight of the pseudo-mask loss (Eqs. 4, 5; Fig. 3)")
    a("--pseudo-masks-of", choices=["teacher", "student"], default="teacher", help="who predicts them (default: %(default)s)")
    a("--labeled-batch-size", type=int, metavar="N", help="labeled pictures an iteration, besides --batch-size from all pictures (Sect. IV-B)")
    a("--stage1-batch-size", type=int, metavar="N", help="labeled pictures an iteration in stage 1")
    a("--stage1-iterations", type=int, metavar="N", help="of stage 1 (default: the table's, or --iterations)")
    a("--cutout", type=int, metavar="N", help="side of Cutout's squares, in pixels")
    a("--backbone-lr-mult", type=float, metavar="X", default=1., help="the backbone's learning rate, times --lr (default: %(default)s)")
    common.add_arguments(parser)
    return parser


# ---- perturbations: the operators A and B ----------------------------------------------------------------------------

GREY = 128  # what is outside of a moved picture, and inside of Cutout's squares


def sharpness(image, factor):
    """PIL's Sharpness: blend with a smoothed picture, 0 smooth, 1 as it is. (torchvision's copies its kernel to the GPU each time: a sync.)"""
    x, smooth = image.float(), image.float()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth[:, 1:-1, 1:-1] = ((box + 4 * x[:, 1:-1, 1:-1]) / 13).round()  # 3x3 of ones with 5 in the middle
    return smooth.lerp(x, factor).clamp_(0, 255).to(torch.uint8)


# RandAugment's operations at level v = 1..9.  Photometric: image (3, H, W) uint8 -> the same.
PHOTOMETRIC = {
    "Identity": lambda image, v: image,
    "AutoContrast": lambda image, v: V.autocontrast(image),
    "Equalize": lambda image, v: V.equalize(image),
    "Solarize": lambda image, v: V.solarize(image, 256 - 25.6 * v),
    "Posterize": lambda image, v: V.posterize(image, 4 - int(.4 * v)),
    "Color": lambda image, v: V.adjust_saturation(image, .18 * v + .1),
    "Contrast": lambda image, v: V.adjust_contrast(image, .18 * v + .1),
    "Brightness": lambda image, v: V.adjust_brightness(image, .18 * v + .1),
    "Sharpness": lambda image, v: sharpness(image, .18 * v + .1),
}


def rotate(v, height, width):
    """By 3 v degrees about the middle."""
    cos, sin = math.cos(math.radians(3 * v)), math.sin(math.radians(3 * v))
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# Geometric: signed level v, size -> (a, b, c, d, e, f): pixel (x, y) shows what was at (a x + b y + c, d x + e y + f), as in PIL.
GEOMETRIC = {
    "Rotate": rotate,
    "ShearX": lambda v, height, width: (1, .03 * v, 0, 0, 1, 0),
    "ShearY": lambda v, height, width: (1, 0, 0, .03 * v, 1, 0),
    "TranslateX": lambda v, height, width: (1, 0, v, 0, 1, 0),
    "TranslateY": lambda v, height, width: (1, 0, 0, 0, 1, v),
}
IDENTITY = (1, 0, 0, 0, 1, 0)


def compose(first, second):
    """The map that does first, then second: its pixel shows what second takes from the picture that first made."""
    a, b, c, d, e, f = first
    g, h, i, j, k, l = second
    return a * g + b * j, a * h + b * k, a * i + b * l + c, d * g + e * j, d * h + e * k, d * i + e * l + f


def warp(image, label, matrix):
    """Moves a picture (3, H, W) uint8 and its label maps (L, H, W) uint8 by one map, nearest pixel; from outside come GREY and 255."""
    a, b, c, d, e, f = matrix
    height, width = image.shape[1:]
    pixels = F.pad(torch.cat([image, label]).flatten(1), (0, 1), value=IGNORE)  # (3 + L, HW + 1), the last one is for outside
    pixels[:3, -1] = GREY
    x, y = torch.arange(width, device=image.device) + .5, torch.arange(height, device=image.device)[:, None] + .5  # the middles of pixels
    column, row = (a * x + (b * y + c)).floor_(), (d * x + (e * y + f)).floor_()  # (H, W): where each pixel comes from
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    index = row.mul_(width).add_(column).masked_fill_(outside, height * width).long().flatten()  # exact in float32 up to 4096 x 4096
    moved = pixels.gather(1, index.expand(len(pixels), -1)).unflatten(1, (height, width))  # one gather for all: they stay together
    return moved[:3], moved[3:]


def cutout(image, side, generator):
    """Three grey squares around uniform centres; the part beyond the border is lost. image (3, H, W) uint8 -> the same."""
    image, (height, width) = image.clone(), image.shape[1:]
    for _ in range(3):
        top, left = generator.randint(height) - side // 2, generator.randint(width) - side // 2
        image[:, max(top, 0):max(top + side, 0), max(left, 0):max(left + side, 0)] = GREY
    return image


def strong_view(images, labels, generators, cutout_side):
    """A and B of Eqs. 1 and 3: RandAugment, then Cutout (images alone), of each picture its own.

    images (B, 3, H, W) uint8, labels (B, L, H, W) uint8: L label maps of each picture, generators: one seeded generator a picture
    -> images and labels of the same shapes, on the same device; labels are 255 where nothing is known."""
    strong = []
    for image, label, r in zip(images, labels, generators):
        matrix = IDENTITY
        for _ in range(3):
            i, apply, level, sign = r.randint(len(PHOTOMETRIC) + len(GEOMETRIC)), r.uniform() < .5, r.randint(1, 10), (-1, 1)[r.randint(2)]
            if not apply:
                continue
            if i < len(PHOTOMETRIC):
                image = list(PHOTOMETRIC.values())[i](image, level)
            else:
                matrix = compose(matrix, list(GEOMETRIC.values())[i - len(PHOTOMETRIC)](sign * level, *image.shape[1:]))
        if matrix != IDENTITY:
            image, label = warp(image, label, matrix)
        strong.append((cutout(image, cutout_side, r), label))
    return tuple(map(torch.stack, zip(*strong))) if strong else (images, labels)


# ---- networks: the second branch -------------------------------------------------------------------------------------

class SecondBranch(nn.Module):
    """The blocks of g-hat or g-tilde that are its own (Table VII): conv6 and ASPP_2 on conv4, or ASPP_3 alone on conv5.

    kind: of BRANCHES. conv6 has the blocks of the network's conv5 at half the width. (B, C, h, w) -> logits (B, K, h, w)."""

    def __init__(self, network, classes, kind):
        super().__init__()
        conv5, channels = network.backbone.layer4, network.backbone.channels
        self.conv6 = nn.Identity()
        if kind == "g-hat":
            block, inside, channels = type(conv5[0]), conv5[0].conv1.in_channels, channels // 2
            norm = common.group_norm if isinstance(conv5[0].bn1, nn.GroupNorm) else type(conv5[0].bn1)
            blocks = [block(inside if i == 0 else channels, channels // block.expansion, norm_layer=norm) for i in range(len(conv5))]
            blocks[0].downsample = nn.Sequential(nn.Conv2d(inside, channels, 1, bias=False), norm(channels))  # as in conv5, where it changes the width
            self.conv6 = nn.Sequential(*blocks)
            for conv in (m for m in self.conv6.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
                conv.dilation = conv.padding = (4, 4)
        self.aspp = nn.ModuleList(nn.Conv2d(channels, classes, 3, padding=conv.padding, dilation=conv.dilation) for conv in network.branches)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, 0, .01)

    def forward(self, x):
        x = self.conv6(x)
        return sum(conv(x) for conv in self.aspp)


class TwoBranches(nn.Module):
    """f and g in one pass: images (B, 3, H, W) float -> logits of both, (B, K, h, w) each; with branch None a tuple of f's alone."""

    def __init__(self, network, branch, kind):
        super().__init__()
        self.network, self.branch, self.kind = network, branch, kind

    def forward(self, image):
        conv4, conv5 = self.network.backbone.layers(self.network.normalize(image))[2:]
        logits = self.network.classifier(conv5)
        if self.branch is None:
            return (logits,)
        return logits, self.branch(conv4 if self.kind == "g-hat" else conv5)


# ---- EMA -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def update_teacher(teacher, student, decay):
    """theta' <- decay theta' + (1 - decay) theta; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))


def decay_at(progress, decays):
    """The decay at this share of a stage, 0..1: one of four, from 0, 1/3, 2/3 and 5/6 on."""
    return decays[sum(progress >= step for step in (1 / 3, 2 / 3, 5 / 6))]


# ---- pseudo-masks ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def make_pseudo_masks(network, data, ids, unlabeled, stage, run, args, device):
    """Algorithm 1, lines 5 and 9: the network's class at each pixel of every training picture, as PNG in run.folder/pseudo_labels/stage_<stage>/.

    Each process takes its share; what is there already is kept. Returns the mIoU of the unlabeled ones, against a truth that nothing learns from, or None."""
    folder = run.folder / "pseudo_labels" / f"stage_{stage}"
    run.claim(folder)
    network.eval()
    plain = argparse.Namespace(**vars(args) | {"scales": [1.], "flip": False, "base_size": 0})  # however val is evaluated
    share, matrix, unlabeled = ids[common.rank()::common.world_size()], torch.zeros(len(data.names), len(data.names), dtype=torch.int64), set(unlabeled)
    for done, id in enumerate(share, 1):
        if not common.pseudo_label_path(folder, id).exists():
            image = torch.from_numpy(data.image(id).transpose(2, 0, 1).copy())[None].to(device)
            label = common.predict(network, image, plain, image.shape[2:]).argmax(1)[0].to("cpu", torch.uint8)  # arg max f(x)
            common.write_pseudo_label(folder, id, label.numpy(), data.colors)
        if id in unlabeled:
            label = common.read_pseudo_label(folder, id)
            truth = common.truth_for_the_log(data, id, label.shape)
            matrix += common.confusion_matrix(torch.from_numpy(truth).long(), torch.from_numpy(label).long(), len(data.names))
        common.progress(f"stage {stage}, pseudo-masks", done, len(share))
    miou = common.mean_iou(common.all_reduce(matrix.to(device)).cpu())
    known = f": mIoU {miou:.1f} on the unlabeled ones, whose truth nothing learns from" if math.isfinite(miou) else ""
    common.say(f"stage {stage}   pseudo-masks of {len(ids)} pictures{known}")
    common.barrier()
    return miou if math.isfinite(miou) else None


# ---- losses ----------------------------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    """d_s and d_c: mean over the valid pixels of all processes. logits (B, K, H, W), label (B, H, W) with 255 -> 0-dim; 0 if nothing is valid.

    Each process returns its share times their number, since gradients are averaged over processes."""
    count = common.all_reduce((label != IGNORE).sum())
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") * common.world_size() / count.clamp(min=1)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args, stages, data, labeled, unlabeled, device):
    run = common.OldRun("three-stage-supervised" if args.supervised else "three-stage", args, data, labeled, unlabeled, device, dict(stages))
    everything, results, pseudo_miou = labeled + unlabeled, {}, {}  # confusion matrices at the end of each stage; mIoU of the pseudo-masks that it made
    source = None  # the network of the stage before that makes this stage's pseudo-masks

    for stage, iterations in stages:
        if run.state and stage < run.state["stage"]:
            continue
        # Algorithm 1, lines 3, 7, 11: every stage starts from the pretrained weights
        student = common.build_network(args, data, device, stage - 1)
        kind = args.branch or ("g-hat" if stage == 2 else "g-tilde")
        branch = None
        if stage > 1 and args.pseudo_masks:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(common.rng(args.seed, "branch", stage).randint(2 ** 31)))
                branch = SecondBranch(student, len(data.names), kind)
            branch.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
        teacher = copy.deepcopy(student).requires_grad_(False).eval()
        if stage > 1 and source is None:  # resumed
            source = copy.deepcopy(teacher)
        learner = common.parallel(TwoBranches(student, branch, kind), device)
        own = list(branch.parameters()) if branch else []
        optimizer = common.make_optimizer(args, args.lr, student.backbone.parameters(), student.head_parameters() + own)
        optimizer.param_groups[0]["lr"] = args.lr * args.backbone_lr_mult
        scaler, begin = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"), 0

        def save(iteration):
            networks = {"student": student, "teacher": teacher} | ({f"stage_{stage - 1}": source} if source else {})
            run.save("teacher", networks, stage=stage, iteration=iteration, branch=branch.state_dict() if branch else {}, optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict(), results=results, pseudo_miou=pseudo_miou)

        if run.state:  # go on where the checkpoint was written
            begin, results, pseudo_miou = run.state["iteration"], run.state["results"], run.state["pseudo_miou"]
            student.load_state_dict(run.state["models"]["student"])
            teacher.load_state_dict(run.state["models"]["teacher"])
            if source:
                source.load_state_dict(run.state["models"][f"stage_{stage - 1}"])
            if branch:
                branch.load_state_dict(run.state["branch"])
            optimizer.load_state_dict(run.state["optimizer"])
            scaler.load_state_dict(run.state["scaler"])
            run.state = None
        else:
            save(0)

        # Algorithm 1, lines 5, 9: pseudo-masks of the stage before
        masks = run.folder / "pseudo_labels" / f"stage_{stage - 1}"
        if stage > 1:  # resumed: what is there is kept
            pseudo_miou = {**pseudo_miou, stage - 1: make_pseudo_masks(source, data, everything, unlabeled, stage - 1, run, args, device)}

        # Streams of the same name show the same views: once with the label, once with the pseudo-mask.
        sizes = [args.labeled_batch_size if stage > 1 else args.stage1_batch_size]
        streams = [common.Stream(data, labeled, f"labeled, stage {stage}", args)]
        if stage > 1:
            streams.append(common.Stream(data, everything, f"all, stage {stage}", args, labeled=branch is not None, pseudo_labels=masks if branch else None))
            sizes.append(args.batch_size)
        if branch:
            streams.append(common.Stream(data, labeled, f"labeled, stage {stage}", args, pseudo_labels=masks))
            sizes.append(args.labeled_batch_size)
        run.images = sum(sizes[:2])
        loaders = [common.batches(stream, args, device, begin, iterations, size) for stream, size in zip(streams, sizes)]

        for iteration, batch in enumerate(zip(*loaders), begin):
            # 1 batch: weak views; labeled pictures (Sub-batch 2), and from stage 2 on pictures from L and U together (Sub-batch 1)
            weak, label = batch[0]["image"], batch[0]["label"]  # (B_l, 3, H, W), (B_l, H, W)
            seen, n_labeled = weak, len(weak)  # what the student will see

            # 2 pseudo-labels: what the teacher says of the weak views, and the stage's pseudo-masks; both move with the pictures
            targets = []
            if stage > 1:
                weak, valid = torch.cat([weak, batch[1]["image"]]), torch.cat([batch[0]["valid"], batch[1]["valid"]])  # (B_l + B, ..)
                if args.consistency:
                    with torch.no_grad(), common.autocast(args, device):
                        logits = teacher(common.to_float(weak))
                    logits = logits.contiguous(memory_format=torch.channels_last)  # upsampling and max are faster with the classes side by side
                    teacher_label = common.upsample(logits, args.crop).max(1)[1]  # f_theta'(x), (B_l + B, H, W)
                    targets.append(teacher_label.masked_fill(~valid, IGNORE))
                if branch:
                    targets.append(torch.cat([batch[2]["label"], batch[1]["label"]]))  # y-hat, y-tilde
                if args.strong and targets:
                    labels = torch.stack([y[n_labeled:] for y in targets], 1).to(torch.uint8)  # (B, 1 or 2, H, W)
                    generators = [common.rng(args.seed, "strong", stage, place) for place in batch[1]["position"]]
                    strong, labels = strong_view(batch[1]["image"], labels, generators, args.cutout)  # A, B; identity for Sub-batch 2
                    targets = [torch.cat([y[:n_labeled], moved.long()]) for y, moved in zip(targets, labels.unbind(1))]
                    seen = torch.cat([weak[:n_labeled], strong])
                else:
                    seen = weak

            # 3 losses
            with common.autocast(args, device):
                outputs = learner(common.to_float(seen))
            outputs = [common.upsample(logits, args.crop) for logits in outputs]  # f(Ax) and g(Ax), (B_l + B, K, H, W)
            losses = {"loss_labeled": cross_entropy(outputs[0][:n_labeled], label)}  # Eq. 2
            if stage > 1 and args.consistency:
                losses["loss_consistency"] = cross_entropy(outputs[0], targets[0])  # Eq. 1
            if branch:
                losses["loss_pseudo"] = cross_entropy(outputs[1], targets[-1])  # Eq. 3
            loss = losses["loss_labeled"] + args.lambda1 * losses.get("loss_consistency", 0) + args.lambda2 * losses.get("loss_pseudo", 0)  # Eqs. 4, 5

            # 4 backward
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            common.average_buffers([learner])

            # 5 EMA
            update_teacher(teacher, student, decay_at(iteration / iterations, args.ema_decay) if args.ema else 0.)  # without EMA theta' = theta

            # 6 log, evaluate, save
            run.watch(stage, iteration, losses)
            run.watch_pseudo_labels(*[y[n_labeled:] for y in targets])
            done, last = iteration + 1, iteration + 1 == iterations
            if done % args.log_every == 0 or last:
                extra = {"lr": optimizer.param_groups[1]["lr"]}
                if branch:
                    known, all_pixels = common.all_reduce(torch.tensor([(targets[-1] != IGNORE).sum(), targets[-1].numel()], device=device)).tolist()
                    extra |= {"pseudo_miou": pseudo_miou[stage - 1], "pseudo_coverage": known / all_pixels}
                run.log(stage, done, **extra)
            if done % args.eval_every == 0 or last:
                tables = common.evaluate({"student": student, "teacher": teacher}, data, args, device)
                run.log(stage, done, val=tables)
                run.predictions(f"val_stage_{stage}_{done:06d}", {"student": student, "teacher": teacher})
                columns = {"labeled picture": batch[0]["image"][:4], "label": label[:4]}
                if stage > 1:
                    columns = {"picture of L or U": batch[1]["image"], "what the student sees": seen[n_labeled:]}
                    columns |= dict(zip(["teacher's label, moved"] * args.consistency + ["pseudo-mask, moved"] * (branch is not None), [y[n_labeled:] for y in targets]))
                run.panel(f"batch_stage_{stage}_{done:06d}", {title: cells[:4] for title, cells in columns.items()})
            if last:
                results = {**results, f"stage_{stage}": tables["teacher"], f"stage_{stage}_student": tables["student"]}
            if done % args.save_every == 0 or last:
                save(done)

        source = {"teacher": teacher, "student": student}[args.pseudo_masks_of]
        loaders = batch = None  # their processes end
    show_stages(teacher, data, unlabeled or labeled, stages, run, args, device)

    paper = None if set(args.changed) - {"weights"} or args.supervised else PAPER_MIOU.get((args.dataset, args.weights, args.labels))
    last = stages[-1][0]
    tables = {name: table for name, table in results.items() if not name.endswith("_student") and name != f"stage_{last}"}
    tables |= {"student": results[f"stage_{last}_student"], "teacher": results[f"stage_{last}"]}
    run.finish("teacher", tables, paper, pseudo_miou={f"stage_{stage}": x for stage, x in pseudo_miou.items()})


def show_stages(teacher, data, ids, stages, run, args, device):
    """Figs. 4 and 5, on training pictures: the pseudo-masks of each stage, and what the last network predicts."""
    folders = {stage: run.folder / "pseudo_labels" / f"stage_{stage}" for stage, _ in stages[:-1]}
    folders = {stage: folder for stage, folder in folders.items() if all(common.pseudo_label_path(folder, id).exists() for id in ids)}  # early ones may be deleted
    columns = {"unlabeled picture": [], "truth (not used)": []} | {f"pseudo-mask of stage {stage}": [] for stage in folders} | {f"prediction of stage {stages[-1][0]}": []}
    for id in ids[::max(1, len(ids) // 5)][:5] if common.is_main() else []:
        image = torch.from_numpy(data.image(id).transpose(2, 0, 1).copy())
        masks = [common.read_pseudo_label(folder, id) for folder in folders.values()]
        prediction = common.predict(teacher.eval(), image[None].to(device), args, image.shape[1:]).argmax(1)[0].cpu()
        for cells, array in zip(columns.values(), (image, torch.from_numpy(common.truth_for_the_log(data, id, image.shape[1:])), *map(torch.from_numpy, masks), prediction)):
            cells.append(array)
    run.panel("stages", columns)


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args, uneven=True)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device)
    common.check_range(args, 1, math.inf, "stages", "labeled_batch_size", "stage1_batch_size", "cutout")
    common.check_range(args, 1, math.inf, "iterations", "stage1_iterations")
    common.check_range(args, 0, math.inf, "lambda1", "lambda2", "backbone_lr_mult")
    common.check_range(args, 0, 1, "ema_decay")
    if args.network != "deeplabv2" or args.head != "plain":
        raise common.UserError(f"--network {args.network} --head {args.head}: the branches of this paper are those of DeepLabv2; use --network deeplabv2 --head plain")
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    first = args.iterations if args.stage1_iterations is None else args.stage1_iterations
    stages = [(1, first)] + [(stage, args.iterations) for stage in range(2, args.stages + 1)]
    if args.supervised:
        stages = [(1, sum(iterations for _, iterations in stages))]
    for stage, iterations in stages:
        what = "labels" if stage == 1 else "labels" + args.consistency * ", consistency" + args.pseudo_masks * f", pseudo-masks of stage {stage - 1}"
        common.say(f"stage {stage}   {iterations} iterations: {what}")
    train(args, stages, data, labeled, unlabeled, device)


if __name__ == "__main__":
    common.run_main(main)
