#!/usr/bin/env bash
# A real Ray cluster of two nodes on this machine: two raylets, with token authentication. The port
# that takes jobs is on the loopback interface; Ray's other ports are wherever Ray puts them, and
# want the token.
#
#   cluster/local.sh up        start it, and return once a job can be submitted; again: nothing
#   cluster/local.sh status    what is there; exit code 3 where there is none
#   cluster/local.sh address   where jobs are submitted to
#   cluster/local.sh env       variables for this shell: eval "$(cluster/local.sh env)"
#   cluster/local.sh down      end what `up` started, and nothing else, and remove its files
#
#   ARM_RAY_LOCAL_DIR              token, logs, sessions; a short path, for Ray's sockets lie in it
#   ARM_RAY_LOCAL_CPUS             CPU slots of each node (default: half the cores, at least 2)
#   ARM_RAY_LOCAL_GPUS             GPUs that each node declares (default 0); Ray takes it at its word
#   ARM_RAY_LOCAL_RESOURCES        custom resources of the second node, JSON: {"evaluator": 1}
#   ARM_RAY_LOCAL_STORE_MB         object store of each node, 10^6 bytes (default 200)
#   ARM_RAY_LOCAL_DASHBOARD_PORT   port that takes jobs (default: a free one)
#   ARM_RAY_LOCAL_TIMEOUT_S        longest wait for the cluster to start (default 120)
#
# Two clusters at once need two values of ARM_RAY_LOCAL_DIR.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dir="${ARM_RAY_LOCAL_DIR:-${XDG_RUNTIME_DIR:-/tmp}/arm-ray-$(id -u)}"
cores="$(nproc)"
cpus="${ARM_RAY_LOCAL_CPUS:-$((cores < 4 ? 2 : cores / 2))}"
gpus="${ARM_RAY_LOCAL_GPUS:-0}"
resources="${ARM_RAY_LOCAL_RESOURCES:-}"
resources="${resources:-"{}"}"
store_mb="${ARM_RAY_LOCAL_STORE_MB:-200}"
timeout_s="${ARM_RAY_LOCAL_TIMEOUT_S:-120}"

fail() {
    echo "cluster/local.sh: $*" >&2
    exit 1
}

# Ray's processes start others in sessions of their own. What all of them have is the environment
# that they were started in, so `up` puts a mark there by which `down` finds its own.
mark() {
    cat "$dir/mark" 2>/dev/null || true
}

marked() {
    local mark files
    mark="$(mark)"
    [ -n "$mark" ] || return 0
    files="$(grep -lzxF -- "ARM_RAY_LOCAL_MARK=$mark" /proc/[0-9]*/environ 2>/dev/null || true)"
    [ -z "$files" ] || cut -d/ -f3 <<<"$files"
}

# A recorded process counts while it has the mark: its number may be another's by now.
alive() {
    local pid
    pid="$(cat "$dir/$1.pid" 2>/dev/null)" || return 1
    grep -qzxF -- "ARM_RAY_LOCAL_MARK=$(mark)" "/proc/$pid/environ" 2>/dev/null
}

is_up() {
    [ -f "$dir/ready" ] && alive head && alive worker
}

