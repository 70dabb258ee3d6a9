"""GuidedMix-Net: Learning to Improve Pseudo Masks Using Labeled Images as Reference
Peng Tu, Yawen Huang, Rongrong Ji, Feng Zheng, Ling Shao. arXiv 2106.15064

A labeled picture guides an unlabeled one. Each unlabeled picture is blended with the labeled picture of the batch that is most similar to it, and the
network segments the blend, where it sees both at once. The labeled picture's prediction is subtracted from that of the blend (decoupled). What
remains is the pseudo-mask, the target for the network's direct prediction of the unlabeled picture. The same is done with two labeled pictures
(L_dec), so that the network learns to segment blends. The decoder (MITrans) lets each place use similar places anywhere in the blend.

    python guidedmix.py                                                                  drawn streets, a CPU, minutes
    torchrun --nproc_per_node=4 guidedmix.py --dataset vocaug --data-root DIR --labels 1/8

paper -> code
    Eqs. 1, 11  L_ce, L_sup                      cross_entropy(); train(), step 3: loss_sup
    Eq. 2   x_mix, lambda                        sample_lambda(), mix(); --lambda-cap (Tables 1, 6, 8)
    Eq. 3   similar pairs                        distances(), nearest(); --pairs (Table 2)
    L_cla   classifier                           classes_present(); --classifier
    Eqs. 4, 5, Fig. 4  MITrans                   NonLocal, MITrans, GuidedMixNet; --no-mitrans (Table 2)
    Eqs. 6-8  decoupling                         decouple(); --decoupling (Table 2)
    Eq. 9   L, omega                             ramp_up(); train(), step 3: loss
    Eqs. 10, 12  L_usup, L_dec                   mask_error()
    Table 4: --labels; Table 10: --crop 512 512, and --scales .5 .75 1 1.25 1.5 1.75 --flip

Choices that the paper leaves open, and why (its public repository holds another method)
    Batch size 12 is 12 labeled and 12 unlabeled pictures, in one pass. Blends need their partners first, so they take passes of their own.
    Batch norm is trained and synchronised. Blends are normalised by their own batch; the running statistics, which evaluation uses, are of whole
        pictures alone, since blends have less contrast.                                                 --batch-norm
    Eq. 3 compares "pooled features": means over all places of what the encoder gives, after its PSP module. Taken literally, it compares place by
        place: --distance places.
    Partners come from all labeled pictures of the batch, also those of other processes; one may serve several pictures. (Sect. 3.1.1 looks for a labeled
        picture for each unlabeled one; Sect. 4.3.1 says the reverse.)
    On Cityscapes pairs are random, and there is no classifier (Sect. 4.4). Random pairs on VOC (Table 2) keep it.  --pairs, --classifier
    lambda: one a batch, from Beta(1, 1), folded to at most .5 and drawn again until it is below the cap.      --alpha
    The classifier has one output for each class but background, learned from the classes present in a crop, each by itself (binary cross entropy).
    Logits are decoupled and their softmax compared, at stride 2 and inside the picture only. At full size one mask of 8 crops of 480 with 60 classes
        would take 442 MB.                                                                               --masks
    The pseudo-mask is a target: no gradient goes into it; in L_dec gradient goes into the blend's prediction alone. On streets and camvid-cpu it flows
        into both sides: there, with networks from scratch, fixed targets brought nothing.                --stop-gradient
    Eq. 12 is hard, M_mix - M_l, also where soft decoupling is used. So L_dec teaches M_mix = M_l + M_l^, while Eq. 8 assumes M_mix = lambda M_l + M_u. On
        streets and camvid-cpu it is soft.                                                               --labeled-decoupling
    omega = w exp(-5 (1 - t)^2) with t from 0 to 1 in 10 % of the iterations. w = 1.5, and .5 on Context: CCT, in whose line this paper stands, has 30
        on the mean over the classes, Eq. 10 has the sum, and VOC has 21 classes, Context 60.              --omega, --ramp
    "First trained on the labeled samples" (Sect. 3.2): 5 % of the iterations, then omega begins to rise.        --warmup
    MITrans: softmax over the places looked at ("over the channel dimension" in the text), scores without a scale, a 1x1 conv to four times the width before
        PixelShuffle, two 3x3 convs after the skip. Skips are layer1 and the stem. Encoder to logits with ResNet-50, 21 classes and the classifier:
        50,048,233 parameters (ResNet-101: 69,040,361).
    Rotation by up to 10 degrees, about the crop's middle; beyond the picture the mean colour, and label 255.  --rotation
    Cityscapes stays at 1024x2048: a crop of 513 does not fit into half of that.
    500 and 1000 labels (Table 4) are drawn from all 10,582; the paper's may be of the 1464, as CCT's are: --split FILE brings a list.
    The baseline (--supervised) is L_ce alone: the same network, views, learning rate and number of steps.
"""

