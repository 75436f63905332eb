"""Folders of diffusers' DiTTransformer2DModel, read and written without diffusers.

    FOLDER/config.json, FOLDER/diffusion_pytorch_model.safetensors      a network
    PIPELINE/transformer/..., PIPELINE/scheduler/..., PIPELINE/vae/...  a pipeline, read only

A network's folder does not tell the objective; the scheduler of a pipeline does. diffusers differs
from DiT in two numbers, see docs/networks.md: its sinusoid of the time has `downscale_freq_shift=1`
(DiT has 0), which no setting of the folder changes, and the epsilon of a block's second norm is
`norm_eps` of `config.json`, where we write DiT's 1e-6.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from latentddae.core import safetensors_stream
from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import read_json, write_json
from latentddae.core.safetensors_stream import Entry, entry
from latentddae.data.encoding.autoencoder import KINDS
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.ddpm import DDPM
from latentddae.models.convert import dit, foreign
from latentddae.models.convert.dit import Family, checked, checkpoint_of
from latentddae.models.convert.foreign import CheckpointHints, ForeignFile
from latentddae.models.dit_config import DiTConfig
from latentddae.models.layers import LAYER_NORM_EPS
from latentddae.models.portable import Checkpoint, Weights, listed
from latentddae.models.positions import sincos_table

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # now, and in folders of before 2024
FILE = "diffusion_pytorch_model"
WEIGHTS = (
    *(".safetensors.index.json", ".safetensors", ".fp16.safetensors"),
    *(".bin.index.json", ".bin", ".fp16.bin"),
)
"""Endings of files of weights, the first that is there is taken."""
SHARD_BYTES = 10_000_000_000  # diffusers' own limit of one file

Json = Mapping[str, object]

OUTSIDE = {  # DiT's name -> diffusers'
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
IN_EVERY_BLOCK = {  # one embedder in DiT, a copy in each block of diffusers
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
LABEL_TABLE = "y_embedder.embedding_table.weight"
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
DIT_SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def matches(path: Path) -> bool:
    """Whether a folder holds a DiTTransformer2DModel, or a pipeline with one."""
    folder = network_folder(path)
    if not (folder / "config.json").is_file():
        return False
    settings = read_json(folder / "config.json", "a checkpoint")
    return isinstance(settings, dict) and settings.get("_class_name") in CLASSES


def network_folder(path: Path) -> Path:
    """The folder of the network: that of a pipeline is below it."""
    inner = path / "transformer"
    return inner if (inner / "config.json").is_file() else path


def load(
    path: Path, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """The checkpoint of a folder; see zoo.load.

    Raises ConfigError for a network that is no DiT or an objective that nobody told, DataError for
    unreadable, missing, unknown or misshapen weights.
    """
    folder = network_folder(path)
    settings = read_json(folder / "config.json", "a checkpoint")
    _check_settings(settings, folder)
    parts = weight_files(folder)
    state = from_diffusers(_read(parts), int(settings["num_layers"]), folder)
    dim, patch = state["x_embedder.proj.weight"].shape[0], int(settings["patch_size"])
    state["pos_embed"] = sincos_table(dim, int(settings["sample_size"]) // patch).float()
    file = ForeignFile(folder, {"ema": state}, bare=True, parts=parts)
    family = _family(file, folder, hints)
    hints = replace(hints, num_heads=int(settings["num_attention_heads"]))
    latents = None if hints.latents_like else _latents(folder, settings)
    return checkpoint_of(file, weights, device, hints, family, latents)


def _check_settings(settings: Json, folder: Path) -> None:
    """Refuse what DiT has not."""
    needed = ("num_layers", "patch_size", "sample_size", "num_attention_heads")
    missing = [name for name in needed if not isinstance(settings.get(name), int)]
    if missing:
        raise DataError(f"{folder}/config.json lacks {', '.join(missing)}")
    for name, value in {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }.items():
        if settings.get(name, value) != value:
            raise ConfigError(f"{folder} has {name}={settings[name]}; a DiT has {value}")


def _family(file: ForeignFile, folder: Path, hints: CheckpointHints) -> Family:
    """By the scheduler of the pipeline around a network, else by what the user states."""
    path = folder.parent / "scheduler" / "scheduler_config.json"
    if folder.name == "transformer" and path.is_file():
        scheduler = read_json(path, "settings of a scheduler")
        if all(scheduler.get(name) == value for name, value in DIT_SCHEDULE.items()):
            return checked(file, hints, Family("DiT", DDPM(preset="dit")))
    return dit.family_of(file, hints, has_projectors=False)


def _latents(folder: Path, settings: Json) -> LatentSpec | None:
    """The latents of the autoencoder of the pipeline around a network, if there is one."""
    vae = folder.parent / "vae"
    if folder.name != "transformer" or not (vae / "config.json").is_file():
        return None
    config = read_json(vae / "config.json", "configuration of an autoencoder")
    size, channels, name = (
        settings["sample_size"],
        config.get("latent_channels"),
        config.get("_class_name", "AutoencoderKL"),
    )
    assert isinstance(size, int)
    if name not in KINDS or not isinstance(channels, int):
        raise ConfigError(
            f"{vae} holds a {name} with latent_channels={channels}; known are "
            f"{', '.join(KINDS)}: give --latents-like and a data folder that holds its latents"
        )
    return LatentSpec(
        kind=KINDS[name],
        channels=channels,
        size=size,
        scaling_factor=float(config.get("scaling_factor") or 0.18215),
        shift_factor=float(config.get("shift_factor") or 0.0),
        latents_mean=tuple(config.get("latents_mean") or ()),
        latents_std=tuple(config.get("latents_std") or ()),
        autoencoder=str(vae.resolve()),
        autoencoder_class=name,
    )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with the weights of a network, shards in order. Raises ConfigError without any."""
    for ending in WEIGHTS:
        file = folder / f"{FILE}{ending}"
        if file.is_file():
            return _shard_files(file) if ending.endswith(".index.json") else (file,)
    raise ConfigError(f"{folder} has no weights: neither {FILE}.safetensors (or .bin) nor shards")


