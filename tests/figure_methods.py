"""One drawn street as the student of each method sees it, and the label that it learns there.

    python tests/figure_methods.py --out methods.png

The strong views are those of the scripts' defaults on streets, here of the whole street, while some
scripts train on crops. The truth stands for the teacher's label,
so only what a method changes is seen. DARS also leaves out pixels that its teacher is unsure of,
and MKD also moves the features, which no picture shows.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import dars  # noqa: E402
import guidedmix  # noqa: E402
import mkd  # noqa: E402
import rml  # noqa: E402
import three_stage  # noqa: E402

IDS = ["train_0063", "train_0017"]  # the unlabeled street, and a partner or guide
SEED = 3


def arguments(script):
    """The defaults of a script on streets."""
    return common.parse_args(script.get_parser(), script.PAPER, ["--seed", str(SEED)])


def read_street(id):
    """A batch of one whole street, as common.batches() gives it."""
    image, label = common.draw_street(id)
    height, width = label.shape
    return {
        "image": common.to_tensor(image)[None],
        "label": torch.from_numpy(label)[None],
        "inside": torch.tensor([[0, height, 0, width]]),
        "position": [0],
    }


def views():
    """{title: [picture (3, 64, 128), label (64, 128)]} of the street and of each method."""
    street, partner = map(read_street, IDS)
    image, label = street["image"][0], street["label"][0]
    columns = {"unlabeled picture, truth": [image, label]}

    both = torch.cat([street["label"], partner["label"]])
    view, target = rml.strong_view([street, partner], [both, both], arguments(rml), 1, 0)
    columns["RML: colors, CutMix"] = [view[0], target[0, 0]]

    args = arguments(three_stage)
    view, target = three_stage.strong_view(
        street["image"], street["label"][:, None], street["inside"],
        [common.rng(SEED, "strong")], args.cutout)  # fmt: skip
    columns["Three-Stage: RandAugment, Cutout"] = [view[0], target[0, 0]]

    view = mkd.views(mkd.strong_view, street, arguments(mkd), "strong")
    columns["MKD: colors or blur; features"] = [view[0], label]

    args = arguments(dars)
    *_, (_, _, _, scale) = dars.make_rounds(args, range(16), range(240))
    view, target, *_ = common.weak_view(
        *common.draw_street(IDS[0]), common.rng(SEED, "dars"), (64, 128), scale,
        dars.rotate_and_blur)  # fmt: skip
    columns["DARS: scale, rotation, blur"] = [view, target]

    args = arguments(guidedmix)
    lam = guidedmix.sample_lambda(args.alpha, args.lambda_cap, common.rng(SEED, "lambda"))
    blend = lam * partner["image"][0] + (1 - lam) * image
    columns[f"GuidedMix-Net: blend, {1 - lam:.2f} of it"] = [blend.round().byte(), label]
    return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default="methods.png", help="default: methods.png")
    args = parser.parse_args()
    data = common.Streets()
    panel = common.draw_panel(views(), data.names, data.colors).quantize()  # a third of the bytes
    common.write_file(args.out, lambda file: panel.save(file, format="PNG", optimize=True))
    print(f"{args.out}: {panel.width}x{panel.height}")


if __name__ == "__main__":
    common.run_main(main)