import argparse
import contextlib
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

import common
from common import IGNORE

# ---- arguments -------------------------------------------------------------------------------------------------------

# Per dataset and labels, by the argument's name: Sects. 4.1 and 4.2.
PAPER = {
    "vocaug": dict(
        labels="1/8", size=None, crop=(321, 321), scale=(.5, 2.), rotation=10., batch_size=12, network="guidedmix", head="plain", backbone="resnet101",
        weights="imagenet", batch_norm="sync", optimizer="sgd", lr=1e-3, weight_decay=1e-4, iterations=40_000, lambda_cap=.5, pairs="similar", classifier=True,
        labeled_decoupling="hard", stop_gradient=True, omega=1.5, warmup=.05, workers=4, log_every=50, eval_every=5000, save_every=1000),
    # Drawn scenes and a small network from scratch, minutes on a CPU; why these values, README.md tells.
    "streets": dict(
        labels="8", size=(64, 128), crop=(64, 64), scale=(.75, 1.5), rotation=0., batch_size=4, network="guidedmix", head="plain", backbone="tiny",
        weights="none", batch_norm="frozen", optimizer="adamw", lr=3e-3, weight_decay=1e-2, iterations=3000, lambda_cap=.5, pairs="similar", classifier=False,
        labeled_decoupling="soft", stop_gradient=False, omega=1.5, warmup=.2, workers=0, log_every=50, eval_every=1000, save_every=100),
}
PAPER["voc"] = PAPER["vocaug"]
for n in (500, 1000, 1464):  # Tables 1 to 4
    PAPER[f"vocaug/{n}"] = PAPER["vocaug"] | dict(labels=str(n), backbone="resnet50")
PAPER["cityscapes"] = PAPER["vocaug"] | dict(size=(1024, 2048), crop=(513, 513), batch_size=8, lambda_cap=.3, pairs="random", classifier=False)
PAPER["context"] = PAPER["vocaug"] | dict(crop=(480, 480), batch_size=8, lambda_cap=.4, omega=.5)
PAPER["camvid-cpu"] = PAPER["streets"] | dict(labels="1/8", size=(180, 240), crop=(96, 128), lr=2e-3, iterations=4000, eval_every=1000)
PAPER["camvid-gpu"] = PAPER["cityscapes"] | dict(size=(360, 480), crop=(257, 353), iterations=20_000, eval_every=2000)
# Pictures of one's own: at most so large, square crops at changing scale; all of images/ is labeled.
PAPER["folder-cpu"] = PAPER["camvid-cpu"] | dict(labels="1/1", size=(256,), crop=(129, 129), scale=(.75, 1.5))
PAPER["folder-gpu"] = PAPER["camvid-gpu"] | dict(labels="1/1", size=(640,), crop=(321, 321), scale=(.5, 1.5), iterations=10_000)

