#!/bin/bash
#SBATCH --job-name=sample --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=12:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120 --output=logs/%x-%j.out
# sbatch [options] slurm/sample.sh CHECKPOINT OUT REFERENCE [options of latentddae sample]
#
# Draws 50,000 images (--num N for another number) and sets them against REFERENCE: an image folder or a statistics file,
# `none` for no FID. The images do not depend on the number of GPUs. Requeued, it makes those that are missing.
# docs/generation.md, docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
[ $# -ge 3 ] || usage
checkpoint=$1 out=$2 reference=$3
shift 3

launch latentddae.generation.sample --checkpoint "$checkpoint" --out "$out" --num 50000 "$@"
[ "$reference" = none ] || alone fid "$out" "$reference"
