#!/bin/bash
#SBATCH --job-name=encode_imagenet --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#SBATCH --time=08:00:00 --requeue --open-mode=append --output=logs/%x-%j.out
# sbatch slurm/encode_imagenet.sh SOURCE OUT [options of latentddae encode]
# Encodes both splits; every rank takes whole shards. Killed or requeued, it goes on where it stopped.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start me with sbatch from the repository}"
source slurm/env.sh
source_folder=${1:?SOURCE: folder with the official tars or class folders}
out=${2:?OUT: data folder to write}
shift 2

encode() {
    launch latentddae.data.encode --config configs/encode/imagenet256.yaml \
        --source "$source_folder" --out "$out" --workers "${SLURM_CPUS_PER_TASK:-4}" "$@"
}
encode --split train "$@"
encode --split val --views original "$@"
latentddae verify "$out"
