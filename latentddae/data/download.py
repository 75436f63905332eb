"""Checkpoints at addresses, fetched once; nothing else is ever downloaded with a command.

    https://HOST/FILE#sha256=HEX            a file, kept below ~/.cache/latentddae
    hf://ORG/NAME[/FOLDER or FILE][@REVISION]   of the Hugging Face Hub, kept in the Hub's own cache

A download that was cut continues where it stopped. A file gets its name only with the hash that the
address, or the Hub, tells.
"""

import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from tqdm import tqdm

from latentddae.core.errors import ConfigError, DataError, InUseError, unreadable
from latentddae.core.files import exclusive, move, sha256, write_errors
from latentddae.core.redaction import without_secrets
from latentddae.core.retry import retried
from latentddae.data.remote import CHUNK, TIMEOUT_S, WEB

HUB = "hf://"
CONNECT_S = 10.0
"""For the first answer of a server: where there is no network, that is said within seconds."""
WANTED = ("config.json", "README.md", "model_index.json", "scheduler_config.json")
WEIGHTS = (".safetensors", ".index.json", ".pt", ".pth", ".bin")


class Download(NamedTuple):
    """A local copy, and what is recorded about it: address, revision, licence."""

    path: Path
    facts: dict[str, object]


def is_address(source: str) -> bool:
    """Whether this names something to be downloaded."""
    return source.startswith((HUB, "https://", "http://"))


def fetched(address: str) -> Download:
    """The local copy of an address, downloaded if it is not there yet.

    Raises ConfigError for an address without a hash, an unknown name or no network, DataError for
    bytes of another hash, UnavailableError if the server stops answering, WriteError.
    """
    return _from_hub(address) if address.startswith(HUB) else _from_web(address)


def cache_folder() -> Path:
    """Where files from web addresses are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentddae"


def _from_web(address: str) -> Download:
    url, _, fragment = address.partition("#")
    kind, _, expected = fragment.partition("=")
    if not WEB.fullmatch(url):
        raise ConfigError(f"{address} is no address of a file")
    if kind != "sha256" or not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        raise ConfigError(
            f"{address} does not tell the hash of its file: append #sha256= and 64 digits, or "
            "fetch the file yourself and name it"
        )
    expected = expected.lower()
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    if not name:
        raise ConfigError(f"{address} names no file")
    target = cache_folder() / expected[:16] / name
    while not target.exists():
        try:
            with exclusive(target.parent, "download"):
                if not target.exists():
                    download(url, target, expected)
        except InUseError:  # another rank fetches it
            time.sleep(0.5)
    if sha256(target) != expected:
        raise DataError(f"{target} is damaged: its sha256 is not that of {address}; delete it")
    return Download(target, {"address": without_secrets(url)})


def download(url: str, target: Path, expected: str) -> None:
    """Fetch a file, from where an earlier try was cut; it appears with the expected sha256 only.

    Raises as `fetched`.
    """
    partial = target.with_name(f"{target.name}.partial")
    continued = partial.exists()
    _check_reachable(url, target)
    retried(lambda: _continue(url, partial), url)
    if (found := sha256(partial)) != expected and continued:  # of another version of the file?
        partial.unlink()
        retried(lambda: _continue(url, partial), url)
        found = sha256(partial)
    if found != expected:
        partial.unlink()
        raise DataError(f"{url} holds a file of sha256 {found}, expected was {expected}")
    with write_errors(target):
        move(partial, target)


def _check_reachable(url: str, target: Path) -> None:
    """ConfigError, within seconds, where there is no network or no such file."""
    try:
        with _open(url, 0, CONNECT_S):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 425, 429):
            raise ConfigError(f"{url}: {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"{url} cannot be reached ({reason}); fetch it where there is a network and put it at "
            f"{target}, or name your own copy"
        ) from error


def _open(url: str, start: int, timeout: float) -> http.client.HTTPResponse:
    """The answer of a server, from byte `start` on if it can do that."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    return cast(http.client.HTTPResponse, urllib.request.urlopen(request, timeout=timeout))


