"""What does a training step cost beyond its network passes?

Times real iterations of rml.py (loading, perturbations, rectification, losses, optimizer, EMA, log) and, in turn with them, the bare
passes of the same networks at the same sizes: forward and backward of two students, forward of two teachers.

    python tests/benchmark_step.py                              streets, the CPU preset
    python tests/benchmark_step.py --dataset cityscapes --data-root DIR --iterations 5       the paper's configuration
Any argument of rml.py may be given.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import common
import rml


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_passes(students, teachers, batch_size, crop, args, device):
    """Seconds of the network passes of one iteration, on noise of the right size."""
    images = torch.rand(2 * batch_size, 3, *crop, device=device)
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad(), common.autocast(args, device):
        for teacher in teachers:
            teacher(images)
    for student in students:
        with common.autocast(args, device):
            logits = student.train()(images)
        logits.backward(torch.ones_like(logits))
    synchronize(device)
    seconds = time.perf_counter() - start
    for student in students:
        student.zero_grad()
    return seconds


def main():
    folder = tempfile.mkdtemp()
    defaults = ["--iterations", "40", "--stage0-iterations", "2", "--stages", "1", "--out", folder, "--eval-every", "1000000", "--log-every", "50"]
    args = common.parse_args(rml.get_parser(), rml.PAPER, defaults + sys.argv[1:])
    device = common.setup(args)
    args.rectify = True
    data = common.open_dataset(args)
    labeled, unlabeled = common.split(args, data)
    data.val = data.val[:1]
    networks, steps, bare, began = [], [], [], [None]
    build, watch = common.build_network, common.Run.watch

    def remember_network(*a):
        networks.append(build(*a))
        return networks[-1]

    def time_step(run, stage, iteration, losses):
        watch(run, stage, iteration, losses)
        synchronize(device)
        if stage and began[0]:
            steps.append(time.perf_counter() - began[0])
        if stage:  # the students' gradients are used up by now; teachers have the same architecture
            bare.append(bare_passes(networks, networks_eval, args.batch_size, args.crop, args, device))
        began[0] = time.perf_counter() if stage else None

    common.build_network, common.Run.watch = remember_network, time_step
    networks_eval = [build(args, data, device, i).eval() for i in (0, 1)]
    rml.train(args, data, labeled, unlabeled, device)
    shutil.rmtree(folder)
    skip = min(3, len(steps) - 1)  # the first ones warm up
    step, passes = statistics.median(steps[skip:]), statistics.median(bare[skip:])
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else float("nan")
    print(f"\nstep {1000 * step:.1f} ms, bare network passes {1000 * passes:.1f} ms, ratio {step / passes:.3f} "
          f"(medians of {len(steps) - skip}; {common.device_name(device)}, {os.environ.get('OMP_NUM_THREADS', 'default')} OMP threads; "
          f"{2 * args.batch_size / step:.1f} images per second; GPU memory {memory:.0f} MB)")


if __name__ == "__main__":
    common.run_main(main)