send() {
    local pids
    mapfile -t pids < <(marked)
    [ ${#pids[@]} -eq 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

# Waits for at most $1 seconds until none is left.
gone() {
    local tenth
    for ((tenth = 0; tenth < $1 * 10; tenth++)); do
        [ -n "$(marked)" ] || return 0
        sleep 0.1
    done
    return 1
}

stop() {
    local node
    for node in worker head; do
        ! alive "$node" || kill -TERM "$(cat "$dir/$node.pid")" 2>/dev/null || true
    done
    # A job's own process is not Ray's to end: it gets SIGTERM, and leaves as by Ctrl-C.
    gone 5 || send TERM
    gone 20 || send KILL
    gone 10 || fail "these processes do not end: $(marked | tr '\n' ' ')"
    # The directory may have been there before, with what is not ours in it.
    rm -rf "$dir/h" "$dir/w"
    rm -f "$dir"/{mark,token,ports,ready,head.pid,worker.pid,head.log,worker.log}
}

interrupted() {
    trap - INT TERM
    stop
    exit 130
}

# The paths of sockets have at most 107 bytes, of which Ray takes 66 for itself.
check_directory() {
    [ "${dir#/}" != "$dir" ] || fail "ARM_RAY_LOCAL_DIR must be an absolute path, got $dir"
    [ ${#dir} -le 36 ] || fail "ARM_RAY_LOCAL_DIR is too long for sockets: at most 36 characters, got $dir"
    mkdir -p "$dir"
    if [ -L "$dir" ] || [ ! -O "$dir" ]; then
        fail "$dir is not this user's own directory"
    fi
    chmod 700 "$dir"
}

find_ray() {
    local ray
    ray="$(command -v ray || true)"
    [ -n "$ray" ] || ray="$root/.venv/bin/ray"
    [ -x "$ray" ] || fail "no ray on PATH and none in .venv: run \`make setup\`, or activate an environment"
    # The jobs' `python` is then the one beside it.
    PATH="$(dirname "$ray"):$PATH"
    export PATH
}

port() {
    sed -n "s/^$1=//p" "$dir/ports"
}

address() {
    echo "http://127.0.0.1:$(port dashboard)"
}

client_environment() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$dir/token"
    RAY_ADDRESS="127.0.0.1:$(port gcs)"
    RAY_API_SERVER_ADDRESS="$(address)"
    export RAY_ADDRESS RAY_API_SERVER_ADDRESS
    unset RAY_AUTH_TOKEN
}

start_node() {
    local name="$1"
    shift
    # Any free ports: other clusters of this machine have the usual ones. With SPT_NOENV processes
    # that change their title do not write it over their environment, where the mark is.
    setsid env -u RAY_ADDRESS -u RAY_API_SERVER_ADDRESS SPT_NOENV=1 "ARM_RAY_LOCAL_MARK=$(mark)" \
        ray start --block --disable-usage-stats \
        --num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory="$((store_mb * 1000000))" \
        --min-worker-port=0 --max-worker-port=0 "$@" \
        </dev/null >"$dir/$name.log" 2>&1 9>&- &
    echo "$!" >"$dir/$name.pid"
}

# Reads nodes through the port that takes jobs, and asks the agent that starts them.
wait_until_ready() {
    python - "$RAY_API_SERVER_ADDRESS" "$(port head_agent)" "$timeout_s" "$dir" <<'PYTHON'
import logging
import os
import pathlib
import sys
import time
import urllib.request

from ray.util.state import list_nodes

logging.disable(logging.CRITICAL)
dashboard, agent, limit_s, directory = sys.argv[1:]
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
health = urllib.request.Request(
    f"http://127.0.0.1:{agent}/api/local_raylet_healthz",
    headers={"Authorization": f"Bearer {token}"},
)
starters = [int(pathlib.Path(directory, f"{n}.pid").read_text()) for n in ("head", "worker")]
end = time.monotonic() + float(limit_s)
problem = "nothing answered"
while time.monotonic() < end:
    if not all(os.path.exists(f"/proc/{pid}") for pid in starters):
        sys.exit("a node ended while it started")
    try:
        nodes = list_nodes(dashboard, timeout=5, raise_on_missing_output=False)
        alive = sum(node.state == "ALIVE" for node in nodes)
        if alive == 2:
            urllib.request.urlopen(health, timeout=5).close()
            sys.exit(0)
        problem = f"{alive} of 2 nodes have joined"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    time.sleep(0.3)
sys.exit(f"not ready within {limit_s} s: {problem}")
PYTHON
}

# Called where `set -e` does not hold.
start_both() {
    (
        umask 077
        python -c 'import secrets; print(secrets.token_hex(16))' >"$dir/mark" &&
            python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$dir/token"
    ) || return 1
    python - "${ARM_RAY_LOCAL_DASHBOARD_PORT:-0}" >"$dir/ports" <<'PYTHON' || return 1
import socket
import sys

# All are open at once, so that they differ.
held = {name: socket.socket() for name in ("gcs", "dashboard", "client", "head_agent", "worker_agent")}
for name, opened in held.items():
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("127.0.0.1", int(sys.argv[1]) if name == "dashboard" else 0))
    print(f"{name}={opened.getsockname()[1]}")
PYTHON
    client_environment
    start_node head --head --port="$(port gcs)" --temp-dir="$dir/h" \
        --dashboard-host=127.0.0.1 --dashboard-port="$(port dashboard)" \
        --dashboard-agent-listen-port="$(port head_agent)" --ray-client-server-port="$(port client)"
    # One after the other: what marks the head's end is the file that Ray writes last.
    local tenth
    for ((tenth = 0; tenth < timeout_s * 10; tenth++)); do
        [ ! -f "$dir/h/ray_current_cluster" ] || break
        kill -0 "$(cat "$dir/head.pid")" 2>/dev/null || return 1
        sleep 0.1
    done
    start_node worker --address="$RAY_ADDRESS" --temp-dir="$dir/w" --resources="$resources" \
        --dashboard-agent-listen-port="$(port worker_agent)"
    wait_until_ready
}

up() {
    check_directory
    exec 9<"$dir"
    flock 9
    if is_up; then
        echo "already up: $(address)"
        return
    fi
    stop
    find_ray
    trap interrupted INT TERM
    # Ray gives a node 30 s to register, which a busy machine may not keep.
    local attempt
    for attempt in 1 2 3; do
        ! start_both || break
        tail -n 30 "$dir/head.log" "$dir/worker.log" >&2 || true
        stop
        [ "$attempt" -lt 3 ] || fail "the cluster did not start"
        echo "a node did not start; once more" >&2
    done
    : >"$dir/ready"
    trap - INT TERM
    echo "up: 2 nodes of $cpus CPU and $gpus GPU, jobs to $(address)"
    echo "for this shell: eval \"\$(cluster/local.sh env)\""
}

down() {
    if [ ! -d "$dir" ]; then
        echo "nothing to end"
        return
    fi
    check_directory
    exec 9<"$dir"
    flock 9
    stop
    rmdir "$dir" 2>/dev/null || true
    echo "down"
}

needs_up() {
    is_up || {
        echo "cluster/local.sh: there is no cluster in $dir" >&2
        exit 3
    }
}

case "${1:-}" in
up) up ;;
down) down ;;
address)
    needs_up
    address
    ;;
env)
    needs_up
    client_environment
    for name in RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_ADDRESS RAY_API_SERVER_ADDRESS; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
    # It would take precedence over the file.
    echo "unset RAY_AUTH_TOKEN"
    ;;
status)
    needs_up
    find_ray
    client_environment
    echo "jobs: $RAY_API_SERVER_ADDRESS   Ray: $RAY_ADDRESS   logs: $dir/h/session_latest/logs"
    ray status --address "$RAY_ADDRESS"
    ;;
*)
    sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
