"""Train a small AutoencoderKL: python data_prep/train_autoencoder.py --source DIR --out
DIR [--steps 2500]."""

import sys

from latentddae.data.train_autoencoder import main
from latentddae.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command("train_autoencoder", main))
