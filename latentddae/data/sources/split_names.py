"""Names of splits, as data sets spell them in folders and files."""

import re

SPLITS = {  # our name -> the names that data sets use
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# What may follow the name of a split in a folder's name: train_images, val2017, test-set.
AFTER = r"(?:[-_ ]?(?:set|data|images?|imgs?|split|folder|[0-9]+))*"


def split_of_folder(name: str) -> str | None:
    """The split that a folder is named after."""
    for split, names in SPLITS.items():
        if re.fullmatch(f"(?:{'|'.join(names)}){AFTER}", name.lower()):
            return split
    return None


def split_of_file(name: str) -> str | None:
    """The split that a file is named after: train-000000.tar, imagenet1k-validation-00.tar. None
    if it is no split, or several."""
    words = re.split(r"[^a-z]+", name.lower())
    splits = {s for s, names in SPLITS.items() if any(word in names for word in words)}
    return splits.pop() if len(splits) == 1 else None
