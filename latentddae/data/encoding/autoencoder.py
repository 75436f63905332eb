"""The autoencoder between pixels and latents; the only importer of diffusers.

autoencoder = open_autoencoder("stabilityai/sd-vae-ft-ema")  # Hub id, folder, "demo", "none"
stored = autoencoder.encode(images)                          # (N, 3, H, W) -> moments
images = autoencoder.decode(spec.unscale(x0))
"""

import re
import sys
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentddae.core.errors import ConfigError, is_out_of_memory
from latentddae.core.files import read_json, state_dict_hash
from latentddae.core.precision import DTYPES
from latentddae.data.encoding import ldm_file
from latentddae.data.latents import LatentSpec

KINDS: dict[str, Literal["moments", "deterministic"]] = {  # diffusers class -> what it gives
    "AutoencoderKL": "moments",
    "AutoencoderTiny": "deterministic",
    "AutoencoderDC": "deterministic",
}
DEFAULT_ID = "stabilityai/sd-vae-ft-ema"  # the choice of DiT, SiT and REPA
FILE = "diffusion_pytorch_model"
WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".fp16.safetensors"),
    *(".bin", ".bin.index.json", ".fp16.bin"),
)
"""Endings of files of weights, the best first."""
PROBE_PIXELS = 64  # encoding one image of this size gives channels and reduction factor


class Autoencoder:
    """A frozen autoencoder; with `module=None`, the identity on pixels.

    Computes in float32 (TF32 convolutions where the hardware has them), with autocast off, or in
    bfloat16.
    """

    def __init__(
        self,
        source: str,
        module: nn.Module | None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}, allowed: fp32, bf16")
        self.source, self.device, self.precision = source, torch.device(device), precision
        self.kind = "image" if module is None else KINDS[type(module).__name__]
        self.sha256 = "" if module is None else state_dict_hash(module.state_dict())
        self.module: Any = None
        if module is not None:
            self.module = module.eval().requires_grad_(False).to(device)
            if precision != "fp32":
                self.module.to(DTYPES[precision])
            if self.device.type == "cuda":
                self.module.to(memory_format=torch.channels_last)
        self.micro_batch: int | None = None
        """Images that fit into memory at a time; None until memory has been exhausted once."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> one stored view each, unscaled: float32 on this device.

        Kind moments: (N, 2C, h, w) posterior mean and log-variance; deterministic: (N, C, h, w);
        image: (N, 3, H, W), unchanged.
        """
        images = images.to(self.device, torch.float32)
        return images if self.module is None else self._in_chunks(self._encode, images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W) in [-1, 1], float32."""
        latents = latents.to(self.device, torch.float32)
        out = latents if self.module is None else self._in_chunks(self._decode, latents)
        return out.clamp(-1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        out = self.module.encode(images)
        if self.kind == "moments":
            return out.latent_dist.parameters
        return out.latents if hasattr(out, "latents") else out.latent

    def _decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents).sample

    def _in_chunks(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """`run` on chunks of (N, ...), halved in size until they fit into memory."""
        batch = batch.to(DTYPES[self.precision])
        while True:
            size = min(self.micro_batch or len(batch), len(batch))
            try:
                with torch.autocast(self.device.type, enabled=False):
                    return torch.cat([run(chunk).float() for chunk in batch.split(size)])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ConfigError(
                        f"out of memory with one {tuple(batch.shape[1:])} input on {self.device}"
                    ) from error
                self.micro_batch = size // 2
                tqdm.write(f"out of memory: {self.micro_batch} images at once", file=sys.stderr)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def spec(self, resolution: int, views: tuple[str, ...] = ("original",)) -> LatentSpec:
        """The spec of latents of images of `resolution` pixels.

        ConfigError if the autoencoder cannot encode that size.
        """
        if self.module is None:
            return LatentSpec(kind="image", channels=3, size=resolution, views=views)
        probe = self.encode(torch.zeros(1, 3, PROBE_PIXELS, PROBE_PIXELS))
        factor = PROBE_PIXELS // probe.shape[-1]
        if resolution % factor:
            raise ConfigError(
                f"resolution {resolution} is not divisible by the autoencoder's {factor}"
            )
        config: Any = self.module.config
        kind = KINDS[type(self.module).__name__]
        return LatentSpec(
            kind=kind,
            channels=probe.shape[1] // (2 if kind == "moments" else 1),
            size=resolution // factor,
            scaling_factor=float(config.get("scaling_factor") or 1.0),
            shift_factor=float(config.get("shift_factor") or 0.0),
            latents_mean=_numbers(config.get("latents_mean")),
            latents_std=_numbers(config.get("latents_std")),
            autoencoder=self.source,
            autoencoder_class=type(self.module).__name__,
            autoencoder_sha256=self.sha256,
            views=views,
        )


def _numbers(values: Iterable[float] | None) -> tuple[float, ...]:
    return tuple(float(value) for value in values or ())


def open_autoencoder(
    source: str, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Autoencoder:
    """A local folder in the format of diffusers (or a pipeline's, with `vae/` in it), a Hub id
    ORG/NAME[/SUBFOLDER][@REVISION], a file of latent-diffusion (see ldm_file), "demo" (ships with
    the package) or "none" (pixels)."""
    if source == "none":
        return Autoencoder(source, None, device, precision)
    if source.endswith(ldm_file.SUFFIXES) and Path(source).is_file():
        path = Path(source).resolve()
        return Autoencoder(str(path), _from_ldm(path), device, precision)
    folder = Path(str(files("latentddae") / "assets" / "autoencoder"))
    if source != "demo":
        folder = _local(source) if Path(source).is_dir() else _from_hub(source)
        source = str(folder.resolve()) if Path(source).is_dir() else source
    return Autoencoder(source, _load(folder), device, precision)


def open_matching(
    spec: LatentSpec, source: str | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The autoencoder that a spec was made with. ConfigError if its weights have another hash.

    Specs of published checkpoints carry no hash for moments: there only the name is compared.
    """
    autoencoder = open_autoencoder(source or spec.autoencoder, device)
    has_hash = spec.kind != "moments" or bool(spec.autoencoder_sha256)
    if has_hash and autoencoder.sha256 != spec.autoencoder_sha256:
        raise ConfigError(
            f"autoencoder {autoencoder.source} has weights {autoencoder.sha256[:12] or 'none'}, "
            f"the latents were made with {spec.autoencoder} "
            f"{spec.autoencoder_sha256[:12] or 'none'}"
        )
    return autoencoder


def _load(folder: Path) -> nn.Module:
    import diffusers

    config = read_json(folder / "config.json", "configuration of an autoencoder")
    name = config.get("_class_name")
    if name not in KINDS:
        raise ConfigError(f"autoencoder {folder} is of class {name!r}, known: {', '.join(KINDS)}")
    weights = _weights_of(folder)
    if weights is None:
        raise ConfigError(
            f"autoencoder {folder} has no weights: none of "
            f"{', '.join(f'{FILE}{ending}' for ending in WEIGHTS)}"
        )
    if ".fp16" in weights:
        print(f"{folder} has its weights in half precision only, rounded", file=sys.stderr)
    try:
        return getattr(diffusers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors="safetensors" in weights,
            variant="fp16" if ".fp16" in weights else None,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"autoencoder {folder} cannot be loaded: {error}") from error


def _from_ldm(path: Path) -> nn.Module:
    state = ldm_file.read(path)
    shape = ldm_file.shape_of(state, path)
    module = new_autoencoder_kl(**shape, scaling_factor=1.0)
    weights = ldm_file.to_diffusers(state, len(shape["block_out_channels"]))
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"autoencoder {path} is no AutoencoderKL: {error}") from error
    return cast(nn.Module, module)


