"""What does DARS's pseudo-labeling cost beyond the network?

It makes pseudo-labels for N and for 10 N pictures of 1024 x 2048 with 19 classes, with predictions
of a stub instead of a network. It prints the peak memory of both, the pixels per second of the
alignment alone, and the disk space of the drafts.

    python tests/benchmark_pseudo.py        200 and 2,000 pictures: twenty minutes, 13 GB of disk
    python tests/benchmark_pseudo.py 20     20 and 200
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import dars

HEIGHT, WIDTH, CLASSES = 1024, 2048, 19


class Pictures:
    """Black pictures with a mask of one class."""

    names = [f"class_{k}" for k in range(CLASSES)]
    files = defaultdict(lambda: ("picture", "mask"))
    colors = np.random.RandomState(0).randint(0, 255, (CLASSES, 3)).astype(np.uint8)

    def image(self, id):
        return np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    def label(self, id):
        return np.zeros((HEIGHT, WIDTH), np.uint8)


def stub(teacher, image, args):
    """Smooth areas of a class whose confidences rise to 1 inside; other areas in each call."""
    stub.calls += 1
    generator = torch.Generator().manual_seed(stub.calls)
    logits = torch.nn.functional.interpolate(
        torch.randn(1, CLASSES, 16, 32, generator=generator) * 8, (HEIGHT, WIDTH), mode="bilinear"
    )[0]
    highest, label = logits.max(0)
    return label.to(torch.uint8), (1 / (logits - highest).exp().sum(0)).half().view(torch.int16)


stub.calls = 0


def timed(seconds, name, function):
    """The function, whose time is added to seconds[name]."""

    def run(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        seconds[name] += time.perf_counter() - start
        return result

    return run


def one(count):
    """Make pseudo-labels for so many pictures, and print what they cost."""
    seconds = {"read and count": 0.0, "select": 0.0, "read drafts": 0.0}
    dars.predict_picture = stub
    dars.select = timed(seconds, "select", dars.select)
    dars.read_draft = timed(seconds, "read drafts", dars.read_draft)
    torch.bincount = timed(seconds, "read and count", torch.bincount)
    args = SimpleNamespace(pseudo="dars", confidence="fp16", seed=0)
    ids = [f"picture_{i}" for i in range(count)]
    labels = torch.arange(1, CLASSES + 1) ** 3
    with tempfile.TemporaryDirectory() as name:
        run = SimpleNamespace(folder=Path(name), device=torch.device("cpu"))
        run.claim = lambda folder: None
        run.write_json = lambda name, record: None
        made = run.folder / "pseudo_labels/round_1"
        start = time.perf_counter()
        dars.make_pseudo_labels(
            made, torch.nn.Identity(), Pictures(), ids, labels, 0.5, 1, run, args
        )
        whole = time.perf_counter() - start
        drafts = (run.folder / "predictions").rglob("*.npz")
        size = sum(path.stat().st_size for path in drafts)
    pixels = count * HEIGHT * WIDTH
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speeds = ", ".join(f"{name} {pixels / s / 1e6:.1f}" for name, s in seconds.items())
    print(
        f"\n{count} pictures in {whole:.0f} s: peak memory {memory:.0f} MB; "
        f"drafts {size / count / 1e6:.1f} MB a picture; million pixels per second: {speeds}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(int(sys.argv[2]))
    else:
        few = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        for count in (few, 10 * few):
            output = subprocess.run(
                [sys.executable, __file__, "one", str(count)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            print(output.strip().splitlines()[-1], flush=True)
