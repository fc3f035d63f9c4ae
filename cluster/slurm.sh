#!/usr/bin/env bash
# One merge on a Ray cluster over a Slurm allocation:
#
#   sbatch --nodes=4 cluster/slurm.sh /shared/merge.yaml [section.key=value …]
#
# The arguments are those of `python -m arm_ray.jobs.merge`. Submit from a directory on storage that all nodes
# see, with the environment that has arm_ray activated: the nodes inherit PATH.
#
#   ARM_RAY_JOB               module to run instead of arm_ray.jobs.merge: arm_ray.jobs.sft, …
#   ARM_RAY_EVALUATOR_NODES   how many of the nodes are for vLLM engines (the last ones, default 0):
#                             they get one `evaluator` for each GPU
#   ARM_RAY_JOIN_TIMEOUT_S    longest wait for all nodes (default 300)
#   ARM_RAY_HEAD_IP           the first node's address, where its host name gives the wrong one
#   ARM_RAY_SLURM_TMP         directory of each node for Ray's sessions (default /tmp); a short path
#   ARM_RAY_REQUEUE           1: queue the job again when its time ended before the merge did
#
#SBATCH --job-name=arm-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Five minutes before the end this script gets SIGTERM, and hands it to the merge, which halts; the
# same command goes on with it.
#SBATCH --signal=B:TERM@300
set -euo pipefail

fail() {
    echo "cluster/slurm.sh: $*" >&2
    exit 1
}

[ $# -gt 0 ] || fail "usage: sbatch cluster/slurm.sh CONFIG.yaml [section.key=value …]"
[ -n "${SLURM_JOB_ID:-}" ] || fail "not in an allocation: start it with sbatch"
for name in ray python srun scontrol; do
    command -v "$name" >/dev/null || fail "there is no $name on PATH"
done

module="${ARM_RAY_JOB:-arm_ray.jobs.merge}"
join_timeout_s="${ARM_RAY_JOIN_TIMEOUT_S:-300}"
evaluators="${ARM_RAY_EVALUATOR_NODES:-0}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
count=${#nodes[@]}
[ "$count" -gt 0 ] || fail "the allocation has no nodes"
[ "$evaluators" -lt "$count" ] || fail "of $count node(s), $evaluators cannot be evaluators: the first is the head"

# On storage that all nodes see. The nodes get the path of the token, not the token: what is in the
# environment or on a command line can be read by others.
shared="${SLURM_SUBMIT_DIR:-$PWD}/.arm-ray-$SLURM_JOB_ID"
job=
terminated=0
steps=()

# shellcheck disable=SC2329  # called by the trap
clean_up() {
    local code=$? pid tenth
    trap '' TERM INT
    trap - EXIT
    # srun hands it to its tasks; at the end of this script Slurm ends what should be left.
    for pid in $(jobs -rp); do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for ((tenth = 0; tenth < 300; tenth++)); do
        [ -n "$(jobs -rp)" ] || break
        sleep 0.1
    done
    for pid in $(jobs -rp); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$shared"
    exit "$code"
}
trap clean_up EXIT
# shellcheck disable=SC2329
on_term() {
    terminated=1
    if [ -z "$job" ]; then
        echo "ended before the cluster was complete" >&2
        exit 143
    fi
    echo "SIGTERM: halting the merge" >&2
    kill -TERM "$job" 2>/dev/null || true
}
trap on_term TERM INT

rm -rf "$shared"
mkdir -m 700 "$shared"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$shared/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$shared/token"
unset RAY_AUTH_TOKEN RAY_ADDRESS

head_ip="${ARM_RAY_HEAD_IP:-}"
if [ -z "$head_ip" ]; then
    # Several addresses may come; the first of version 4 is taken.
    addresses="$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address)"
    head_ip="$(tr ' ' '\n' <<<"$addresses" | grep -m1 -E '^[0-9]+(\.[0-9]+){3}$')" ||
        fail "no IPv4 address of ${nodes[0]} in: $addresses; set ARM_RAY_HEAD_IP"
fi
# This script runs on the first node, so ports that are free here are free there. All are open at
# once, so that they differ.
read -r port client dashboard < <(python -c '
import socket
held = [socket.socket() for _ in range(3)]
for opened in held:
    opened.bind(("", 0))
print(*(opened.getsockname()[1] for opened in held))')
address="$head_ip:$port"
options=(--block --disable-usage-stats "--temp-dir=${ARM_RAY_SLURM_TMP:-/tmp}/ray-$SLURM_JOB_ID")
# Without it Ray counts all cores of a node, also those of others.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--num-cpus=$SLURM_CPUS_PER_TASK")
cpus=("--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")

echo "head ${nodes[0]} at $address, $count node(s), $evaluators of them evaluators"
srun --nodes=1 --ntasks=1 "${cpus[@]}" --nodelist="${nodes[0]}" \
    ray start --head "--node-ip-address=$head_ip" "--port=$port" "--ray-client-server-port=$client" \
    --dashboard-host=127.0.0.1 "--dashboard-port=$dashboard" "${options[@]}" &
steps+=($!)

# start_workers RESOURCES NODE …
start_workers() {
    local resources="$1" list
    shift
    [ $# -gt 0 ] || return 0
    list="$(IFS=, && echo "$*")"
    srun "--nodes=$#" "--ntasks=$#" --ntasks-per-node=1 "${cpus[@]}" --nodelist="$list" \
        ray start "--address=$address" "--resources=$resources" "${options[@]}" &
    steps+=($!)
}
# Ray itself tries for a while to reach a head that is still starting.
first_evaluator=$((count - evaluators))
start_workers '{}' "${nodes[@]:1:first_evaluator-1}"
start_workers "{\"evaluator\": ${SLURM_GPUS_ON_NODE:-1}}" "${nodes[@]:first_evaluator}"

# In the background, so that a SIGTERM is taken at once.
python - "$address" "$count" "$join_timeout_s" <<'PYTHON' &
import sys
import time

import ray

address, wanted, limit_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + limit_s
alive = -1
while time.monotonic() < end:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        found = sum(bool(node["Alive"]) for node in ray.nodes())
    except Exception as error:  # the head is not there yet
        problem = f"{type(error).__name__}: {error}"
        time.sleep(1)
        continue
    if found != alive:
        print(f"{found} of {wanted} node(s) have joined", flush=True)
        alive, problem = found, f"{found} of {wanted} nodes have joined"
    if found >= wanted:
        ray.shutdown()
        sys.exit(0)
    time.sleep(1)
sys.exit(f"the cluster was not complete within {limit_s:g} s: {problem}")
PYTHON
waiting=$!
logs="Ray's logs are on each node, in ${options[2]#*=}"
wait -n "$waiting" "${steps[@]}" || fail "the cluster did not start; $logs"
! kill -0 "$waiting" 2>/dev/null || fail "a node ended before the cluster was complete; $logs"

export RAY_ADDRESS="$address"
python -m "$module" "$@" &
job=$!
code=0
wait "$job" || code=$?
# `wait` also returns when this script gets a signal; the merge may then still be writing.
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
# 130: interrupted, and the same command goes on with the run.
if [ "$terminated" = 1 ] && [ "$code" = 130 ] && [ "${ARM_RAY_REQUEUE:-0}" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
