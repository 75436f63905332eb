"""Tiny-ImageNet as it is unpacked, to 64-pixel images for the pixel-space models:

    python data_prep/tiny_imagenet.py --source tiny-imagenet-200 --out data/tiny-imagenet

For latents: --autoencoder ID --resolution 256 --crop native. All options of `latentddae encode` may
follow.
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.encode import main

DEFAULTS = (
    "splits=train,val views=original,mirror test_views=original autoencoder=none resolution=64"
)

if __name__ == "__main__":
    sys.exit(run_command("tiny_imagenet", main, [*DEFAULTS.split(), *sys.argv[1:]]))
