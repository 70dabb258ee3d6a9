"""The parts of tests/gpu_day.sh, which says what it is for."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

import benchmark_memory
import benchmark_step
import common

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 25
# The arguments of a short run of each script: one stage of the method, few steps before it.
SHORT = {
    name: passes.arguments.replace("--iterations 40", "")
    for name, passes in benchmark_step.SCRIPTS.items()
}
# Calls that wait for the GPU. Each step has one cudaEventSynchronize, for the losses of the step
# before. On a CPU: operations that would wait if their tensor was on a GPU.
WAITING = {
    "cuda": ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"],
    "cpu": ["aten::_local_scalar_dense", "aten::nonzero"],
}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--cpu", action="store_true", help="on a CPU: streets, tiny networks, few steps")
    add("--out", default="runs/gpu_day", metavar="DIR", help="folder for the report")
    add("--camvid", metavar="DIR", help="CamVid's folder: train rml.py on it until time is up")
    add("--scripts", nargs="+", default=list(SHORT), choices=list(SHORT), help="not all of them")
    add("--profile", nargs=2, metavar=("SCRIPT", "FOLDER"), help="only count waiting, in a run")
    return parser


def write_pictures(root):
    """A Cityscapes of noise, with 12 training pictures and one of val."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 1)):
        for i in range(count):
            name = f"noise/noise_{i:06d}_000000"
            picture = generator.integers(0, 256, (64, 128, 3), np.uint8)
            label = generator.integers(0, 19, (64, 128), np.uint8)
            files = {
                root / f"leftImg8bit/{part}/{name}_leftImg8bit.png": picture,
                root / f"gtFine/{part}/{name}_gtFine_labelTrainIds.png": label,
            }
            for path, array in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.repeat(16, 0).repeat(16, 1)).save(path)


