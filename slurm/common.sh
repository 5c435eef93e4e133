# shellcheck shell=bash
# What the job files share; they source it in the folder that `sbatch` was called from.
#
# A training job checks its settings, then its nodes, starts one process a GPU and waits. Exit codes
# of `examples/pretrain_vlm.py` decide what follows: the job ends after 0 (done), 2 (wrong settings) and
# 3 (another launch has the output folder now). After 85 (asked to stop) and all others, which are
# deaths, it goes back into the queue as long as it gets on (GHOSTVIS_FRUITLESS_STARTS).

EXIT_WRONG=2
EXIT_TAKEN=3
EXIT_SICK_NODE=4
EXIT_REQUEUE=85

# shellcheck source=slurm/site.sh
source slurm/site.sh
if [ -n "$GHOSTVIS_SETUP" ]; then
    # shellcheck disable=SC1090
    source "$GHOSTVIS_SETUP"
fi

say() { echo "[$(date +%T)] job ${SLURM_JOB_ID:-?}: $*"; }

# Every problem of the environment, before anything is started.
check_environment() {
    local problems=0 name
    problem() { echo "error: $*" >&2; problems=1; }
    for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NTASKS SLURM_NNODES; do
        [ -n "${!name:-}" ] || problem "$name is not set: start this with sbatch"
    done
    for name in scontrol srun; do
        command -v $name >/dev/null || problem "$name is not on PATH"
    done
    [ -d ghostvis_mega ] || problem "$PWD is not the repository: call sbatch there"
    [ -x "$GHOSTVIS_PYTHON" ] ||
        problem "no Python at $GHOSTVIS_PYTHON: run 'make env', or set GHOSTVIS_PYTHON"
    case $GHOSTVIS_DEVICE in cpu | cuda) ;; *)
        problem "GHOSTVIS_DEVICE=$GHOSTVIS_DEVICE is neither cuda nor cpu" ;;
    esac
    return $problems
}

# Variables that all processes of the job share.
export_shared() {
    local name
    export GHOSTVIS_PYTHON GHOSTVIS_DEVICE GHOSTVIS_MIN_FREE_MIB OMP_NUM_THREADS NCCL_DEBUG
    export TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT
    for name in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA; do
        # Empty is not the same as unset for NCCL.
        if [ -n "${!name}" ]; then export "${name?}"; else unset "$name"; fi
    done
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    # srun does not take this from sbatch by itself.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    if [ "$GHOSTVIS_DEVICE" = cpu ]; then export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu; fi
}

# The ranks meet at the address by which Slurm itself reaches the first node.
export_rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=$GHOSTVIS_MASTER_PORT
}

# Check the settings of a training; prints its output folder.
check_settings() {
    local answer read='import json, sys; d = json.load(sys.stdin)'
    if answer=$("$GHOSTVIS_PYTHON" -m ghostvis_mega check "$@" \
        --world-size "$SLURM_NTASKS" --device "$GHOSTVIS_DEVICE" --json); then
        "$GHOSTVIS_PYTHON" -c "$read; print(d['output'])" <<<"$answer"
        return
    fi
    if [ -n "$answer" ]; then
        "$GHOSTVIS_PYTHON" -c "$read; print('error:', *d['problems'], sep='\n  ')" <<<"$answer" >&2
    fi
    return $EXIT_WRONG
}

# The last save into an output folder: its name and time, for a step may be saved twice; empty if
# there is none.
last_save() {
    local file=$1/checkpoints/latest
    if [ -e "$file" ]; then echo "$(cat "$file") $(stat -c %y "$file")"; fi
}

# Whether an earlier start of this job has saved. Then it goes on from there, for checkpoint.resume=none
# or =PATH say where a job begins, and not that it begins there every time.
saved_before() {
    local file=$1/slurm-first-start-$SLURM_JOB_ID now
    now=$(last_save "$1")
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -f "$file" ]; then
        mkdir -p "$1" && echo "$now" >"$file"
        return 1
    fi
    [ -n "$now" ] && [ "$now" != "$(cat "$file")" ]
}

