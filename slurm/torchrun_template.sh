#!/bin/bash
#SBATCH --job-name=pretrain --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@300 --output=logs/%x-%j.out
# sbatch [options] slurm/torchrun_template.sh CONFIG.yaml [key=value ...]
#
# For sites that allow one task per node only: srun starts a torchrun on every node, which starts a process per GPU
# (GPUS=N for another number). Prefer the other scripts where you can: torchrun turns every exit status but 0 into 1, so this job
# comes back after a warning or a lost node, but not after a hang (75). docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
cpus=$((${SLURM_CPUS_PER_TASK:-1} / gpus))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus > 1 ? cpus : 1))}"
source slurm/env.sh
[ $# -ge 1 ] || usage

workers=$((cpus > 1 ? cpus - 1 : 1))
port=$((10000 + (100 * SLURM_JOB_ID + 10 * ${SLURM_RESTART_COUNT:-0}) % 22000))

# SLURM_NODEID differs from node to node, so it must be read there. A warning reaches the ranks through torchrun, which waits
# for their save.
launch() {
    # shellcheck disable=SC2016
    step bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" --master-addr "$MASTER_ADDR" --master-port "$port" \
        --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 280 -m "$@"
}
pretrain "$@"
