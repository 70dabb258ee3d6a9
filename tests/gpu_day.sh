#!/usr/bin/env bash
# What to measure on the day a GPU can be had: all of it in at most 25 minutes, with one command.
#
#   tests/gpu_day.sh [--out DIR] [--camvid DIR]    the paper's rows, on one GPU
#   tests/gpu_day.sh --cpu                         the same steps on a CPU, with tiny networks
#
# It prints what it does, and writes one Markdown table, DIR/report.md, for tests/RESULTS.md. After
# a failure it goes on; the table says what failed, and DIR/*.txt hold the output of each part.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" tests/gpu_day.py "$@"
