# shellcheck shell=bash
# Sourced by every job: environment, and `launch`, which starts one process per GPU on every node of the job.
# Adapt the first lines to your cluster.

# module load cuda
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

export PYTHONSAFEPATH=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # nodes without network: fetch models on the login node first

# launch SCRIPT.py|MODULE ARGS...: srun starts the ranks itself, so signals and exit codes pass unchanged.
launch() {
    case $1 in
    *.py) srun --kill-on-bad-exit=1 python -u "$@" ;;
    *) srun --kill-on-bad-exit=1 python -u -m "$@" ;;
    esac
}
