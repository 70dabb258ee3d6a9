"""What does MKD's feature augmentation cost?

Two forms: a table of classes x classes, as in mkd.py, and a tensor of pixels x classes x channels.
For one batch of the paper (21 classes, 256 channels, 16 pictures of 64 x 64 cells = 65,536 pixels):
seconds and memory of both forms, with the covariance's update, each in a process of its own; the
largest difference of their results; and the share of a step's network passes that the table takes
(DeepLabv3+ on ResNet-50, crop 512 x 512; on a CPU passes of 1 + 1 pictures, times the batch).

    python tests/benchmark_features.py              two minutes and 8 GB on two CPU cores
    python tests/benchmark_features.py --full       the full covariance instead of its diagonal;
                                                    the direct form with 256 pixels alone
"""

import multiprocessing
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import common
import mkd

CLASSES, CHANNELS, PICTURES = 21, 256, 16
STRENGTH = 1.5
FULL = "--full" in sys.argv


def inputs(side, device):
    """Features, logits, labels with some 255, and the classifier's weight."""
    torch.manual_seed(0)
    features = torch.rand(PICTURES, CHANNELS, side, side, device=device)
    features += 0.1 * torch.rand(CHANNELS, 1, 1, device=device)
    weight = 0.05 * torch.randn(CLASSES, CHANNELS, device=device)
    logits = F.conv2d(features, weight[:, :, None, None])
    label = torch.randint(CLASSES + 1, (PICTURES, side, side), device=device)
    return features, logits, label.masked_fill(label == CLASSES, common.IGNORE), weight


def table_form(features, logits, label, weight):
    statistics = mkd.ClassStatistics(CLASSES, CHANNELS, FULL).to(features.device)
    return mkd.augment_features(features, logits, label, weight, statistics, STRENGTH)


def direct_form(features, logits, label, weight):
    """The same by tensors of pixels x classes x channels.

    With the full covariance: pixels x channels x channels.
    """
    x = features.permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
    y = label.flatten()  # (N,)
    known = (y != common.IGNORE).float()
    y = y.where(y != common.IGNORE, 0)
    one_hot = F.one_hot(y, CLASSES).float() * known[:, None]  # (N, K)
    count = one_hot.sum(0).clamp(min=1)
    mean = (x[:, None] * one_hot[:, :, None]).sum(0) / count[:, None]
    v = weight - weight[y][:, None]  # (N, K, C)
    if FULL:
        deviation = (x - mean[y]) * known[:, None]
        outer = deviation[:, :, None] * deviation[:, None]  # (N, C, C)
        covariance = torch.zeros(CLASSES, CHANNELS, CHANNELS, device=x.device)
        covariance = covariance.index_add_(0, y, outer) / count[:, None, None]
        term = (v @ covariance[y] * v).sum(2)
    else:
        deviation = x[:, None] * one_hot[:, :, None] - mean * one_hot[:, :, None]  # (N, K, C)
        covariance = deviation.square().sum(0) / count[:, None]
        term = (v.square() * covariance[y][:, None]).sum(2)
    term = (term * known[:, None]).unflatten(0, label.shape).permute(0, 3, 1, 2)
    return logits + STRENGTH / 2 * term


def measure(form, side, answers):
    """Median seconds of three runs, and the memory in MiB that the first run took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    form(*inputs(4, device))  # libraries are loaded
    data = inputs(side, device)
    seconds = []

    def resident():  # MiB at most, since the last reset
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: the peak begins again at what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    for i in range(3):
        start = time.perf_counter()
        result = form(*data)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            memory = resident() - before
    answers.put((sorted(seconds)[1], memory, result.cpu().numpy()))


def in_a_process(form, side):
    answers = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(
        target=measure, args=(form, side, answers)
    )
    process.start()
    answer = answers.get()
    process.join()
    return answer


def network_passes():
    """Seconds of the network passes of a step of the paper.

    Two students forward and backward on 16 + 16 pictures, two teachers forward on 16.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = common.make_network(
        dict(
            network="deeplabv3plus",
            backbone="resnet50",
            batch_norm="train",
            style="torchvision",
            classes=CLASSES,
        )
    ).to(device)
    pictures = PICTURES if device.type == "cuda" else 1
    x = torch.rand(2 * pictures, 3, 512, 512, device=device)
    times = []
    network.pool.eval()  # with one picture, its batch norm has one number a channel: no statistics
    for _ in range(3):
        start = time.perf_counter()
        network(x).sum().backward()
        with torch.no_grad():
            network(x[:pictures])  # the teacher
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * sorted(times)[1] * PICTURES / pictures


def main():
    side = 64
    direct_side = 4 if FULL else 64
    seconds, memory, result = in_a_process(table_form, side)
    direct_seconds, direct_memory, direct_result = in_a_process(direct_form, direct_side)
    if direct_side != side:
        *_, result = in_a_process(table_form, direct_side)
    difference = abs(result - direct_result).max()
    passes = network_passes()
    term = 3 * seconds  # two students: four updates (labeled and unlabeled pictures), and two terms
    form = "full covariance" if FULL else "diagonal"
    print(f"{CLASSES} classes, {CHANNELS} channels, {form}, {torch.get_num_threads()} threads")
    for name, cells, took, mib in (
        ("table ", side, seconds, memory),
        ("direct", direct_side, direct_seconds, direct_memory),
    ):
        print(f"{name}    {PICTURES * cells**2} pixels: {1000 * took:.1f} ms, {mib:.1f} MiB")
    largest = abs(direct_result).max()
    print(f"largest difference of the logits (of up to {largest:.1f}): {difference:.1e}")
    print(
        f"network passes of a step: {passes:.2f} s, feature augmentation about {term:.3f} s: "
        f"{100 * term / passes:.2f} %"
    )


if __name__ == "__main__":
    main()
