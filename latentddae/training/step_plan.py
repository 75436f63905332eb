"""How many images a rank takes at once, and what a step needs: the formulas of planning/, applied
to a configuration of pretraining."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from latentddae.core import dist
from latentddae.core.precision import DTYPES, resolve_precision
from latentddae.models import attention, zoo
from latentddae.planning import fit
from latentddae.planning.activations import count_activations
from latentddae.planning.flops import training_flops
from latentddae.planning.outlook import device_memory, gigabytes
from latentddae.training.config import TrainConfig
from latentddae.training.deepspeed_config import plan_batch
from latentddae.training.muon import is_hidden_matrix
from latentddae.training.optimizers import OPTIMIZERS


def step_of(config: TrainConfig, ranks: int, device: torch.device) -> fit.Step:
    """The step of a resolved configuration on that many such devices. ConfigError if its batch
    cannot be cut."""
    engine, precision = config.engine, resolve_precision(config.engine.precision, device)
    with torch.device("meta"):
        model = zoo.build(config.model)
    tokens = max(shape[0] for shape in model.tap_shapes().values())
    backend = attention.backend_for(device, DTYPES[precision], tokens)
    if engine.attention != "auto":
        backend = "math" if engine.attention == "math" else "sdpa"
    name = cast(fit.PrecisionName, precision)
    muon = config.optim.name == "muon"
    hidden = [p for n, p in cast(nn.Module, model).named_parameters() if is_hidden_matrix(n, p)]
    return fit.Step(
        parameters=sum(p.numel() for p in model.parameters()),
        activations=count_activations(config.model, name, backend, engine.recompute_pointwise),
        flops_per_image=training_flops(model),
        global_batch=config.global_batch,
        ranks=ranks,
        micro=plan_batch(config.global_batch, engine.micro_batch, ranks).micro,
        zero_stage=engine.zero_stage,
        precision=name,
        averages=1 + len(config.ema.extra_halflives_images or ()),
        muon_parameters=sum(p.numel() for p in hidden) if muon else 0,
        highest_stage=cast(fit.Stage, OPTIMIZERS[config.optim.name].highest_zero_stage),
        checkpoint_blocks=engine.checkpoint_blocks,
        on_gpu=device.type == "cuda",
    )


def with_micro_batch(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with `engine.micro_batch` filled in where it is null: on GPUs the most
    images that fit into the smallest of them by formula, elsewhere a rank's whole share. A
    collective."""
    if config.engine.micro_batch is not None or device.type != "cuda":
        return config
    world = dist.world_from_environment()
    memories = dist.gather_objects(device_memory(device))
    step = step_of(config, world.size, device)
    micro = chosen_micro(step, memories)
    if world.is_main and micro < step.share:
        text = gigabytes(replace(step, micro=micro).bytes)
        print(f"engine.micro_batch={micro}: {text} per GPU by formula", file=sys.stderr)
    return replace(config, engine=replace(config.engine, micro_batch=micro))


def chosen_micro(step: fit.Step, memories: Sequence[float]) -> int:
    """Images per pass that fit into each of these memories, in bytes. Where not even one image
    does, one, and stderr says which settings would help: the formula may be too careful."""
    micro = fit.largest_micro(step, min(memories))
    if micro is not None:
        return micro
    if dist.world_from_environment().is_main:
        remedy = next(fit.remedies(step, min(memories)), "more ranks, or a smaller network")
        needed = gigabytes(replace(step, micro=1).bytes)
        print(
            f"warning: a step needs {needed} by formula, a GPU has {gigabytes(min(memories))}; "
            f"this would fit: {remedy}",
            file=sys.stderr,
        )
    return 1