def _weights_of(folder: Path) -> str | None:
    """The ending of the files of weights that are taken; None if there are none."""
    return next((ending for ending in WEIGHTS if (folder / f"{FILE}{ending}").is_file()), None)


def _local(source: str) -> Path:
    """A folder, or the autoencoder's inside a pipeline. ConfigError without a configuration."""
    folder = Path(source)
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        f"autoencoder {folder} has no config.json, nor has {folder / 'vae'}: give a folder in the "
        "format of diffusers"
    )


def _from_hub(source: str) -> Path:
    """The folder of ORG/NAME[/SUBFOLDER][@REVISION] in the Hub's cache; downloads its two files:
    weights as safetensors where there are any, else in half precision, else pickled."""
    name, _, revision = source.partition("@")
    parts = name.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.\-]+", p) and p.strip(".") for p in parts):
        raise ConfigError(f"autoencoder {source} is no folder, Hub id, 'demo' or 'none'")
    subfolders = ["/".join(parts[2:])] if parts[2:] else ["", "vae"]
    for subfolder in subfolders:
        for ending in WEIGHTS:
            folder = _snapshot(source, "/".join(parts[:2]), revision or None, subfolder, ending)
            if not (folder / "config.json").is_file():
                break
            if _weights_of(folder):
                return folder
    raise ConfigError(
        f"autoencoder {source}: the repository has no config.json with weights named {FILE}.* in "
        f"{' or '.join(name or 'its top folder' for name in subfolders)}"
    )


def _snapshot(
    source: str, repository: str, revision: str | None, subfolder: str, ending: str
) -> Path:
    """The local folder with a configuration and weights of one kind, as far as there are any."""
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    names = [f"{prefix}config.json", f"{prefix}{FILE}{ending}"]
    if ending.endswith(".index.json"):
        names.append(f"{prefix}{FILE}-*")  # the shards
    try:
        root = snapshot_download(repository, revision=revision, allow_patterns=names)
    except Exception as error:  # no network, unknown name, no permission: the message says it
        raise ConfigError(
            f"autoencoder {source} is no folder and not on the Hub: {error}"
        ) from error
    return Path(root) / subfolder


def new_autoencoder_kl(**config: Any) -> Any:
    """An untrained AutoencoderKL of diffusers, initialised from the global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)