# Slurm's warning before the time limit, to the training processes and to nothing that they started:
# srun would signal all processes of a task, and the first to die would be those that read data.
forward_usr1() {
    say "the time limit is near: the ranks are asked to save and to stop"
    # shellcheck disable=SC2016  # expanded on the node
    srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 bash -c '
        pids=$(scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" |
            awk -v own="$SLURM_STEP_ID" "\$3 ~ /^[0-9]+\$/ && \$3 != own && \$4 ~ /^[0-9]+\$/ {print \$1}")
        kill -USR1 $pids' || say "the ranks could not be signalled"
}

# Slurm has signalled the ranks itself: it cancels, preempts or requeues this job, and what follows is
# its own. Not so at the time limit: where a save that the warning asked for takes longer than that,
# this script may not live to see its end, so the job goes back into the queue now.
told_to_end() {
    told=TERM
    if [ "$warned" = 1 ] && at_time_limit && may_try_again "$output" "$before"; then
        requeue "the time limit came before the end of the save" || say "Slurm refused"
    fi
}

# Whether this job is being ended for its time limit.
at_time_limit() {
    scontrol --oneliner show job "$SLURM_JOB_ID" |
        grep -qE '(^| )(JobState=TIMEOUT|Reason=TimeLimit)( |$)'
}

# Start the ranks and wait for them through any number of signals; returns their exit code and sets
# `told` to the last signal.
run_ranks() {
    trap 'told=USR1 warned=1; forward_usr1' USR1
    trap told_to_end TERM
    srun --kill-on-bad-exit=0 --wait="$GHOSTVIS_WAIT_S" slurm/rank.sh "$@" &
    local srun_pid=$!
    while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
    wait "$srun_pid"
}

requeue() {
    say "back into the queue: $*"
    scontrol requeue "$SLURM_JOB_ID"
}

# Whether a job that has not finished may try again: always after a new checkpoint, else a few times.
# Each job counts its own starts: one that is submitted anew begins with none.
may_try_again() {
    local output=$1 before=$2 now count=0 seen file=$1/slurm-fruitless-starts-$SLURM_JOB_ID
    now=$(last_save "$output")
    if [ "$now" = "$before" ]; then
        if [ -f "$file" ]; then
            read -r count seen <"$file"
            # Saved after it was counted, as at a time limit.
            if [ "$seen" != "$now" ]; then count=0; fi
        fi
        count=$((count + 1))
    fi
    mkdir -p "$output" && echo "$count $now" >"$file"
    [ "$count" -le "$GHOSTVIS_FRUITLESS_STARTS" ]
}

# A training, from its settings to its end: train CONFIG [section.key=value ...]
train() {
    local output before code why="processes died"
    trap '' USR1 # until there are ranks to tell, it would only end this script
    check_environment || exit $EXIT_WRONG
    export_shared
    output=$(check_settings "$@") || exit $EXIT_WRONG
    before=$(last_save "$output")
    if saved_before "$output"; then set -- "$@" checkpoint.resume=auto; fi
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $SLURM_NTASKS processes," \
        "${before:-no checkpoint yet}"
    export_rendezvous
    code=0 told='' warned=0
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        slurm/check_node.sh "$output" || code=$?
    # Its sentences stand above. Any other code is a node that died meanwhile.
    if [ $code = $EXIT_SICK_NODE ]; then exit $code; fi
    if [ $code = 0 ]; then run_ranks --config "$@" || code=$?; fi
    say "the ranks ended with $code${told:+ after $told}, $(last_save "$output")"
    if [ "$told" = TERM ]; then exit $code; fi
    case $code in
        # Who takes a folder over goes on in it. Were this job to start again, it would take it back,
        # and so on; that checkpoints are saved there is no sign that this job gets on.
        0 | "$EXIT_WRONG" | "$EXIT_TAKEN") exit $code ;;
        # Where it was asked before its first step there was nothing to save.
        "$EXIT_REQUEUE") why="asked to stop" ;;
    esac
    if may_try_again "$output" "$before"; then
        requeue "$why"
    else
        say "not again: $GHOSTVIS_FRUITLESS_STARTS more starts brought no new checkpoint"
    fi
    exit $code
}

# One program on one node: run PYTHON-ARGUMENTS ...
run() {
    check_environment || exit $EXIT_WRONG
    export_shared
    exec srun --nodes=1 --ntasks=1 "$GHOSTVIS_PYTHON" "$@"
}
