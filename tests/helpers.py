"""What the tests of whole runs share: few streets, and how two run folders are compared."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common


class FewStreets(common.Streets):
    def __init__(self):
        super().__init__()
        self.train, self.val = self.train[:8], self.val[:3]


def run_on_few_streets(script, *argv):
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Streets", FewStreets)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        script.main()


def all_masks_are(value, ids, monkeypatch):
    """From now on the masks of these pictures hold one value."""
    real = FewStreets.label
    monkeypatch.setattr(
        FewStreets,
        "label",
        lambda data, id, full_size=False: (
            np.full((64, 128), value, np.uint8) if id in ids else real(data, id)
        ),
        raising=False,
    )


def two_processes(script, folder, *argv):
    """Two processes that run a script together on few streets, in the folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    name, tests = script.__name__, Path(__file__).resolve().parent
    code = (
        f"import torch, common, helpers, {name}\n"
        "common.Streets = helpers.FewStreets\n"
        "torch.set_num_threads(1)\n"
        f"common.run_main({name}.main)"
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]


def strict(text):
    """JSON without NaN and Infinity, which are none."""

    def constant(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=constant)


def records(folder):
    return [strict(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "waiting")}
        for r in records(folder)
    ]


def losses(folder):
    return {
        (r["stage"], r["iteration"], key): value
        for r in records(folder)
        for key, value in r.items()
        if key.startswith("loss")
    }


def terms(folder):
    """The names of the loss terms in the log."""
    return {key for *_, key in losses(folder)}


def result_of(folder):
    return {
        k: v
        for k, v in strict((folder / "result.json").read_text()).items()
        if k not in ("seconds", "peak_memory_mb", "commit", "device", "processes")
    }


def equal(x, y):
    """Bit for bit, also within dicts and lists."""
    if torch.is_tensor(x):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


def last(folder):
    """A run folder's last.pt."""
    return torch.load(folder / "last.pt", weights_only=True)


def same_checkpoint(a, b, keys):
    """These entries of two run folders' last.pt are equal, bit for bit."""
    one, two = last(a), last(b)
    return all(equal(one[key], two[key]) for key in keys)


def at_pixels(maps, size, stride):
    """Maps (B, K, h, w) at the pixels of a picture: cell i is on pixel stride * i."""
    for dim, side in ((2, size[0]), (3, size[1])):
        pixel = torch.arange(side)
        last = maps.shape[dim] - 1
        before = (pixel // stride).clamp(max=last)
        after = (before + 1).clamp(max=last)
        weight = (pixel % stride / stride).view(-1, *[1] * (3 - dim))
        below = maps.index_select(dim, before) * (1 - weight)
        maps = below + maps.index_select(dim, after) * weight
    return maps


def head_parameters(network):
    """All parameters but the backbone's."""
    return [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
