"""What does strong augmentation of three_stage.py cost, and what would it cost with PIL?

Times, in turn, RandAugment and Cutout of a 256 x 512 crop with its two label maps (teacher's label, pseudo-mask): three_stage.strong_view; PIL moving
picture and label maps by every operation; and PIL as the authors' code uses it, moving the picture, a map of rows, a map of columns
and one of validity, with which the label maps are gathered afterwards. All with the same operations at the same levels.

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


def pil_view(image, labels, r, side, by_index):
    """The same draws as strong_view(), for one picture (3, H, W) and its labels (L, H, W), both tensors on the CPU."""
    height, width = image.shape[1:]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if by_index:
        rows, columns = np.mgrid[:height, :width].astype(np.int32)
        maps = [
            (Image.fromarray(rows), 0),
            (Image.fromarray(columns), 0),
            (Image.fromarray(np.ones((height, width), np.uint8)), 0),
        ]
    else:
        maps = [(Image.fromarray(label.numpy()), common.IGNORE) for label in labels]
    for _ in range(3):
        i, apply, level, sign = (
            r.randint(14),
            r.uniform() < 0.5,
            r.randint(1, 10),
            (-1, 1)[r.randint(2)],
        )
        if not apply:
            continue
        if i < 9:
            picture = list(PIL_PHOTOMETRIC.values())[i](picture, level)
        else:
            matrix = list(three_stage.GEOMETRIC.values())[i - 9](sign * level, height, width)
            picture = picture.transform(
                picture.size,
                Image.Transform.AFFINE,
                matrix,
                Image.Resampling.NEAREST,
                fillcolor=GREY,
            )
            maps = [
                (
                    m.transform(
                        picture.size,
                        Image.Transform.AFFINE,
                        matrix,
                        Image.Resampling.NEAREST,
                        fillcolor=fill,
                    ),
                    fill,
                )
                for m, fill in maps
            ]
    image = np.array(picture)
    for _ in range(3):
        top, left = r.randint(height) - side // 2, r.randint(width) - side // 2
        image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = GREY
    if by_index:
        rows, columns, valid = (np.asarray(m) for m, _ in maps)
        moved = []
        for label in labels.numpy():
            label = label[rows, columns]
            label[valid == 0] = common.IGNORE
            moved.append(label)
    else:
        moved = [np.array(m) for m, _ in maps]
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(np.stack(moved))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 3, 16, 32), (args.height, args.width), mode="bilinear"
    )[0]
    image, labels = (
        (255 * noise).to(torch.uint8),
        torch.randint(0, 19, (2, args.height, args.width), dtype=torch.uint8),
    )
    on_device = image[None].to(device), labels[None].to(device)
    times = {"torch": [], "PIL, label maps": [], "PIL, index maps": []}
    for i in range(args.samples):
        for name in times:
            r, start = common.rng("benchmark", i), time.perf_counter()
            if name == "torch":
                three_stage.strong_view(*on_device, [r], 32)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            else:
                pil_view(image, labels, r, 32, name == "PIL, index maps")
            times[name].append(time.perf_counter() - start)
    means = {name: 1000 * statistics.mean(values[10:]) for name, values in times.items()}
    print(
        f"{args.height}x{args.width} on {common.device_name(device)}, milliseconds a sample: "
        + ", ".join(f"{name} {ms:.2f}" for name, ms in means.items())
        + "; PIL over torch: "
        + ", ".join(f"{ms / means['torch']:.2f}" for ms in list(means.values())[1:])
    )


if __name__ == "__main__":
    main()
