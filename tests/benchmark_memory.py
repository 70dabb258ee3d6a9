"""How much memory does a training step take on a GPU? Counted, not measured: without a GPU, and in seconds.

    python tests/benchmark_memory.py

For each script and row of its table PAPER: what forward passes keep for backward (the tensors that autograd saves, each once), of the largest pass, since
each network's backward comes before the next network's forward (mkd.py: both students' are kept); the logits at the crop's size in fp32 (as they are,
log-softmax and gradient); parameters, gradients, optimizer state and the teachers. Not counted: workspace of convolutions, fragments, the CUDA context
(about 1 GB in all). Tensors are fake ones: only their sizes exist."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import dars
import guidedmix
import mkd
import rml
import three_stage

# Script, its networks that learn and those that do not, whose activations are kept at a time, and pictures in a pass as a multiple of --batch-size.
SCRIPTS = [
    (rml, 2, 2, 1, 2),
    (three_stage, 1, 1, 1, None),
    (mkd, 2, 2, 2, 2),
    (dars, 1, 0, 1, 2),
    (guidedmix, 1, 0, 1, 3),
]
ROWS = {
    "rml": ["cityscapes", "voc", "folder-gpu"],
    "three_stage": ["cityscapes", "vocaug", "folder-gpu"],
    "mkd": ["cityscapes", "vocaug", "folder-gpu"],
    "dars": ["cityscapes", "cityscapes-713", "vocaug", "folder-gpu"],
    "guidedmix": ["cityscapes", "vocaug", "folder-gpu"],
}
CLASSES = {"cityscapes": 19, "voc": 21, "vocaug": 21, "folder": 11}
GB = 2**30


def saved_bytes(network, images, dtype):
    """Bytes that a forward pass keeps for backward, besides the parameters."""
    known, total = (
        {p.untyped_storage()._cdata for p in network.parameters()}
        | {b.untyped_storage()._cdata for b in network.buffers()},
        [0],
    )

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total[0] += storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        kept = network(images)  # until the count is done
    del kept
    return total[0]


def count(script, row, precision, batch_size=None):
    """GB of a step of a row of the script's table."""
    _, learn, rest, at_a_time, multiple = next(entry for entry in SCRIPTS if entry[0] is script)
    values = script.PAPER[row]
    B, K = batch_size or values["batch_size"], CLASSES[row.split("-")[0]]
    images = (
        B * multiple
        if multiple
        else B + round(B * values["labeled_batch_size"] / values["batch_size"])
    )
    spec = dict(
        network=values["network"],
        backbone=values["backbone"],
        head=values["head"],
        aspp_branches=4,
        batch_norm="train" if values["batch_norm"] == "sync" else values["batch_norm"],
        style="torchvision",
        classes=K,
        deep_stem=False,
        mitrans=True,
        present=0,
    )
    with FakeTensorMode():
        network = getattr(script, "make_network", common.make_network)(spec).train()
        kept = saved_bytes(
            network,
            torch.zeros(images, 3, *values["crop"]),
            {"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        )
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in network.parameters())
    state = 4 * (
        trained * learn * (1 + (2 if values["optimizer"] == "adamw" else 1))
        + everything * (learn + rest)
    )  # gradients, momentum; weights
    logits = 3 * 4 * images * K * values["crop"][0] * values["crop"][1]
    return ((kept + logits) * at_a_time + state) / GB


def main():
    print(
        "| row | crop | --batch-size | fp32, GB | bf16, GB | most in 8 GB, bf16 | 16 GB | 24 GB |\n|---|---|---|---|---|---|---|---|"
    )
    for script, rows in ((entry[0], ROWS[entry[0].__name__]) for entry in SCRIPTS):
        for row in rows:
            values = script.PAPER[row]
            fp32, bf16, one, two = (
                count(script, row, *wanted)
                for wanted in (("fp32",), ("bf16",), ("bf16", 2), ("bf16", 4))
            )  # linear in the pictures
            fits = [
                max(0, int(2 + (0.85 * limit - 1 - one) / ((two - one) / 2)))
                for limit in (8, 16, 24)
            ]
            print(
                f"| {script.__name__}.py {row} | {values['crop'][0]}x{values['crop'][1]} | {values['batch_size']} | {fp32:.1f} | {bf16:.1f} | "
                + " | ".join(map(str, fits))
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
