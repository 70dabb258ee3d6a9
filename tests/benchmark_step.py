"""What does a training step cost beyond its network passes?

Times real iterations of a script (loading, perturbations, pseudo-labels, losses, optimizer, EMA,
log) and, in turn with them, the bare passes of the same networks at the same sizes: forward and
backward of the students, and forward of as many teachers (or of the student itself, for its own
targets) on the pictures that they see.

    python tests/benchmark_step.py rml                  streets, the CPU preset
    python tests/benchmark_step.py dars
    python tests/benchmark_step.py three_stage          stage 2, whose branch is the larger one
    python tests/benchmark_step.py mkd
    python tests/benchmark_step.py guidedmix

Any argument of the script may follow. The paper's configuration:

    python tests/benchmark_step.py rml --dataset cityscapes --data-root DIR --iterations 5
"""

import copy
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import common
import dars
import guidedmix
import mkd
import rml
import three_stage


@dataclass
class Passes:
    """What is timed of a script."""

    script: ModuleType
    arguments: str  # of a short run with 40 steps of the kind to be timed
    stage: int  # the stage that is timed
    students: int  # how many networks learn
    seen: list  # the share of a step's pictures in each pass of a student
    seen_by_teachers: list  # the same for passes without gradient


SCRIPTS = {
    "rml": Passes(
        rml, "--iterations 40 --stage0-iterations 2 --stages 1", 1, students=2,
        seen=[1], seen_by_teachers=[1]),
    "dars": Passes(
        dars, "--iterations 40 --round0-iterations 2 --rounds 1", 1, students=1,
        seen=[1], seen_by_teachers=[]),
    "three_stage": Passes(
        three_stage, "--iterations 40 --stage1-iterations 2 --stages 2", 2, students=1,
        seen=[1], seen_by_teachers=[1]),
    "mkd": Passes(
        mkd, "--iterations 40 --warmup 0", 1, students=2,
        seen=[1], seen_by_teachers=[0.5]),
    "guidedmix": Passes(
        guidedmix, "--iterations 40 --warmup 0 --usup-target decoupled", 1, students=1,
        seen=[1, 0.5], seen_by_teachers=[0.5]),
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def share_of(images, share):
    return images[: round(share * len(images))]


def bare_passes(passes, students, teachers, images, args, device):
    """Seconds of the network passes of one iteration, on noise of the right size."""
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad(), common.autocast(args, device):
        for teacher in teachers:
            for share in passes.seen_by_teachers:
                teacher(share_of(images, share))
    for student in students:
        student.train()
        more = {"aux": True} if isinstance(student, common.SegmentationNetwork) else {}
        for share in passes.seen:
            with common.autocast(args, device):
                outputs = student(share_of(images, share), **more)
            outputs = [output for output in outputs if output is not None]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    synchronize(device)
    seconds = time.perf_counter() - start
    for student in students:
        student.zero_grad()
    return seconds


class Benchmark:
    """Runs a script, and times its steps and, after each of them, the bare passes."""

    def __init__(self, passes):
        self.passes = passes
        self.students = []
        self.teachers = []
        self.steps = []  # seconds of each step
        self.bare = []  # seconds of its network passes
        self.began = None

    def run(self):
        build_network = common.build_network
        parallel = common.parallel
        parse_args = common.parse_args
        step = common.Run.step

        def remember_arguments(*arguments, **options):
            self.args = parse_args(*arguments, **options)
            return self.args

        def few_val_pictures(args, data, *arguments, **options):
            data.val = data.val[:1]
            for id in data.train if args.dataset == "streets" else []:  # drawn once, then kept
                data.image(id)
            return build_network(args, data, *arguments, **options)

        def remember_student(student, device):
            self.students.append(copy.deepcopy(student))
            if self.passes.seen_by_teachers:
                teacher = copy.deepcopy(getattr(student, "network", student))
                self.teachers.append(teacher.eval())
            return parallel(student, device)

        def time_step(run, *arguments, **options):
            step(run, *arguments, **options)
            synchronize(run.device)
            if run.stage == self.passes.stage:
                self.time_step(run)

        common.parse_args = remember_arguments
        common.build_network = few_val_pictures
        common.parallel = remember_student
        common.Run.step = time_step
        self.passes.script.main()

    def time_step(self, run):
        if self.began:
            self.steps.append(time.perf_counter() - self.began)
        self.device = run.device
        self.images = run.images
        images = torch.rand(run.images, 3, *self.args.crop, device=run.device)
        students = self.students[-self.passes.students:]
        teachers = self.teachers[-self.passes.students:]
        seconds = bare_passes(self.passes, students, teachers, images, self.args, run.device)
        self.bare.append(seconds)
        self.began = time.perf_counter()


def peak_memory(device):
    """MiB of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    name = "rml"
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        name = sys.argv.pop(1)
    passes = SCRIPTS[name]
    folder = tempfile.mkdtemp()
    arguments = f"{passes.arguments} --overwrite --eval-every 1000000 --log-every 50"
    sys.argv[1:1] = [*arguments.split(), "--out", folder]
    benchmark = Benchmark(passes)
    benchmark.run()
    shutil.rmtree(folder)

    skip = min(3, len(benchmark.steps) - 1)  # the first ones warm up
    step = statistics.median(benchmark.steps[skip:])
    bare = statistics.median(benchmark.bare[skip:])
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(
        f"\n{name}: step {1000 * step:.1f} ms, bare network passes {1000 * bare:.1f} ms, "
        f"ratio {step / bare:.3f} (medians of {len(benchmark.steps) - skip}; "
        f"{common.device_name(benchmark.device)}, {threads} OMP threads; "
        f"{benchmark.images / step:.1f} images per second; "
        f"peak memory {peak_memory(benchmark.device):.0f} MB)"
    )


if __name__ == "__main__":
    common.run_main(main)