# The paper's mIoU, and the setting that it belongs to.
VOC50, VOC101 = dict(dataset="vocaug", backbone="resnet50"), dict(dataset="vocaug", backbone="resnet101")
CITY101, CONTEXT101 = dict(dataset="cityscapes", backbone="resnet101"), dict(dataset="context", backbone="resnet101")
MULTI_SCALE = dict(scales=[.5, .75, 1., 1.25, 1.5, 1.75], flip=True)
PAPER_MIOU = [
    *((miou, VOC50 | dict(labels=1464, lambda_cap=cap)) for cap, miou in ((.1, 67.9), (.2, 69.5), (.3, 70.7), (.4, 71.4), (.5, 73.7))),  # Table 1
    (71.9, VOC50 | dict(labels=1464, pairs="random")), (72.7, VOC50 | dict(labels=1464, mitrans=False)),  # Table 2
    (71.4, VOC50 | dict(labels=1464, decoupling="hard")),
    *((miou, VOC50 | dict(labels=n)) for n, miou in ((500, 65.4), (1000, 68.1))),  # Table 4
    *((miou, VOC101 | dict(labels=n)) for n, miou in ((1323, 73.4), (2646, 75.5), (5291, 76.5))),  # Table 5
    *((miou, CITY101 | dict(labels=372, lambda_cap=cap)) for cap, miou in ((.1, 64.3), (.2, 64.0), (.3, 65.8), (.4, 65.5), (.5, 65.7))),  # Table 6
    *((miou, CITY101 | dict(labels=n)) for n, miou in ((100, 56.9), (744, 67.5), (1488, 69.8))),  # Table 7
    *((miou, CONTEXT101 | dict(labels=n, lambda_cap=cap)) for n in (625, 624)  # Table 8; 1/8 of 4998, and of the public lists' 4996
      for cap, miou in ((.1, 37.6), (.2, 39.4), (.3, 39.8), (.4, 40.3), (.5, 40.1))),
    *((41.7, CONTEXT101 | dict(labels=n)) for n in (1250, 1249)),  # Table 9
    *((miou, VOC101 | dict(labels=n, crop=[512, 512]) | more) for n, one, many in ((1323, 75.2, 76.4), (2646, 76.5, 77.8), (5291, 77.1, 78.2))  # Table 10
      for miou, more in ((one, {}), (many, MULTI_SCALE)))]


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     epilog="Arguments not given take the dataset's value in the table PAPER at the top of guidedmix.py; a run writes all values to args.json.")
    a = parser.add_argument_group("GuidedMix-Net").add_argument
    a("--lambda-cap", type=float, metavar="X", help="upper limit of the labeled picture's part in a blend, above 0 and at most .5 (Tables 1, 6, 8)")
    a("--alpha", type=float, metavar="X", default=1., help="that part is drawn from Beta(X, X) (Sect. 3.1; default: %(default)s)")
    a("--pairs", choices=["similar", "random"], help="the labeled picture that an unlabeled one is blended with (Sect. 3.1.1; Table 2)")
    a("--distance", choices=["pooled", "places"], default="pooled", help="what similar means: by the mean over all places, or place by place (Eq. 3)")
    a("--classifier", action=argparse.BooleanOptionalAction, help="image-level classifier on the encoder's features (L_cla; Sect. 4.4)")
    a("--mitrans", action=argparse.BooleanOptionalAction, default=True, help="the non-local block of each MITrans step (Eq. 5; Table 2)")
    a("--decoupling", choices=["soft", "hard"], default="soft",
      help="pseudo-mask = M_mix - lambda M_l (soft, Eq. 8), or M_mix - M_l (hard, Eq. 7; Table 2)")
    a("--labeled-decoupling", choices=["soft", "hard"], help="the same, within L_dec (hard in Eq. 12)")
    a("--masks", choices=["softmax", "logits", "probabilities"], default="softmax",
      help="softmax: decouple logits, compare their softmax; logits: decouple and compare logits; probabilities: decouple and compare these (default: softmax)")
    a("--stop-gradient", action=argparse.BooleanOptionalAction,
      help="no gradient into the pseudo-mask (L_usup), nor into the two pictures' own predictions in L_dec")
    a("--omega", type=float, metavar="X", help="weight of L_usup after its ramp-up (Eq. 9); 0 leaves it out")
    a("--dec-weight", type=float, metavar="X", default=1., help="weight of L_dec (Eq. 11; default: %(default)s); 0 leaves it out")
    a("--warmup", type=float, metavar="X", help="share of the iterations on L_ce and L_cla alone, at the start")
    a("--ramp", type=float, metavar="X", default=.1, help="share of the iterations, after those, in which omega rises (default: %(default)s)")
    a("--rotation", type=float, metavar="X", help="pictures are turned by up to so many degrees")
    common.add_arguments(parser, ["guidedmix"])
    return parser


