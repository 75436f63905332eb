#!/bin/bash
#SBATCH --job-name=encode_imagenet --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=08:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120 --output=logs/%x-%j.out
# sbatch [options] slurm/encode_imagenet.sh SOURCE OUT [options of latentddae encode]
#
# Encodes both splits of ImageNet; SOURCE is the folder with the official tars or class folders, OUT the data folder to
# write. Every rank takes whole shards. Killed or requeued, it goes on where it stopped. docs/data.md, docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
[ $# -ge 2 ] || usage
source_folder=$1 out=$2
shift 2

encode() {
    launch latentddae.data.encoding.encode --config configs/encode/imagenet256.yaml \
        --source "$source_folder" --out "$out" --workers "$workers" "$@"
}
encode --split train "$@"
encode --split val --views original "$@"
alone verify "$out"
