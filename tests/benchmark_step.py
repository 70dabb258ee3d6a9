"""What does a training step cost beyond its network passes?

Times real iterations of a script (loading, perturbations, pseudo-labels, losses, optimizer, EMA, log) and, in turn with them, the bare passes of
the same networks at the same sizes: forward and backward of the students, forward of as many teachers (or of the student itself, for its own targets) on
the pictures that they see.

    python tests/benchmark_step.py rml                  streets, the CPU preset
    python tests/benchmark_step.py dars
    python tests/benchmark_step.py three_stage          stage 2, whose branch is the larger one
    python tests/benchmark_step.py mkd
    python tests/benchmark_step.py guidedmix
    python tests/benchmark_step.py rml --dataset cityscapes --data-root DIR --iterations 5       the paper's configuration
Any argument of the script may be given.
"""

import copy
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import common
import dars
import guidedmix
import mkd
import rml
import three_stage

# What makes a short run with 40 steps of the kind to be timed; how many students; how much of a step's pictures they see in each of their passes, and in
# passes without gradient (teachers); the stage that is timed.
SCRIPTS = {
    "rml": (
        rml,
        ["--iterations", "40", "--stage0-iterations", "2", "--stages", "1"],
        2,
        [1],
        [1],
        1,
    ),
    "dars": (
        dars,
        ["--iterations", "40", "--round0-iterations", "2", "--rounds", "1"],
        1,
        [1],
        [],
        1,
    ),
    "three_stage": (
        three_stage,
        ["--iterations", "40", "--stage1-iterations", "2", "--stages", "2"],
        1,
        [1],
        [1],
        2,
    ),
    "mkd": (mkd, ["--iterations", "40", "--warmup", "0"], 2, [1], [0.5], 1),
    "guidedmix": (
        guidedmix,
        ["--iterations", "40", "--warmup", "0", "--stop-gradient"],
        1,
        [1, 0.5],
        [0.5],
        1,
    ),
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_passes(students, teachers, seen, seen_by_teachers, images, args, device):
    """Seconds of the network passes of one iteration, on noise of the right size. seen: of the images, by pass."""
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad(), common.autocast(args, device):
        for teacher in teachers:
            for share in seen_by_teachers:
                teacher(images[: round(share * len(images))])
    for student in students:
        for share in seen:
            x = images[: round(share * len(images))]
            with common.autocast(args, device):
                outputs = (
                    student.train()(x, aux=True)
                    if isinstance(student, common.SegmentationNetwork)
                    else student.train()(x)
                )
            outputs = [output for output in outputs if output is not None]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    synchronize(device)
    seconds = time.perf_counter() - start
    for student in students:
        student.zero_grad()
    return seconds


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS else "rml"
    script, short, how_many, shares, of_teachers, timed = SCRIPTS[name]
    folder = tempfile.mkdtemp()
    sys.argv[1:1] = short + [
        "--out",
        folder,
        "--overwrite",
        "--eval-every",
        "1000000",
        "--log-every",
        "50",
    ]
    students, teachers, steps, bare, began = [], [], [], [], [None]
    build, parallel, watch, parse = (
        common.build_network,
        common.parallel,
        common.Run.watch,
        common.parse_args,
    )
    seen = {}

    def remember_arguments(*a, **k):
        seen["args"] = parse(*a, **k)
        return seen["args"]

    def few_val_pictures(args, data, *rest, **more):
        data.val = data.val[:1]
        return build(args, data, *rest, **more)

    def remember_student(student, device):
        students.append(copy.deepcopy(student))
        if of_teachers:
            teachers.append(copy.deepcopy(getattr(student, "network", student)).eval())
        return parallel(student, device)

    def time_step(run, stage, iteration, losses):
        watch(run, stage, iteration, losses)
        synchronize(run.device)
        if stage == timed:
            if began[0]:
                steps.append(time.perf_counter() - began[0])
            seen["device"], seen["images"] = run.device, run.images
            images = torch.rand(run.images, 3, *seen["args"].crop, device=run.device)
            bare.append(
                bare_passes(
                    students[-how_many:],
                    teachers[-how_many:],
                    shares,
                    of_teachers,
                    images,
                    seen["args"],
                    run.device,
                )
            )
            began[0] = time.perf_counter()

    common.build_network, common.parallel, common.Run.watch, common.parse_args = (
        few_val_pictures,
        remember_student,
        time_step,
        remember_arguments,
    )
    script.main()
    shutil.rmtree(folder)
    device = seen["device"]
    skip = min(3, len(steps) - 1)  # the first ones warm up
    step, passes = statistics.median(steps[skip:]), statistics.median(bare[skip:])
    memory = (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(
        f"\n{name}: step {1000 * step:.1f} ms, bare network passes {1000 * passes:.1f} ms, ratio {step / passes:.3f} "
        f"(medians of {len(steps) - skip}; {common.device_name(device)}, {os.environ.get('OMP_NUM_THREADS', 'default')} OMP threads; "
        f"{seen['images'] / step:.1f} images per second; peak memory {memory:.0f} MB)"
    )


if __name__ == "__main__":
    common.run_main(main)