# ---- network ---------------------------------------------------------------------------------------------------------

class NonLocal(nn.Module):
    """Every place takes up what the places like it hold: v (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels, channels // 2, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, v):
        B, C, h, w = v.shape
        # The library's fused attention never holds the hw x hw map, but wants values as wide as queries: their two halves share the map as two heads.
        query, key = (conv(v).flatten(2).transpose(1, 2).contiguous()[:, None].expand(-1, 2, -1, -1) for conv in (self.query, self.key))  # (B, 2, hw, C/2)
        value = self.value(v).view(B, 2, C // 2, h * w).transpose(2, 3).contiguous()
        return v + F.scaled_dot_product_attention(query, key, value, scale=1.).transpose(2, 3).reshape(B, C, h, w)  # Eq. 5


class MITrans(nn.Module):
    """A step of the decoder (Fig. 4): v (B, C, h, w), skip (B, S, about 2h, about 2w) -> (B, width, the skip's size)."""

    def __init__(self, channels, skip, width, norm, non_local=True):
        super().__init__()
        self.non_local = NonLocal(channels) if non_local else nn.Identity()
        self.shuffle = nn.Sequential(nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2))
        self.fuse = nn.Sequential(nn.Conv2d(width + skip, width, 3, padding=1, bias=False), norm(width), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU())

    def forward(self, v, skip):
        h, w = skip.shape[2:]
        v = self.shuffle(self.non_local(v))[:, :, :h, :w]  # 41 -> 82, of which a skip of 81 shows the first: strided convs begin at the corner
        return self.fuse(torch.cat([v, skip], 1))


