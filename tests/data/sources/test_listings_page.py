"""The listings of docs/data.md are what `inspect` prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_listings_are_up_to_date() -> None:
    """docs/generate_listings.py makes ten layouts and writes what `inspect` says of them."""
    script = [sys.executable, str(ROOT / "docs" / "generate_listings.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "data.md").read_text()
    assert page.count("$ latentddae inspect") == 11
    assert page.count("found = ") == 10
