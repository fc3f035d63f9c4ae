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

printf '\n== base model\n'
"$PYTHON" "$here/prepare_base.py" --output "$runs/base"
"$PYTHON" -m arm_ray.cli pipeline "$here/pipeline.yaml"
printf '\nall of it: %d s\n' "$SECONDS"
