#!/bin/bash
# Is this node fit for the job? One sentence for each thing that is not; started once a node.
set -u
output=$1
node=${SLURMD_NODENAME:-$(hostname -s)}
sick=0
problem() { echo "node $node: $*; leave it out with: sbatch --exclude=$node" >&2; sick=1; }

"$GHOSTVIS_PYTHON" -c 'import sys, ghostvis_mega; sys.exit(sys.version_info < (3, 12))' ||
    problem "$GHOSTVIS_PYTHON is not Python 3.12 or does not find ghostvis_mega"

if probe=$(mkdir -p "$output" && mktemp "$output/.probe-XXXXXX"); then
    rm "$probe"
else
    problem "the output folder $output is not writable"
fi

for folder in /tmp /dev/shm; do
    free=$(df --output=avail -m "$folder" | tail -n 1)
    [ "${free// /}" -ge "$GHOSTVIS_MIN_FREE_MIB" ] ||
        problem "$folder has ${free// /} MiB free, the job needs $GHOSTVIS_MIN_FREE_MIB"
done

check_gpus() {
    local listing index broken slow count=0 wanted=${SLURM_GPUS_ON_NODE:-0}
    if ! listing=$(nvidia-smi --format=csv,noheader \
        --query-gpu=index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown); then
        problem "nvidia-smi fails"
        return
    fi
    while IFS=', ' read -r index broken slow _; do
        count=$((count + 1))
        case $broken in 0 | '[N/A]') ;; *)
            problem "GPU $index has $broken uncorrected memory errors" ;;
        esac
        # shellcheck disable=SC2249
        case $slow in Active) problem "GPU $index is slowed down by its hardware (heat or power)" ;; esac
    done <<<"$listing"
    [ "$count" -ge "$wanted" ] || problem "$count GPUs answer, the job has $wanted"
}

if [ "$GHOSTVIS_DEVICE" = cuda ]; then check_gpus; fi
if [ $sick = 1 ]; then exit 4; fi # as common.sh expects
