#!/bin/bash
#SBATCH --job-name=transfer --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120 --output=logs/%x-%j.out
# sbatch [options] slurm/transfer.sh CHECKPOINT OUT DATA...
# sbatch [options] slurm/transfer.sh CHECKPOINT OUT --config configs/transfer/suite.yaml
#
# Judges a checkpoint (a run folder will do) on one or more data folders: every block at every noise level, then the linear
# and the k-NN probe on the chosen cell. A folder that is named as a known set (pets, flowers102, ...) has its metric and
# splits. Results go to OUT/NAME, the table to OUT/suite.json. Any number of ranks shares the images. Requeued, it skips
# what is done. docs/transfer.md, docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
[ $# -ge 3 ] || usage
checkpoint=$1 out=$2
shift 2

launch latentddae.transfer.suite --checkpoint "$checkpoint" --out "$out" "$@"
