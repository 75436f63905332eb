"""A small data set of random latents, written by the package's own writer."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae.data.encoding.autoencoder import Autoencoder, open_autoencoder
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import write_split

SPEC = LatentSpec(
    kind="moments",
    channels=4,
    size=4,
    scaling_factor=0.5,
    autoencoder="toy",
    autoencoder_class="AutoencoderKL",
    autoencoder_sha256="ab" * 32,
    views=("original", "mirror"),
)


@pytest.fixture
def spec() -> LatentSpec:
    return SPEC


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray]]:
    """make_set(n, shard_size) -> (folder, the stored array (n, 2, 8, 4, 4) float16)."""

    def make(
        n: int = 20, shard_size: int = 8, split: str = "train", spec: LatentSpec = SPEC
    ) -> tuple[Path, np.ndarray]:
        rng = np.random.default_rng(n)
        shape = (n, len(spec.views), *spec.stored_shape)
        stored = rng.normal(size=shape).astype(np.float16)
        if spec.kind == "image":
            stored = rng.integers(0, 256, shape).astype(np.uint8)
        labels = [i % 3 for i in range(n)]
        keys = [f"class{i % 3}/img_{i:05d}" for i in range(n)]
        write_split(
            tmp_path / "set", split, spec, stored, labels, keys, ["a", "b", "c"], shard_size
        )
        return tmp_path / "set", stored

    return make


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A class folder of 30 small JPEGs of different sizes: photos/{1,2,10}/img_NN.jpg."""
    return write_photos(tmp_path / "photos")


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """make_photos(each=100): the same with more of them."""
    return lambda **options: write_photos(tmp_path / "many", **options)


def write_photos(
    root: Path, classes: tuple[str, ...] = ("1", "2", "10"), each: int = 10, seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            coarse = rng.integers(0, 256, (4, 4 + i % 3, 3)).astype(np.uint8)
            size = (36 + 5 * (i % 4), 33 + 7 * (i % 3))
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image.save(root / name / f"img_{i:02d}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def small_autoencoder() -> Autoencoder:
    """The one that ships with the package."""
    return open_autoencoder("demo")


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """serve(folder) -> its address on this machine."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            del args

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
