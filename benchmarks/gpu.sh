#!/usr/bin/env bash
# What only a GPU can tell, in three parts of at most ten minutes each; results go to benchmarks/gpu/, row by row.
#
#     bash benchmarks/gpu.sh tests     # the tests marked gpu, and the kernels against their plain versions
#     bash benchmarks/gpu.sh bench     # step time, MFU, parts: one table, one JSON; further flags go to gpu.py
#     bash benchmarks/gpu.sh track     # records/h200: further flags go to track.py
#
# Needs torch with CUDA and pytest; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
shift || true
out=${GPU_OUT:-benchmarks/gpu}
mkdir -p "$out"
case "$part" in
tests) python -m pytest -q -rs --durations=10 tests/core/test_gpu.py tests/core/test_kernels.py "$@" 2>&1 | tee "$out/tests.txt" ;;
bench) python benchmarks/gpu.py --json "$out/bench.json" "$@" 2>&1 | tee "$out/bench.txt" ;;
track) python benchmarks/track.py "$@" 2>&1 | tee -a "$out/track.txt" ;;
*) echo "gpu.sh: error: say which part: tests, bench or track" >&2; exit 2 ;;
esac
