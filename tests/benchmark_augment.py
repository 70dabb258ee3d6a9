"""What does strong augmentation of three_stage.py cost, and what would it cost with PIL?

Times RandAugment and Cutout of a 256 x 512 crop with its two label maps (teacher's label,
pseudo-mask) in three ways, in turn: three_stage.strong_view(); PIL, which moves picture and label
maps by every operation; and PIL as the authors' code uses it, which moves the picture, a map of
rows, a map of columns and one of validity, and gathers the label maps with them afterwards. All
three have the same operations at the same levels.

    python tests/benchmark_augment.py [--height 256] [--width 512] [--samples 200]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

import common
import three_stage

PIL_PHOTOMETRIC = {
    "Identity": lambda image, v: image,
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Solarize": lambda image, v: ImageOps.solarize(image, 256 - 25.6 * v),
    "Posterize": lambda image, v: ImageOps.posterize(image, 4 - int(0.4 * v)),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(0.18 * v + 0.1),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(0.18 * v + 0.1),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(0.18 * v + 0.1),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(0.18 * v + 0.1),
}
GREY = (three_stage.GREY,) * 3


def pil_view(image, labels, rng, side, by_index):
    """The same draws as strong_view(), for one picture (3, H, W) and its labels (L, H, W).

    Both are uint8 tensors on the CPU. by_index: move index maps instead of each label map.
    """
    height, width = image.shape[1:]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if by_index:
        rows, columns = np.mgrid[:height, :width].astype(np.int32)
        valid = np.ones((height, width), np.uint8)
        maps = [Image.fromarray(array) for array in (rows, columns, valid)]
        fill = 0
    else:
        maps = [Image.fromarray(label.numpy()) for label in labels]
        fill = common.IGNORE

    def move(picture, matrix, fill):
        nearest = Image.Resampling.NEAREST
        return picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, nearest, fillcolor=fill
        )

    for _ in range(3):
        operation = rng.randint(14)
        apply = rng.uniform() < 0.5
        level = rng.randint(1, 10)
        sign = (-1, 1)[rng.randint(2)]
        if not apply:
            continue
        if operation < 9:
            picture = list(PIL_PHOTOMETRIC.values())[operation](picture, level)
        else:
            geometric = list(three_stage.GEOMETRIC.values())[operation - 9]
            matrix = geometric(sign * level, height, width)
            matrix = matrix[:2].flatten().tolist()
            picture = move(picture, matrix, GREY)
            maps = [move(label_map, matrix, fill) for label_map in maps]

    image = np.array(picture)
    for _ in range(3):
        top = rng.randint(height) - side // 2
        left = rng.randint(width) - side // 2
        rows = slice(max(top, 0), max(top + side, 0))
        columns = slice(max(left, 0), max(left + side, 0))
        image[rows, columns] = GREY

    if by_index:
        rows, columns, valid = (np.asarray(index_map) for index_map in maps)
        moved = []
        for label in labels.numpy():
            label = label[rows, columns]
            label[valid == 0] = common.IGNORE
            moved.append(label)
    else:
        moved = [np.array(label_map) for label_map in maps]
    image = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return image, torch.from_numpy(np.stack(moved))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    size = args.height, args.width
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = torch.rand(1, 3, 16, 32)
    noise = torch.nn.functional.interpolate(noise, size, mode="bilinear")[0]
    image = (255 * noise).to(torch.uint8)
    labels = torch.randint(0, 19, (2, *size), dtype=torch.uint8)
    images_on_device = image[None].to(device)
    labels_on_device = labels[None].to(device)

    def with_torch(rng):
        inside = [(0, args.height, 0, args.width)]  # no padding
        three_stage.strong_view(images_on_device, labels_on_device, inside, [rng], 32)
        if device.type == "cuda":
            torch.cuda.synchronize()

    views = {
        "torch": with_torch,
        "PIL, label maps": lambda rng: pil_view(image, labels, rng, 32, by_index=False),
        "PIL, index maps": lambda rng: pil_view(image, labels, rng, 32, by_index=True),
    }
    times = {name: [] for name in views}
    for i in range(args.samples):
        for name, view in views.items():
            rng = common.rng("benchmark", i)
            start = time.perf_counter()
            view(rng)
            times[name].append(time.perf_counter() - start)
    means = {name: 1000 * statistics.mean(values[10:]) for name, values in times.items()}
    milliseconds = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    ratios = [f"{mean / means['torch']:.2f}" for name, mean in means.items() if name != "torch"]
    print(
        f"{args.height}x{args.width} on {common.device_name(device)}, milliseconds a sample: "
        f"{milliseconds}; PIL over torch: {', '.join(ratios)}"
    )


if __name__ == "__main__":
    main()
