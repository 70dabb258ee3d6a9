"""bf16 on a CPU that has no instructions for it, about as fast as fp32.

There torch's convolutions in bf16 take a hundred times as long as in fp32. Within fast_bf16() they
are computed in fp32 from operands that are rounded to bf16, and the result is rounded to bf16: as
a GPU does it, with sums in fp32. All else is torch's own. A run of a script in bf16:

    python tests/fast_bf16.py guidedmix --seed 0 --iterations 250 --warmup 100
"""

import contextlib
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def fast_bf16():
    real = F.conv2d

    def rounded(tensor):
        return None if tensor is None else tensor.bfloat16().float()

    def conv2d(x, weight, bias=None, *args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return real(x, weight, bias, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            y = real(rounded(x), rounded(weight), rounded(bias), *args, **kwargs)
        return y.bfloat16()

    F.conv2d = conv2d
    try:
        yield
    finally:
        F.conv2d = real


if __name__ == "__main__":
    name = sys.argv.pop(1)
    sys.argv += ["--precision", "bf16"]
    with fast_bf16():
        importlib.import_module("common").run_main(importlib.import_module(name).main)