def _continue(url: str, partial: Path) -> None:
    """Append what is missing. Transient errors pass; what has arrived stays."""
    start = partial.stat().st_size if partial.exists() else 0
    try:
        answer = _open(url, start, TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is missing, or another file: the hash decides
            return
        raise
    with answer, write_errors(partial), open(partial, "ab") as file:
        if answer.status != 206:  # the server begins at the first byte
            file.truncate(0)
            start = 0
        length = int(answer.headers.get("Content-Length", -1))
        _append(answer, file, url, length)


def _append(answer: IO[bytes], file: IO[bytes], url: str, length: int) -> None:
    """Copy `length` bytes (-1: unknown). ConnectionError if fewer arrive."""
    count = 0
    hidden = not sys.stderr.isatty()
    with tqdm(
        total=length, desc=without_secrets(url), unit="B", unit_scale=True, disable=hidden
    ) as bar:
        try:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                count += len(chunk)
                bar.update(len(chunk))
        except (http.client.HTTPException, ValueError) as error:
            raise unreadable(f"{url} cannot be read: {error}", error) from error
    file.flush()
    os.fsync(file.fileno())
    if length >= 0 and count != length:
        raise ConnectionError(f"the connection ended after {count} of {length} bytes")


def _from_hub(address: str) -> Download:
    """The files of a network in the Hub's cache, each with the hash that the Hub records."""
    name, _, revision = address.removeprefix(HUB).partition("@")
    parts = name.strip("/").split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.\-]+", p) and p.strip(".") for p in parts):
        raise ConfigError(f"{address} is not hf://ORG/NAME[/FOLDER or FILE][@REVISION]")
    inside = "/".join(parts[2:])
    try:
        root, hashes, licence = _from_repository("/".join(parts[:2]), revision or None, inside)
    except ConfigError as error:
        raise ConfigError(f"{address}: {error}") from error
    for file, recorded in hashes.items():
        if recorded is not None and sha256(root / file) != recorded:
            raise DataError(f"{root / file} is damaged: its sha256 is not the one on the Hub")
    facts: dict[str, object] = {"address": without_secrets(address), "revision": root.name}
    if licence:
        facts["licence"] = licence
    return Download(root / _named(list(hashes), inside, address), facts)


def _from_repository(
    repository: str, revision: str | None, inside: str
) -> tuple[Path, dict[str, str | None], str]:
    """The local folder of a repository, the hashes (where there are) of the files that were asked
    for, and the licence: from the Hub, or without a network from its cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=CONNECT_S
        )
        hashes = {
            file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()
        }
        names = wanted(list(hashes), inside)
        if not names:
            raise ConfigError(f"no checkpoint; the repository holds {_listed(hashes)}")
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
        licence = info.card_data.get("license") if info.card_data else None
        return root, {name: hashes[name] for name in names}, str(licence or "")
    except ConfigError:
        raise
    except Exception as error:  # no network, unknown name, no permission: the message says it
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        try:
            root = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:
            raise ConfigError(f"cannot be fetched from the Hub: {reason}") from error
    files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return root, {name: _blob_hash(root / name) for name in wanted(files, inside)}, ""


def _blob_hash(path: Path) -> str | None:
    """The hash after which the Hub's cache names a large file."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _named(names: Sequence[str], inside: str, address: str) -> str:
    """What is opened: a folder, or the only file of weights where there is no configuration."""
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if inside in names or any(Path(name).name == "config.json" for name in names):
        return inside
    if len(weights) != 1:
        raise ConfigError(f"{address} holds {_listed(weights)}: name one of them")
    return weights[0]


def wanted(names: Sequence[str], inside: str) -> list[str]:
    """The files of a repository that a network at `inside` needs: its configuration, and its
    weights in one format, safetensors before others."""
    if inside in names:
        return [inside]
    here = [name for name in names if not inside or name.startswith(f"{inside}/")]
    network = [name for name in here if not _is_autoencoder(name, inside)]
    chosen = [name for name in here if Path(name).name in WANTED]
    weights = [name for name in network if name.endswith(WEIGHTS) and name not in chosen]
    stored = [name for name in weights if ".safetensors" in name]
    full = [name for name in stored or weights if ".fp16." not in name]
    return chosen + (full or stored or weights) if weights else []


def _is_autoencoder(name: str, inside: str) -> bool:
    """Whether a file of a pipeline belongs to its autoencoder, which is opened by its own name."""
    return "vae" in Path(name).relative_to(inside or ".").parts[:-1]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "nothing"
