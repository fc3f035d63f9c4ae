#!/usr/bin/env bash
# Fine-tune a small model for a few minutes, merge its checkpoints, and compare what comes out.
#
#   examples/smollm2/demo.sh
#
# Everything is written under runs/smollm2/. Stages that are done are skipped, so it can be stopped
# and started again. PYTHON names the interpreter (default: .venv/bin/python).
set -euo pipefail

cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
here=examples/smollm2
runs=runs/smollm2

stage() {
    local title="$1" begin=$SECONDS
    shift
    printf '\n== %s\n' "$title"
    "$@"
    printf '== %s: %d s\n' "$title" $((SECONDS - begin))
}

merge() {
    if [[ -f "$runs/$1/model/config.json" ]]; then
        echo "nothing to do: $runs/$1/model is there"
    else
        "$PYTHON" -m arm_ray.cli merge "$here/$1.yaml"
    fi
}

stage "1/5 base model" "$PYTHON" "$here/prepare_base.py" --output "$runs/base"
stage "2/5 fine-tuning" "$PYTHON" -m jobs.sft "$here/sft.yaml"
stage "3/5 merge by Task Arithmetic" merge merge_task_arithmetic
stage "4/5 merge by ARM" merge merge_arm
stage "5/5 scores" "$PYTHON" -m arm_ray.cli evaluate "$here/evaluate.yaml"
printf '\ndone after %d s\n' "$SECONDS"
