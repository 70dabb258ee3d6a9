"""What does DARS's pseudo-labeling cost beyond the network?

Makes pseudo-labels for N and for 10 N pictures of 1024 x 2048 with 19 classes, each in a process of its own, with predictions from a stub
instead of a network, and prints peak memory of both, pixels per second of the alignment alone, and disk taken by the drafts.

    python tests/benchmark_pseudo.py            200 and 2,000 pictures: about twenty minutes, 13 GB of disk
    python tests/benchmark_pseudo.py 20         20 and 200
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import common
import dars

HEIGHT, WIDTH, CLASSES = 1024, 2048, 19


class Pictures:
    """Pictures that say nothing, with a mask of one class."""

    names = [f"class_{k}" for k in range(CLASSES)]
    colors = np.random.RandomState(0).randint(0, 255, (CLASSES, 3)).astype(np.uint8)

    def image(self, id):
        return np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    def label(self, id):
        return np.zeros((HEIGHT, WIDTH), np.uint8)


def stub(teacher, image, args):
    """Smooth areas of a class with confidences that rise to 1 inside, as a network gives them; another picture each time."""
    stub.calls += 1
    generator = torch.Generator().manual_seed(stub.calls)
    logits = torch.nn.functional.interpolate(
        torch.randn(1, CLASSES, 16, 32, generator=generator) * 8, (HEIGHT, WIDTH), mode="bilinear"
    )[0]
    highest, label = logits.max(0)
    return label.to(torch.uint8), (1 / (logits - highest).exp().sum(0)).half().view(torch.int16)


stub.calls = 0


def one(count):
    seconds = {"read and count": 0.0, "select": 0.0, "read drafts": 0.0}

    def timed(name, function):
        def run(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name] += time.perf_counter() - start
            return result

        return run

    dars.predict_picture = stub
    dars.select, dars.read_draft, torch.bincount = (
        timed("select", dars.select),
        timed("read drafts", dars.read_draft),
        timed("read and count", torch.bincount),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = SimpleNamespace(
            folder=Path(folder),
            picture=lambda *arguments: None,
            panel=lambda *arguments: None,
            write_json=lambda *arguments: None,
            claim=lambda folder: None,
        )
        sizes, forget = [], dars.shutil.rmtree
        dars.shutil.rmtree = lambda path, **options: (
            sizes.append(sum(p.stat().st_size for p in Path(path).rglob("*.npz"))),
            forget(path, **options),
        )
        args = SimpleNamespace(pseudo="dars", confidence="fp16", seed=0)
        start = time.perf_counter()
        dars.make_pseudo_labels(
            torch.nn.Identity(),
            Pictures(),
            [f"picture_{i}" for i in range(count)],
            torch.arange(1, CLASSES + 1) ** 3,
            0.5,
            1,
            run,
            args,
            torch.device("cpu"),
        )
        whole = time.perf_counter() - start
    pixels = count * HEIGHT * WIDTH
    print(
        f"\n{count} pictures in {whole:.0f} s: peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB; drafts {sizes[0] / count / 1e6:.1f} MB "
        f"a picture; million pixels per second: "
        + ", ".join(f"{name} {pixels / s / 1e6:.1f}" for name, s in seconds.items())
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
