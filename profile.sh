#!/usr/bin/env bash
# Profile a few steady training steps: the top ten operators, MFU, peak memory, each phase's share, and the trace's path.
#
#   bash profile.sh                                  one process, the default preset
#   bash profile.sh --preset small --pattern D       any flag of train_muon.py
#   SCRIPT=train_adamw.py bash profile.sh            the control
#   NPROC=8 bash profile.sh                          under torchrun; also NPROC=auto, one process per GPU
set -euo pipefail
cd "$(dirname "$0")"
script=${SCRIPT:-train_muon.py}
case ${NPROC:-1} in
    1) launch=(python) ;;
    auto | gpu | cpu | [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) launch=(torchrun --standalone --nproc_per_node="$NPROC") ;;
    *) echo "profile.sh: error: NPROC is '$NPROC'; it must be a number of processes, auto, gpu or cpu" >&2; exit 2 ;;
esac
exec "${launch[@]}" "$script" --enable_profiling "$@"
