#!/usr/bin/env bash
# Profile a few steady training steps: the top ten operators, MFU, peak memory, each phase's share, and the trace's path.
#
#   bash profile.sh                                  one process, the default preset
#   bash profile.sh --preset small --pattern D       any flag of train_muon.py
#   SCRIPT=train_adamw.py bash profile.sh            the control
#   NPROC=8 bash profile.sh                          under torchrun
set -euo pipefail
cd "$(dirname "$0")"
script=${SCRIPT:-train_muon.py}
launch=(python)
if [ "${NPROC:-1}" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node="$NPROC")
fi
exec "${launch[@]}" "$script" --enable_profiling "$@"
