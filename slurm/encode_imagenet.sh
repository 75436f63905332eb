#!/bin/bash
#SBATCH --job-name=encode_imagenet --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=08:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120 --output=logs/%x-%j.out
# sbatch [options] slurm/encode_imagenet.sh SOURCE OUT [options of latentddae encode]
#
# Encodes both splits of ImageNet; SOURCE is the folder with the official tars or class folders, OUT the data folder to
# write. Every rank takes whole shards. Killed or requeued, it continues. docs/data.md, docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
[ $# -ge 2 ] || usage
source_folder=$1 out=$2
shift 2

launch latentddae.data.encoding.encode --config configs/encode/imagenet256.yaml splits=train,val test_views=original \
    --source "$source_folder" --out "$out" --workers "$workers" "$@"
alone verify "$out"
