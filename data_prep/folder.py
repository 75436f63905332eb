"""Any folder of images to latents at 256 pixels:

    python data_prep/folder.py --source photos --out data/photos

photos/ holds train/CLASS/... and val/CLASS/... (for test/ add --splits train,test). All options of
`latentddae encode` may follow; for a folder without splits use its --test-share.
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.encode import main

DEFAULTS = "splits=train,val views=original,mirror test_views=original resolution=256"

if __name__ == "__main__":
    sys.exit(run_command("folder", main, [*DEFAULTS.split(), *sys.argv[1:]]))
