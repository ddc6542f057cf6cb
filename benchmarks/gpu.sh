#!/usr/bin/env bash
# What only a GPU can tell: benchmarks/gpu.sh [check|soak|sweep|layer|train|all] [--out DIR] [--rehearse]
#
# Works with the machine's own python3, torch (2.11 or later), NumPy and triton (3.6 or later), without a network and
# without installing anything. PYTHON=... picks another interpreter. Each part takes less than 8 minutes, in a process
# of its own.
#
# Exit code: 0 all of it, and well; 1 something failed; 2 usage, no GPU or no triton; 3 nothing failed, but something was
# left out: the time was up, soak made fewer than its 10,000 runs, or packages are missing: those that `layer` wants for
# its quick suite, or transformers and peft, with which `train` compares.
# `all` runs every part, whatever becomes of the others, and ends with the worst code.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
PART=all
case "${1:-}" in
    check | soak | sweep | layer | train | all) PART=$1; shift ;;
    "" | --out | --out=* | --rehearse) ;;
    *) echo "usage: benchmarks/gpu.sh [check|soak|sweep|layer|train|all] [--out DIR] [--rehearse]" >&2; exit 2 ;;
esac
ARGS=("$@")
[[ " $* " == *" --out"[\ =]* ]] || ARGS+=(--out "runs/gpu-$(date +%Y%m%d-%H%M%S)")

# The folder kernels/ is the package minipeft_kernels: a link by that name is all an installation would add.
LINKS=$(mktemp -d)
trap 'rm -rf "$LINKS"' EXIT
ln -s "$PWD/kernels" "$LINKS/minipeft_kernels"
[[ " $* " == *" --rehearse "* ]] && export TRITON_INTERPRET=1 # before Python imports the kernels
export PYTHONPATH="$PWD:$LINKS${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

[[ $PART == all ]] && PARTS="check soak sweep layer train" || PARTS=$PART
WORST=0
for part in $PARTS; do
    CODE=0
    "$PYTHON" benchmarks/gpu.py "$part" "${ARGS[@]}" || CODE=$?
    case $CODE in
        0) ;;
        3) [[ $WORST != 0 ]] || WORST=3 ;;
        *) WORST=$CODE ;;
    esac
done
exit "$WORST"
