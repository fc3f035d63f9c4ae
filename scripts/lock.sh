#!/usr/bin/env bash
# Writes constraints/locked.txt: every package of the tested environment, in one version each.
#   make lock
# pip resolves pyproject.toml within constraints/tested.txt (the packages that arm_ray names) in a
# new virtual environment, and what it has then is the lock. A newer version of one package: change
# constraints/tested.txt, and run this again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3.11}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
DEVICE=cpu LOCK=off VENV="$work/venv" PYTHON="$PYTHON" bash scripts/setup.sh
describe='import sys, platform; print("Python %d.%d" % sys.version_info[:2],
platform.system(), platform.machine(), sep=", ")'
{
    echo "# Every package that the tests of this repository run with; made by: make lock"
    echo "# for: $("$work/venv/bin/python" -c "$describe")"
    # A build's local version (torch 2.13.0+cpu) is the choice of scripts/setup.sh. Triton compiles
    # for GPUs: a gigabyte that nothing here imports.
    "$work/venv/bin/python" -m pip freeze --all --exclude-editable |
        grep -viE '^(triton|arm.ray)==' | sed 's/+cpu$//'
} >"$work/locked.txt"
cp "$work/locked.txt" constraints/locked.txt
echo "constraints/locked.txt: $(grep -c == constraints/locked.txt) packages"
