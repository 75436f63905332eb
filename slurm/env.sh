# shellcheck shell=bash
# Sourced by every job script: the environment of your cluster, then how a job starts its ranks and when it comes back.
# docs/cluster.md explains it. Adapt the first lines.

# module load cuda
# export NCCL_SOCKET_IFNAME=ib0

usage() { # the comment at the top of a script is its manual
    sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || usage

# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

export PYTHONSAFEPATH=1 # the code on PYTHONPATH wins over the folder the job runs in
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 a step does not inherit it
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"          # nodes without network: fetch models on the login node first
unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT          # left over in the submitting shell, they would hide Slurm's
if [ -z "${MASTER_ADDR:-}" ]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
export MASTER_ADDR
workers=$((${SLURM_CPUS_PER_TASK:-2} > 1 ? ${SLURM_CPUS_PER_TASK:-2} - 1 : 1)) # one processor stays with the GPU

# launch MODULE ARGS...: one process per task of the job, that is one per GPU.
launch() { step python -u -m "$@"; }

# alone COMMAND ARGS...: one latentddae command as one process.
alone() { step --nodes=1 --ntasks=1 --ntasks-per-node=1 latentddae "$@"; }

# step [SRUN OPTIONS] COMMAND...: srun starts the ranks itself, so signals and exit statuses pass unchanged. A rank that
# leaves early does not have the others killed at once: they would lose the status that says whether to come back.
current='' warned='' ending='' interrupted=''
step() {
    local status
    [ -z "$warned" ] || return 75
    srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none "$@" &
    current=$!
    while :; do
        status=0 interrupted=''
        wait "$current" || status=$?
        [ -n "$interrupted" ] || break # a trapped signal ends `wait` before the step
    done
    current=''
    return "$status"
}

# Slurm warns the script alone (--signal=B:USR1@300) and it tells the ranks. SIGTERM comes when Slurm is ending the job and
# has told them itself.
warn() {
    warned=1 interrupted=1
    [ -z "$current" ] || kill -s USR1 "$current" || true
}
trap warn USR1
trap 'ending=1 interrupted=1' TERM
trap 'leave $?' EXIT

# leave STATUS: back into the queue, if running the same again can help (latentddae/errors.py has the statuses).
leave() {
    case $1 in
    0 | 2 | 65 | 73 | 78) exit "$1" ;;
    75) ;;
    *) # a rank killed with its node, or warned before it listened
        [ "$1" -gt 128 ] || [ -n "$warned" ] || exit "$1"
        ;;
    esac
    [ -z "$ending" ] || exit "$1" # requeued, preempted or cancelled: Slurm decides
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "exit status $1 after $SLURM_RESTART_COUNT restarts (MAX_RESTARTS): not requeued" >&2
        exit "$1"
    fi
    echo "exit status $1: job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID" || exit "$1"
}

# freeze RUN: a copy of the code in RUN/code/JOB, made at the job's first start; every later start runs that copy too.
code=.
freeze() {
    [ "${FREEZE:-1}" = 1 ] || return 0
    code=$(realpath -m "$1/code/$SLURM_JOB_ID")
    if [ ! -d "$code" ]; then
        mkdir -p "$code.partial"
        cp -R latentddae configs slurm "$code.partial"
        git rev-parse HEAD >"$code.partial/COMMIT" 2>/dev/null || true
        mv "$code.partial" "$code"
    fi
    export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"
}

# pretrain CONFIG [OTHER_CONFIG.yaml] [key=value ...]
pretrain() {
    local config=$1 run argument settings=()
    shift
    if [[ ${1:-} == *.yaml ]]; then
        config=$1
        shift
    fi
    run=$(sed -n 's/^run: *//p' "$config")
    for argument in "$@"; do
        case $argument in
        run=*) run=${argument#run=} ;;
        --retry) [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || continue ;; # meant for one start
        esac
        settings+=("$argument")
    done
    freeze "${run:?name the run folder: run=FOLDER}"
    [ ! -f "$code/$config" ] || config=$code/$config
    launch latentddae.train --config "$config" data.workers="$workers" "${settings[@]}"
}
