"""Several splits of one data set in one go: what the scripts in data_prep/ call."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from latentddae.data.encoding import encode
from latentddae.data.info import describe


def main_for(
    splits: Mapping[str, Sequence[str]], defaults: Sequence[str]
) -> Callable[[list[str] | None], None]:
    """A `main(argv)` that runs `latentddae encode` once a split, then prints what is there.

    `defaults` are options of `encode` for all splits, `splits` those of each; the command line
    wins.
    """

    def main(argv: list[str] | None = None) -> None:
        given = list(argv or [])
        out = Path()
        for split, options in splits.items():
            flags = [*defaults, *options, "--split", split, *given]
            out = Path(encode.parse(flags).out)
            encode.main(flags)
        print("\n".join(describe(out)))

    return main