class GuidedMixNet(common.SegmentationNetwork):
    """Fig. 2: a ResNet with a PSP module, and a decoder of two MITrans steps with skips from layer1 and the stem. Logits at stride 2.

    present: outputs of the image-level classifier, 0 for none. Crops of 8 n + 1 pixels (321, 513) have corners on corners, hence align_corners
    (which upsample() takes for such sizes alone)."""

    align_corners = True

    def __init__(self, backbone, classes, present, width=512, style="torchvision", norm=nn.BatchNorm2d, non_local=True):
        super().__init__(backbone, style)
        self.feature_channels, self.stride = width // 4, 2
        self.psp = common.PyramidPooling(backbone.channels, width, norm)
        self.step1 = MITrans(width, backbone.channels // 8, width // 2, norm, non_local)
        self.step2 = MITrans(width // 2, backbone.stem or 64, width // 4, norm, non_local)
        self.last = nn.Conv2d(width // 4, classes, 1)
        self.presence = nn.Linear(width, present) if present else None

    def encode(self, image):
        """(B, 3, H, W) float RGB in [0, 1] -> (B, 512, H/8, W/8), and the skips: layer1 (B, 256, H/4, W/4), stem (B, 64, H/2, W/2)."""
        net = self.backbone
        stem = net.relu(net.bn1(net.conv1(self.normalize(image))))
        layer1 = net.layer1(net.maxpool(stem))
        return self.psp(net.layer4(net.layer3(net.layer2(layer1)))), layer1, stem  # Eq. 4: v_j, and the v_(j-1) of both steps

    def decode(self, v, layer1, stem):
        """-> (B, 128, H/2, W/2)."""
        return self.step2(self.step1(v, layer1), stem)

    def features(self, image):
        return self.decode(*self.encode(image))

    def classifier(self, features):
        return self.last(features)


def make_network(spec):
    """The network of a description, as in common.make_network()."""
    if spec["network"] != "guidedmix":
        raise common.UserError(f"this checkpoint's network is {spec['network']}; use the script that trained it")
    tiny = spec["backbone"] == "tiny"
    backbone = common.make_backbone(spec["backbone"], spec["batch_norm"], common.STYLES[spec["style"]]["caffe"], spec["deep_stem"])
    if tiny:
        backbone.maxpool = nn.MaxPool2d(3, 2, 1)  # stride 8 here too
    return GuidedMixNet(backbone, spec["classes"], spec["present"], 64 if tiny else 512, spec["style"], common.group_norm if tiny else nn.BatchNorm2d, spec["mitrans"])


@contextlib.contextmanager
def keep_statistics(network):
    """Batch norm goes on normalising by its batch, but the running statistics stay."""
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


class WithEncoder(nn.Module):
    """The network as it trains: images (B, 3, H, W) float -> logits (B, K, h, w), what the encoder gives (B, C, h', w'), logits of the classes present or None."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        v, *skips = self.network.encode(image)
        present = self.network.presence(v.mean((2, 3))) if self.network.presence else None
        return self.network.classifier(self.network.decode(v, *skips)), v, present


# ---- perturbations ---------------------------------------------------------------------------------------------------

def rotate(image, label, top, left, crop, generator, degrees):
    """The crop, turned about its middle by up to so many degrees: a cut for weak views, see common.weak_view()."""
    angle, (h, w) = generator.uniform(-degrees, degrees), crop
    margin, color = math.ceil((math.hypot(h, w) - min(h, w)) / 2), list(map(float, common.MEAN_COLOR))  # a window that holds the crop at any angle
    image, label, valid = (V.crop(x, top - margin, left - margin, h + 2 * margin, w + 2 * margin) for x in (image, label[None], torch.ones_like(label)[None]))
    image = image.where(valid > 0, torch.tensor(color, dtype=torch.uint8)[:, None, None])
    image = V.rotate(image, angle, InterpolationMode.BILINEAR, fill=color)
    label, valid = V.rotate(label, angle, InterpolationMode.NEAREST), V.rotate(valid, angle, InterpolationMode.NEAREST)
    image, label, valid = (V.center_crop(x, [h, w]) for x in (image, label, valid))
    return image, label[0], valid[0] > 0


def sample_lambda(alpha, cap, generator):
    """The labeled picture's part: Beta(alpha, alpha), folded to at most .5, drawn again until it is below the cap (Sect. 3.1)."""
    for _ in range(100):
        x = generator.beta(alpha, alpha, 1000)
        x = x[(x < cap) | (1 - x < cap)]
        if len(x):
            return float(min(x[0], 1 - x[0]))
    raise common.UserError(f"--alpha {alpha} --lambda-cap {cap}: of 100,000 draws none was below the cap; use a smaller --alpha or a larger --lambda-cap")


def mix(guide, picture, lam):
    """x_mix of two batches (B, 3, H, W) float."""
    return lam * guide + (1 - lam) * picture  # Eq. 2


def describe(v, places=False):
    """What pictures are compared by: the encoder's features (B, C, h, w), mean over all places or each place -> (B, C or C h w), without gradient."""
    return v.detach().float().flatten(1) if places else v.detach().float().mean((2, 3))


def distances(a, b):
    """Euclidean: (A, D), (B, D) -> (A, B)."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # Eq. 3; the fast mode cancels where pictures are alike


def nearest(distance, own=None):
    """For each row of (A, B) the nearest column (A,). own: row i may not choose column own + i, which is the picture itself."""
    if own is not None:
        distance = distance.clone()
        distance[:, own:own + len(distance)].fill_diagonal_(math.inf)
    return distance.argmin(1)


class Gather(torch.autograd.Function):
    """x of all processes, along the first axis. What each process's loss sends back to a part goes to the process that it came from."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(common.world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return common.all_reduce(gradient.contiguous()).chunk(common.world_size())[common.rank()]


def gather(x):
    """Gather, or x itself where there is one process."""
    return x if common.world_size() == 1 else Gather.apply(x)


# ---- EMA -------------------------------------------------------------------------------------------------------------
# None: the network teaches itself.


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------

def decouple(mixed, guide, lam, how="soft"):
    """What the blend's prediction M_mix holds of the other picture, of any shape."""
    if how == "hard":
        return mixed - guide  # Eq. 7
    return mixed - lam * guide  # Eq. 8


# ---- losses ----------------------------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    """L_ce (Eq. 1): mean over the valid pixels of all processes of logits (B, K, H, W), label (B, H, W) with 255 -> 0-dim; 0 if nothing is valid.

    Each process returns its share times their number, since gradients are averaged over processes."""
    count = common.all_reduce((label != IGNORE).sum())
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") * common.world_size() / count.clamp(min=1)  # Eq. 1


def mask_error(a, b, valid):
    """(a - b)^2, summed over the classes, mean over the valid pixels of all processes: (B, K, h, w), valid (B, h, w) bool -> 0-dim."""
    count = common.all_reduce(valid.sum())
    return ((a - b).square() * valid[:, None]).sum() * common.world_size() / count.clamp(min=1)  # Eqs. 10, 12


def classes_present(label, classes, background):
    """Multi-hot targets of the classifier: label (B, H, W) with 255 -> (B, K) float, without the first column where that is background."""
    return torch.zeros(len(label), 256, device=label.device).scatter_(1, label.flatten(1), 1.)[:, int(background):classes]


def ramp_up(t):
    """exp(-5 (1 - t)^2), from .007 at t = 0 to 1 at t = 1 and after (Laine and Aila, reference 44)."""
    return math.exp(-5 * (1 - min(t, 1.)) ** 2)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args, data, labeled, unlabeled, device):
    K, background = len(data.names), data.names[0] == "background"
    guided, classify = not args.supervised, bool(args.classifier and not args.supervised)
    student = common.build_network(args, data, device, make=make_network, mitrans=args.mitrans, present=(K - background) * classify)
    learner, networks = common.parallel(WithEncoder(student), device), {"student": student}
    optimizer = common.make_optimizer(args, args.lr, student.parameters())
    scaler, begin, tables = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"), 0, None
    warmup = round(args.warmup * args.iterations)
    run = common.OldRun("guidedmix-supervised" if args.supervised else "guidedmix", args, data, labeled, unlabeled, device, {1: args.iterations})

    def save(iteration):
        run.save("student", networks, stage=1, iteration=iteration, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    if run.state:  # go on where the checkpoint was written
        begin = run.state["iteration"]
        student.load_state_dict(run.state["models"]["student"])
        optimizer.load_state_dict(run.state["optimizer"])
        scaler.load_state_dict(run.state["scaler"])
        run.state = None
    else:
        save(0)

    cut = partial(rotate, degrees=args.rotation) if args.rotation else None
    streams = [common.Stream(data, labeled, "labeled", args, cut=cut)]
    if guided:
        streams.append(common.Stream(data, unlabeled, "unlabeled", args, labeled=False, cut=cut))
    loaders = [common.batches(stream, args, device, begin, args.iterations) for stream in streams]
    tables_of_masks = torch.zeros(2, K, K, dtype=torch.int64, device=device)  # decoupled, direct
    as_mask = nn.Softmax(1) if args.masks == "probabilities" else nn.Identity()  # what is decoupled, of logits
    as_compared = nn.Softmax(1) if args.masks == "softmax" else nn.Identity()  # what is compared, of masks

    student.train()  # evaluate() and predictions() leave it so
    for iteration, batch in enumerate(zip(*loaders), begin):
        # 1 batch: labeled and unlabeled pictures, what the network says of them, and who is blended with whom
        image, label = batch[0]["image"], batch[0]["label"]  # (B, 3, H, W), (B, H, W)
        B, semi = len(image), guided and iteration >= warmup
        with_usup, with_dec = semi and args.omega > 0, semi and args.dec_weight > 0
        x_l, x_u = common.to_float(image), common.to_float(batch[1]["image"]) if with_usup else None
        n, own = B * common.world_size(), B * common.rank()  # labeled pictures of all processes; where those of this one begin among them
        if args.pairs == "random":  # indices among the n: a partner of each x_u, and of each x_l, where it is another picture
            if with_usup:
                partner = torch.tensor([common.rng(args.seed, "pair", place).randint(n) for place in batch[1]["position"]]).to(device, non_blocking=True)
            if with_dec:
                partner_l = torch.tensor([(own + i + common.rng(args.seed, "pair labeled", place).randint(1, n)) % n
                                          for i, place in enumerate(batch[0]["position"])]).to(device, non_blocking=True)
        with common.autocast(args, device):
            logits, v, present = learner(torch.cat([x_l, x_u]) if with_usup else x_l)  # (2B, K, h, w), (2B, C, h', w'), (2B, K')
        masks, size = as_mask(logits.float()), logits.shape[2:]
        m_l, m_u = masks[:B], masks[B:]  # M_l, M_u
        if with_usup or with_dec:
            guides, guide_masks, guide_valid = gather(image), gather(m_l.detach() if args.stop_gradient else m_l), gather(batch[0]["valid"])  # (n, ..)
            if args.pairs == "similar":
                description = describe(v, args.distance == "places")
                distance = distances(description, gather(description[:B]))  # (2B, n)
                partner, partner_l = nearest(distance[B:]), nearest(distance[:B], own)

        # 2 pseudo-labels: the masks of unlabeled pictures, decoupled from blends with their partners
        if with_usup:
            lam = sample_lambda(args.alpha, args.lambda_cap, common.rng(args.seed, "lambda", iteration))
            x_mix = mix(common.to_float(guides[partner]), x_u, lam)
            with torch.set_grad_enabled(not args.stop_gradient), keep_statistics(student), common.autocast(args, device):
                m_mix = as_mask(learner(x_mix)[0].float())  # Eq. 6: M_mix, which should be M_l + M_u, (B, K, h, w)
            m_dec = decouple(m_mix, guide_masks[partner], lam, args.decoupling)  # M_u-dec

        # 3 losses
        losses = {"loss_labeled": cross_entropy(common.upsample(logits[:B], args.crop, student.align_corners), label)}  # L_ce
        loss_sup = losses["loss_labeled"]
        if classify:
            losses["loss_cla"] = F.binary_cross_entropy_with_logits(present[:B].float(), classes_present(label, K, background))
            loss_sup = loss_sup + losses["loss_cla"]
        if with_dec:  # blend x_l, in the part lambda, with its partner; subtract M_l, compare with the partner's mask
            lam_l = sample_lambda(args.alpha, args.lambda_cap, common.rng(args.seed, "lambda labeled", iteration))
            with keep_statistics(student), common.autocast(args, device):
                m_mix_l = as_mask(learner(mix(x_l, common.to_float(guides[partner_l]), lam_l))[0].float())
            m_dec_l = decouple(m_mix_l, guide_masks[own:own + B], lam_l, args.labeled_decoupling)
            losses["loss_dec"] = mask_error(as_compared(m_dec_l), as_compared(guide_masks[partner_l]), at_size(guide_valid[partner_l], size))  # Eq. 12
            loss_sup = loss_sup + args.dec_weight * losses["loss_dec"]  # Eq. 11: L_ce + L_dec + L_cla
        loss = loss_sup
        if with_usup:
            omega = args.omega * ramp_up((iteration - warmup) / max(1, args.ramp * args.iterations))
            losses["loss_usup"] = mask_error(as_compared(m_dec), as_compared(m_u), at_size(batch[1]["valid"], size))  # Eq. 10
            loss = loss_sup + omega * losses["loss_usup"]  # Eq. 9

        # 4 backward
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - iteration / args.iterations) ** .9
        scaler.step(optimizer)
        scaler.update()
        common.average_buffers([student])

        # 5 EMA: none

        # 6 log, evaluate, save
        run.watch(1, iteration, losses)
        done, last = iteration + 1, iteration + 1 == args.iterations
        if with_usup:  # the truth of unlabeled pictures is used here and in pictures, and nowhere else
            truth = at_size(batch[1]["truth"], size)
            pseudo_label, direct = (m.detach().max(1).indices for m in (m_dec, m_u))
            run.watch_pseudo_labels(pseudo_label)
            for table, y in zip(tables_of_masks, (pseudo_label, direct)):
                table += common.confusion_matrix(truth, y, K)
        if done % args.log_every == 0 or done in (warmup, args.iterations) or done % args.eval_every == 0:
            extra = {"lr": optimizer.param_groups[0]["lr"]} | ({"omega": omega, "lambda": lam} if with_usup else {})
            if with_usup:
                common.all_reduce(tables_of_masks)
                extra |= {"pseudo_miou": common.mean_iou(tables_of_masks[0]), "direct_miou": common.mean_iou(tables_of_masks[1])}
                tables_of_masks.zero_()
            run.images, run.phase = args.batch_size * (1 + with_usup), "warm-up" if guided and not semi else None
            run.log(1, done, **extra)
        if done % args.eval_every == 0 or last:
            tables = common.evaluate(networks, data, args, device)
            run.log(1, done, val=tables)
            run.predictions(f"val_{done:06d}", networks)
            columns = {"labeled picture": image, "label": label, "prediction": in_full(m_l, args.crop)}
            if with_usup:
                outside = ~batch[1]["valid"]
                columns = {"labeled partner": guides[partner], "its prediction": in_full(guide_masks[partner], args.crop), "unlabeled picture": batch[1]["image"],
                           f"mix, lambda {lam:.2f}": (255 * x_mix.detach()).round().to(torch.uint8)}
                columns |= {title: in_full(m, args.crop).masked_fill(outside, IGNORE) for title, m in (
                    ("prediction of the mix", m_mix), ("decoupled pseudo-mask", m_dec), ("direct prediction", m_u))} | {"truth (not used)": batch[1]["truth"]}
            run.panel(f"batch_{done:06d}", {title: cells[:4] for title, cells in columns.items()})
        if done % args.save_every == 0 or last:
            save(done)

    run.finish("student", tables or common.evaluate(networks, data, args, device), None if args.supervised else paper_miou(args))


def at_size(x, size):
    """Labels or masks (B, H, W) at another size, nearest."""
    return F.interpolate(x[:, None].float(), size, mode="nearest-exact")[:, 0].to(x.dtype)


def in_full(masks, size):
    """The most likely class of masks (B, K, h, w), at the crop's size: (B, H, W)."""
    return at_size(masks.detach().max(1).indices, size)


def paper_miou(args):
    """The paper's number for this setting, or None."""
    for miou, setting in PAPER_MIOU:
        if set(args.changed) <= setting.keys() | {"split"} and all(getattr(args, name) == value for name, value in setting.items()):
            return miou


def main():
    args = common.parse_args(get_parser(), PAPER)
    device = common.setup(args)
    if args.check_data:
        return common.check_data(args)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, device, make_network)
    common.check_range(args, 1e-12, .5, "lambda_cap")
    common.check_range(args, 1e-12, math.inf, "alpha")
    common.check_range(args, 0, math.inf, "omega", "dec_weight")
    common.check_range(args, 0, 1, "ramp")
    if not 0 <= args.warmup < 1 or (round(args.warmup * args.iterations) >= args.iterations > 0 and not args.supervised):
        raise common.UserError(f"--warmup {args.warmup:g}: a share of the {args.iterations} iterations, from 0 to below 1, that leaves some for the method; use .2, say")
    common.check_range(args, 0, 180, "rotation")
    if args.head != "plain" or args.aspp_branches != 4:
        raise common.UserError(f"--head {args.head} --aspp-branches {args.aspp_branches}: are for DeepLab, and this paper has a network of its own; leave them out")
    sample_lambda(args.alpha, args.lambda_cap, common.rng(args.seed, "check"))  # that there is one
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    if args.dec_weight and not args.supervised:
        for flag, number in (("--labels", len(labeled)), ("--batch-size", args.batch_size)):
            if number < 2:
                raise common.UserError(f"{flag} {number}: L_dec blends two labeled pictures of a batch; use {flag} 2 or more, or --dec-weight 0")
        if len(labeled) < args.batch_size:
            common.warn(f"{len(labeled)} labeled pictures, --batch-size {args.batch_size}: L_dec blends some of them with another view of themselves")
    if not (args.omega or args.dec_weight or args.supervised):
        common.warn("--omega 0 --dec-weight 0: without L_usup and L_dec this is no more than a baseline")
    train(args, data, labeled, unlabeled, device)


if __name__ == "__main__":
    common.run_main(main)