class Day:
    """The parts, one after the other; each adds rows to the table."""

    def __init__(self, args):
        self.args = args
        self.out = Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.time() + 60 * MINUTES
        self.rows = []
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self.setting = []
        if args.cpu:
            self.env |= {"CUDA_VISIBLE_DEVICES": "", "GPU_DAY_ON_CPU": "1"}
        else:
            write_pictures(self.out / "cityscapes")
            data = ["--dataset", "cityscapes", "--data-root", str(self.out / "cityscapes")]
            self.setting = [*data, "--labels", "6", "--weights", "none"]

    def add(self, part, result):
        self.rows.append((part, result))
        print(f"{part}: {result}", flush=True)
        lines = ["| part | result |", "|---|---|"]
        lines += [f"| {part} | {result} |" for part, result in self.rows]
        (self.out / "report.md").write_text("\n".join(lines) + "\n")

    def call(self, name, command, seconds=240):
        """The output of a command, also in NAME.txt, and whether it ended well and in time."""
        left = max(1, min(seconds, self.end - time.time()))
        path = self.out / f"{name}.txt"
        with open(path, "w") as file:
            options = dict(cwd=ROOT, env=self.env, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = subprocess.run(command, timeout=left, **options).returncode
            except subprocess.TimeoutExpired:
                status = f"no end after {left:.0f} s"
        text = path.read_text()
        if status:
            lines = [line for line in text.splitlines() if line.strip()] or [""]
            self.add(name, f"FAILED ({status}): {lines[-1][:200]}")
        return text, not status

    def tests(self):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_gpu.py"]
        if self.args.cpu:
            command += ["-k", f"{self.args.scripts[0]} and cpu"]
        text, well = self.call("tests", command, 420)
        if well:
            self.add("pytest -m cuda", text.strip().splitlines()[-1].strip("= "))

    def steps(self, name):
        """Time and memory of a step, against its bare passes."""
        steps = "4" if self.args.cpu else "30"
        command = [sys.executable, "tests/benchmark_step.py", name, *self.setting]
        text, well = self.call(f"step_{name}", [*command, "--iterations", steps])
        found = re.search(r"step ([\d.]+) ms, .*ratio ([\d.]+).* ([\d.]+) images per second", text)
        if well and found:
            ms, ratio, images = found.groups()
            self.add(f"step of {name}.py", f"{images} images/s, {ms} ms, {ratio} of its passes")

    def run(self, name):
        """Peak memory of a short run against the count, and how often a step waits for the GPU."""
        command = [sys.executable, "tests/gpu_day.py", "--profile", name, str(self.out / name)]
        text, well = self.call(f"run_{name}", [*command, "--", *self.setting])
        if not well:
            return
        peak = json.loads((self.out / name / "result.json").read_text())["peak_memory_mb"]
        args = json.loads((self.out / name / "args.json").read_text())["arguments"]
        if not self.args.cpu:
            script = benchmark_step.SCRIPTS[name].script
            counted = benchmark_memory.count(script, "cityscapes", args["precision"])
            share = f"{peak / 1024:.1f} GB, counted {counted:.1f} GB"
            self.add(f"memory of {name}.py, {args['precision']}", share)
        self.add(f"waiting in a step of {name}.py", text.strip().splitlines()[-1])

    def processes(self):
        """torchrun on one GPU, where processes meet over NCCL."""
        name = self.args.scripts[0]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        argv = f"{name}.py {SHORT[name]} --iterations 2 --overwrite --out".split()
        command = [sys.executable, *launcher, *argv, str(self.out / "processes")]
        _, well = self.call("processes", command)
        if well:
            self.add("torchrun, one process", f"a run of {name}.py ended")

    def camvid(self):
        """rml.py with CamVid's GPU preset, until time is up."""
        folder = self.out / "camvid"
        argv = "--dataset camvid --preset gpu --eval-every 500 --save-every 500 --overwrite"
        where = ["--data-root", self.args.camvid, "--out", str(folder)]
        command = [sys.executable, "rml.py", *argv.split(), *where]
        self.call("camvid", command, max(1, self.end - time.time() - 10))
        records = [json.loads(line) for line in open(folder / "log.jsonl")]
        seen = [record for record in records if "val" in record]
        if seen:
            last = seen[-1]
            miou = ", ".join(f"{name} {value:.1f}" for name, value in last["val"].items())
            self.add(f"CamVid, rml.py, {last['step']} steps", miou)


def profile(name, folder, setting):
    """Run a script under torch.profiler; print how often its last steps wait, for each of them.

    The steps are those without a log: there is none before the last one."""
    script = benchmark_step.SCRIPTS[name].script
    build_network = common.build_network
    steps = 8 if setting else 4
    argv = f"--iterations {steps} --eval-every 1000 --log-every 1000 --overwrite --out {folder}"
    activities = [torch.profiler.ProfilerActivity.CPU]
    waiting = WAITING["cpu"]
    if torch.cuda.is_available():
        waiting = WAITING["cuda"]
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    step = common.Run.step
    stage = benchmark_step.SCRIPTS[name].stage

    def one_val_picture(args, data, *arguments, **options):
        data.val = data.val[:1]
        return build_network(args, data, *arguments, **options)

    def step_and_profile(run, iteration, *args, **kwargs):
        """The profile covers the steps from the second to the one before the last."""
        if run.stage == stage and iteration == steps - 1:
            profiler.stop()
        step(run, iteration, *args, **kwargs)
        if run.stage == stage and iteration == 1:
            profiler.start()

    common.build_network = one_val_picture
    common.Run.step = step_and_profile
    sys.argv = [f"{name}.py", *setting, *SHORT[name].split(), *argv.split()]
    script.main()
    profiler.export_chrome_trace(f"{folder}/trace.json")
    counts = {event.key: event.count for event in profiler.key_averages()}
    each = [f"{counts[key] / (steps - 2):g} {key}" for key in waiting if counts.get(key)]
    print(", ".join(each) or "never")


def main():
    setting = []
    argv = sys.argv[1:]
    if "--" in argv:
        place = argv.index("--")
        setting = argv[place + 1 :]
        argv = argv[:place]
    args = get_parser().parse_args(argv)
    if args.profile:
        return profile(*args.profile, setting)
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("error: there is no GPU; use --cpu to try this script without one")
    day = Day(args)
    device = torch.device("cpu" if args.cpu else "cuda")
    name = common.device_name(device)
    day.add("device", f"{name}; torch {torch.__version__}; commit {common.git_commit()}")
    day.tests()
    for name in args.scripts:
        day.steps(name)
    for name in args.scripts:
        day.run(name)
    day.processes()
    if args.camvid:
        day.camvid()
    print(f"\n{day.out}/report.md")


if __name__ == "__main__":
    main()
