"""The autoencoder between pixels and latents; the only importer of diffusers.

autoencoder = open_autoencoder("stabilityai/sd-vae-ft-ema")  # Hub id, folder, "demo", "none"
stored = autoencoder.encode(images)                          # (N, 3, H, W) -> moments
images = autoencoder.decode(spec.unscale(x0))
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentddae.core.errors import ConfigError
from latentddae.data.latents import LatentSpec

KINDS: dict[str, Literal["moments", "deterministic"]] = {  # diffusers class -> what it gives
    "AutoencoderKL": "moments",
    "AutoencoderTiny": "deterministic",
    "AutoencoderDC": "deterministic",
}
DEFAULT_ID = "stabilityai/sd-vae-ft-ema"  # the choice of DiT, SiT and REPA
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_PIXELS = 64  # an image of this size tells the number of channels and the reduction factor


class Autoencoder:
    """A frozen autoencoder. `module` None is the identity on pixels.

    It computes in float32 (TF32 convolutions where the hardware has them) with autocast off, or in
    bfloat16 on request.
    """

    def __init__(
        self,
        source: str,
        module: nn.Module | None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}, allowed: {', '.join(PRECISIONS)}")
        self.source, self.device, self.precision = source, torch.device(device), precision
        self.kind = "image" if module is None else KINDS[type(module).__name__]
        self.sha256 = "" if module is None else weights_sha256(module)
        self.module: Any = None
        if module is not None:
            self.module = module.eval().requires_grad_(False).to(device)
            if precision != "fp32":
                self.module.to(PRECISIONS[precision])
            if self.device.type == "cuda":
                self.module.to(memory_format=torch.channels_last)
        self.micro_batch: int | None = None
        """So many images fit into memory at once; None until that was found out."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> one stored view each, unscaled: float32 on this device.

        Kind moments: (N, 2C, h, w) posterior mean and log-variance; deterministic: (N, C, h, w);
        image: as it came.
        """
        images = images.to(self.device, torch.float32)
        return images if self.module is None else self._in_parts(self._encode, images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (N, C, h, w), as `LatentSpec.unscale` gives them -> images (N, 3, H, W) in
        [-1, 1]."""
        latents = latents.to(self.device, torch.float32)
        out = latents if self.module is None else self._in_parts(self._decode, latents)
        return out.clamp(-1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        out = self.module.encode(images)
        if self.kind == "moments":
            return out.latent_dist.parameters
        return out.latents if hasattr(out, "latents") else out.latent

    def _decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents).sample

    def _in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """`run` on as many rows at once as memory allows; halves the number until it fits."""
        batch = batch.to(PRECISIONS[self.precision])
        while True:
            size = min(self.micro_batch or len(batch), len(batch))
            try:
                with torch.autocast(self.device.type, enabled=False):
                    return torch.cat([run(part).float() for part in batch.split(size)])
            except RuntimeError as error:
                if not _out_of_memory(error):
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
        """What this autoencoder makes of images of `resolution` pixels. ConfigError if it
        cannot."""
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
            autoencoder=self.source,
            autoencoder_class=type(self.module).__name__,
            autoencoder_sha256=self.sha256,
            views=views,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def open_autoencoder(
    source: str, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Autoencoder:
    """A local folder, a Hub id (perhaps with a subfolder), "demo" (ships with the package) or
    "none"."""
    if source == "none":
        return Autoencoder(source, None, device, precision)
    folder = Path(str(files("latentddae") / "assets" / "autoencoder"))
    if source != "demo":
        folder = Path(source) if Path(source).is_dir() else _from_hub(source)
        source = str(folder.resolve()) if Path(source).is_dir() else source
    return Autoencoder(source, _load(folder), device, precision)


def open_matching(
    spec: LatentSpec, source: str | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The autoencoder that a spec was made with; another one, by its hash, is a ConfigError.

    The moments of a published checkpoint come without a hash: there the name has to do.
    """
    found = open_autoencoder(source or spec.autoencoder, device)
    named_only = spec.kind == "moments" and not spec.autoencoder_sha256
    if found.sha256 != spec.autoencoder_sha256 and not named_only:
        raise ConfigError(
            f"autoencoder {found.source} has weights {found.sha256[:12] or 'none'}, the latents "
            f"were made with {spec.autoencoder} {spec.autoencoder_sha256[:12] or 'none'}"
        )
    return found


def _load(folder: Path) -> nn.Module:
    import diffusers

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"autoencoder {folder} has no readable config.json: {error}") from error
    name = config.get("_class_name")
    if name not in KINDS:
        raise ConfigError(f"autoencoder {folder} is of class {name!r}, known: {', '.join(KINDS)}")
    if config.get("latents_mean") or config.get("latents_std"):
        raise ConfigError(
            f"autoencoder {folder} normalises per channel, which is not supported yet"
        )
    try:
        return getattr(diffusers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"autoencoder {folder} cannot be loaded: {error}") from error


def _from_hub(source: str) -> Path:
    """Download (or find in the cache) the two files of ORG/NAME, ORG/NAME/SUBFOLDER, each perhaps
    with @REVISION."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    parts = name.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.\-]+", p) and p.strip(".") for p in parts):
        raise ConfigError(f"autoencoder {source} is no folder, Hub id, 'demo' or 'none'")
    subfolder = "/".join(parts[2:])
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors"]
    try:
        root = snapshot_download(
            "/".join(parts[:2]), revision=revision or None, allow_patterns=wanted
        )
    except Exception as error:  # no network, no such name, no permission: all say it themselves
        raise ConfigError(
            f"autoencoder {source} is no folder and not on the Hub: {error}"
        ) from error
    return Path(root) / subfolder


def new_autoencoder_kl(**config: Any) -> Any:
    """An untrained AutoencoderKL of diffusers, from the global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def weights_sha256(module: nn.Module) -> str:
    """A hash over names, shapes and float32 numbers of all weights: the same for any file they came
    from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
