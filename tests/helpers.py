"""What the tests of whole runs share: few streets, and how two run folders are compared."""

import json
import sys

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


def strict(text):
    """JSON without NaN and Infinity, which are none."""
    def constant(word):
        raise ValueError(f"{word} is no JSON")
    return json.loads(text, parse_constant=constant)


def records(folder):
    return [strict(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records(folder)]


def losses(folder):
    return {(r["stage"], r["iteration"], key): value for r in records(folder) for key, value in r.items() if key.startswith("loss")}


def terms(folder):
    """The names of the loss terms in the log."""
    return {key for *_, key in losses(folder)}


def result_of(folder):
    return {k: v for k, v in strict((folder / "result.json").read_text()).items() if k not in ("seconds", "peak_memory_mb", "commit", "device", "processes")}


def equal(x, y):
    """Bit for bit, also within dicts and lists."""
    if torch.is_tensor(x):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


def same_checkpoint(a, b, keys):
    """These entries of two run folders' last.pt are equal, bit for bit."""
    one, two = (torch.load(path / "last.pt", weights_only=True) for path in (a, b))
    return all(equal(one[key], two[key]) for key in keys)