def _shard_files(index: Path) -> tuple[Path, ...]:
    content = read_json(index, "an index of shards")
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise DataError(f"{index} is no index of shards: it has no weight_map")
    names = sorted(set(parts.values()))
    if any(Path(name).name != name for name in names):
        raise DataError(f"{index} names files outside its folder")
    return tuple(index.parent / name for name in names)


def _read(parts: tuple[Path, ...]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for part in parts:
        state |= foreign.read(part).state("ema")
    return state


def from_diffusers(state: Mapping[str, Tensor], depth: int, path: Path) -> dict[str, Tensor]:
    """Weights under DiT's names, of the published shapes, from those under diffusers'.

    Raises DataError listing the names that are missing or unknown, or for copies of the embedders
    that differ.
    """
    rest = dict(state)
    missing = [name for name in _names(depth) if name not in rest]
    unknown = sorted(rest.keys() - set(_names(depth)) - {"pos_embed.pos_embed"})
    faults = {"lacks": missing, "holds what a DiT has not:": unknown}
    for fault, names in faults.items():
        if names:
            raise DataError(f"{path} {fault} {listed(names)}")
    out = {
        f"{ours}.{kind}": rest[f"{theirs}.{kind}"]
        for ours, theirs in OUTSIDE.items()
        for kind in ("weight", "bias")
    }
    out |= _embedders(rest, depth, path)
    for block in range(depth):
        prefix = f"transformer_blocks.{block}."
        for kind in ("weight", "bias"):
            qkv = [rest.pop(f"{prefix}{name}.{kind}") for name in QKV]
            out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            for ours, theirs in IN_BLOCK.items():
                out[f"blocks.{block}.{ours}.{kind}"] = rest[f"{prefix}{theirs}.{kind}"]
    return out


def _embedders(state: Mapping[str, Tensor], depth: int, path: Path) -> dict[str, Tensor]:
    """The one embedder of time and labels; a table with nothing but a null row of zeros is none."""
    out = {}
    for ours, theirs in _copied():
        copies = [state[f"transformer_blocks.{block}.{theirs}"] for block in range(depth)]
        if not all(torch.equal(copy, copies[0]) for copy in copies):
            raise DataError(f"{path}: the blocks differ in {theirs}, of which a DiT has one")
        out[ours] = copies[0]
    if len(out[LABEL_TABLE]) == 1 and not out[LABEL_TABLE].any():
        del out[LABEL_TABLE]
    return out


def _copied() -> Iterator[tuple[str, str]]:
    """DiT's name and diffusers', in each block, of the embedders' weights."""
    for ours, theirs in IN_EVERY_BLOCK.items():
        for kind in ("weight",) if "table" in ours else ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _names(depth: int) -> list[str]:
    """All of diffusers' names of a network."""
    modules = [*OUTSIDE.values()]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    for block in range(depth):
        inside = [f"{name}.{k}" for name in (*IN_BLOCK.values(), *QKV) for k in ("weight", "bias")]
        inside += [theirs for _, theirs in _copied()]
        names += [f"transformer_blocks.{block}.{name}" for name in inside]
    return names


def save(folder: Path, checkpoint: Checkpoint, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a network as diffusers reads it, tensor by tensor, and return its (new) folder.

    Raises ConfigError for a network that DiTTransformer2DModel cannot be.
    """
    config = checkpoint.model.config
    settings = settings_of(config)
    assert isinstance(config, DiTConfig)
    entries = to_diffusers(checkpoint.model.state_dict(), config.depth)
    shards = _shards(entries, shard_bytes)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", settings)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        place = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{FILE}{place}.safetensors"
        content = {name: entries[name] for name in names}
        safetensors_stream.write(folder / file, content, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(entry.nbytes for entry in entries.values())}
        index = {"metadata": total, "weight_map": weight_map}
        (folder / f"{FILE}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def settings_of(config: object) -> dict[str, object]:
    """`config.json` of a network. Raises ConfigError naming the fields that diffusers has not."""
    if not isinstance(config, DiTConfig):
        raise ConfigError("only a DiT can be a DiTTransformer2DModel")
    defaults = asdict(DiTConfig())
    sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    free = {*sizes, "num_classes", "learn_sigma", "head_depth", "head_heads"}
    options = {k: v for k, v in asdict(config).items() if k not in free and v != defaults[k]}
    if options:
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        raise ConfigError(f"a DiTTransformer2DModel cannot have {named}")
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": LAYER_NORM_EPS,
    }


def to_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Entry]:
    """Weights under diffusers' names from those under DiT's, of any shape (their own).

    Without a label table there is one with a null row of zeros: class 0 then changes nothing.
    """
    if LABEL_TABLE not in state:
        width = len(state["x_embedder.proj.bias"])
        state = {**state, LABEL_TABLE: state["x_embedder.proj.bias"].new_zeros(1, width)}
    out = {
        f"{theirs}.{kind}": entry(state[f"{ours}.{kind}"])
        for ours, theirs in OUTSIDE.items()
        for kind in ("weight", "bias")
    }
    for block in range(depth):
        prefix = f"transformer_blocks.{block}."
        out |= {f"{prefix}{theirs}": entry(state[ours]) for ours, theirs in _copied()}
        for kind in ("weight", "bias"):
            for ours, theirs in IN_BLOCK.items():
                out[f"{prefix}{theirs}.{kind}"] = entry(state[f"blocks.{block}.{ours}.{kind}"])
            qkv = state[f"blocks.{block}.attn.qkv.{kind}"]
            thirds = rearrange(qkv, "(three rows) ... -> three rows ...", three=3)
            for name, third in zip(QKV, thirds, strict=True):
                out[f"{prefix}{name}.{kind}"] = entry(third)
    return out


def _shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Names cut into files of at most `limit` bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, one in entries.items():
        if shards[-1] and size + one.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += one.nbytes
    return shards
