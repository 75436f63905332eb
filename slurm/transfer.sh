#!/bin/bash
#SBATCH --job-name=transfer --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120 --output=logs/%x-%j.out
# sbatch [options] slurm/transfer.sh CHECKPOINT OUT DATA...
#
# Judges a checkpoint (a run folder will do) on one or more data folders: every block at every noise level, then the linear
# and the k-NN probe on the chosen cell. Results go to OUT/NAME, NAME being the data folder's. Requeued, it skips what is
# done. docs/transfer.md, docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
[ $# -ge 3 ] || usage
checkpoint=$1 out=$2
shift 2

for data in "$@"; do
    results=$out/$(basename "$data")
    alone grid --checkpoint "$checkpoint" --data "$data" --out "$results/grid"
    for probe in linear knn; do
        [ -s "$results/$probe/results.jsonl" ] ||
            alone "$probe" --checkpoint "$checkpoint" --data "$data" --out "$results/$probe" --cell "$results/grid/grid.json"
    done
done
