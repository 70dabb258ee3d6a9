"""How much memory does a training step take on a GPU? Counted without a GPU, in seconds.

    python tests/benchmark_memory.py

For each script and row of its table PAPER the count has: what the forward passes keep for backward
(the tensors that autograd saves, each once), of the largest pass, since the backward pass of each
network comes before the forward pass of the next one (mkd.py keeps those of both students); the
logits at the crop's size in fp32 (logits, log-softmax and gradient); parameters, gradients,
optimizer state and the teachers. It does not have the workspace of convolutions, fragments, and the
CUDA context (about 1 GB in all). The tensors are fake ones: only their sizes exist.
"""

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

# Script; networks that learn; networks that do not; networks whose activations are kept at a time;
# pictures in a pass as a multiple of --batch-size (None: with --labeled-batch-size).
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
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GB = 2**30


def saved_bytes(network, images, dtype):
    """Bytes that a forward pass keeps for backward, besides the parameters."""
    parameters = [*network.parameters(), *network.buffers()]
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    total = 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        kept = network(images)  # until the count is done
    del kept
    return total


def count(script, row, precision, batch_size=None):
    """GB of a step of a row of the script's table, with its batch size or another one."""
    _, learn, rest, at_a_time, multiple = next(entry for entry in SCRIPTS if entry[0] is script)
    values = script.PAPER[row]
    batch_size = batch_size or values["batch_size"]
    classes = CLASSES[row.split("-")[0]]
    if multiple:
        images = batch_size * multiple
    else:
        labeled = values["labeled_batch_size"] / values["batch_size"]
        images = batch_size + round(batch_size * labeled)
    batch_norm = values["batch_norm"]
    spec = {
        "network": values["network"],
        "backbone": values["backbone"],
        "head": values.get("head"),
        "aspp_branches": 4,
        "batch_norm": "train" if batch_norm == "sync" else batch_norm,
        "style": "torchvision",
        "classes": classes,
        "deep_stem": False,
        "mitrans": True,
        "present": 0,
    }
    if values["backbone"] == "efficientnet_lite0":
        spec["output_stride"] = 32 if "plus" in values["network"] else 16
    make_network = getattr(script, "GuidedMixNet", common.make_network)
    with FakeTensorMode():
        network = make_network(spec).train()
        pictures = torch.zeros(images, 3, *values["crop"])
        kept = saved_bytes(network, pictures, TYPES[precision])
        parameters = list(network.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        weights = sum(parameter.numel() for parameter in parameters)
    moments = 2 if values["optimizer"] == "adamw" else 1
    gradients_and_moments = 4 * trained * learn * (1 + moments)
    weights_of_all = 4 * weights * (learn + rest)
    height, width = values["crop"]
    logits = 3 * 4 * images * classes * height * width
    return ((kept + logits) * at_a_time + gradients_and_moments + weights_of_all) / GB


def largest_batch(two, four, limit):
    """The largest batch in limit GB, from the GB of batches of 2 and 4: it grows linearly."""
    room = 0.85 * limit - 1 - two
    return max(0, int(2 + room / ((four - two) / 2)))


def main():
    print(
        "| row | crop | --batch-size | fp32, GB | bf16, GB | most in 8 GB, bf16 | 16 GB | 24 GB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for script, *_ in SCRIPTS:
        for row in ROWS[script.__name__]:
            values = script.PAPER[row]
            height, width = values["crop"]
            two = count(script, row, "bf16", 2)
            four = count(script, row, "bf16", 4)
            cells = [f"{script.__name__}.py {row}", f"{height}x{width}", values["batch_size"]]
            cells += [f"{count(script, row, precision):.1f}" for precision in TYPES]
            cells += [largest_batch(two, four, limit) for limit in (8, 16, 24)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
