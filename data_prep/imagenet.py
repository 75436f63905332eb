"""ImageNet-1k to latents at 256 pixels:

    python data_prep/imagenet.py --source ILSVRC2012 --out data/imagenet256

ILSVRC2012 holds the official tars (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit
or another list of labels), or class folders, or WebDataset shards. All options of `latentddae
encode` may follow. On a cluster: sbatch slurm/encode_imagenet.sh
"""

import sys
from pathlib import Path

from latentddae.core.errors import run_command
from latentddae.data.encoding.encode import main

CONFIG = Path(__file__).parents[1] / "configs" / "encode" / "imagenet256.yaml"

if __name__ == "__main__":
    defaults = ["--config", str(CONFIG), "splits=train,val", "test_views=original"]
    sys.exit(run_command("imagenet", main, [*defaults, *sys.argv[1:]]))
