"""Print a Markdown table over finished runs:  python tests/results_table.py runs/

A row has the mean and standard deviation over seeds, the paper's number, and the gain over the
supervised baseline of the same dataset and labels, over the seeds that both have. Of several
baselines it is the one that shares most of the run's changed arguments and has no others.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def results(folder):
    """Print the table over the runs in and below a folder."""
    runs, unfinished = read_results(folder)
    names = f"; unfinished: {', '.join(unfinished[:5])}" if unfinished else ""
    common.need(
        runs, f"{folder}: holds no finished run (a folder with args.json and result.json){names}"
    )

    def order(key):
        method, supervised, dataset, labels, setting = key
        return method, dataset, int(labels), not supervised, setting

    header = ["method", "dataset", "labels", "setting", "seeds", "mIoU", "std", "paper"]
    rows = [header + ["supervised", "gain"]]
    for key in sorted(runs, key=order):
        method, supervised, dataset, labels, setting = key
        seeds = runs[key]
        values = [miou for miou, _ in seeds.values()]
        papers = {str(paper) for _, paper in seeds.values() if paper is not None}
        std = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        base = {} if supervised else baseline(runs, method, dataset, labels, setting)
        both = sorted(seeds.keys() & base.keys())
        base_miou = gain = ""
        if both:
            base_miou = f"{np.mean([base[seed][0] for seed in both]):.2f}"
            gain = f"{np.mean([seeds[seed][0] - base[seed][0] for seed in both]):+.2f}"
            if len(both) < len(seeds):
                gain += f" (seeds {' '.join(map(str, both))})"
        rows.append(
            [
                f"{method}, supervised" if supervised else method,
                dataset,
                str(labels),
                ", ".join(setting),
                " ".join(map(str, sorted(seeds))),
                f"{np.mean(values):.2f}",
                std,
                ", ".join(papers),
                base_miou,
                gain,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    if unfinished:
        print(f"\nunfinished: {', '.join(unfinished)}")


def baseline(runs, method, dataset, labels, setting):
    """The seeds of the supervised runs that fit a setting best, or none."""
    fitting = []
    for key in runs:
        if key[:4] == (method, True, dataset, labels) and set(key[4]) <= set(setting):
            fitting.append(key)
    return runs[max(fitting, key=lambda key: len(key[4]))] if fitting else {}


def read_results(folder):
    """{(method, supervised, dataset, labels, setting): {seed: (mIoU, the paper's)}}, unfinished."""
    runs = {}
    unfinished = []
    for path in sorted(Path(folder).rglob("args.json"), key=lambda path: path.stat().st_mtime):
        run = path.parent
        try:
            arguments = json.loads(path.read_text())["arguments"]
            result = json.loads((run / "result.json").read_text())
            names = list(arguments["changed"])
            if result["dataset"] == "folder":
                names.insert(0, "data_root")
            if arguments.get("table_preset"):
                names.insert(0, "table_preset")
            setting = []
            for name in names:
                word = name.removeprefix("table_").replace("_", "-")
                setting.append(f"{word} {arguments[name]}")
            method = result["method"].removesuffix("-supervised")
            supervised = method != result["method"]
            key = method, supervised, result["dataset"], result["labels"], tuple(setting)
            seeds = runs.setdefault(key, {})
            if result["seed"] in seeds:
                common.warn(
                    f"{run}: is another run of {result['method']} with seed {result['seed']}; "
                    "the newest counts"
                )
            miou = result["miou"][result["headline"]]
            seeds[result["seed"]] = math.nan if miou is None else miou, result["paper"]
        except FileNotFoundError:
            unfinished.append(str(run))
        except (OSError, ValueError, KeyError, TypeError) as error:
            common.warn(
                f"{run}: its args.json or result.json cannot be read "
                f"({type(error).__name__}: {error}); left out"
            )
    return runs, unfinished


def main():
    common.need(len(sys.argv) == 2, "name a folder of runs: python tests/results_table.py runs/")
    common.need(Path(sys.argv[1]).is_dir(), f"{sys.argv[1]}: no such folder of runs")
    results(sys.argv[1])


if __name__ == "__main__":
    common.run_main(main)
