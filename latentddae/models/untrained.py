"""Untrained networks as baselines: what of a probe's accuracy is the architecture's alone."""

import torch
from torch import nn

from latentddae.models.layers import modulation_layers

RANDOM_GATE_STD = 0.5
"""Standard deviation of the modulation biases, about that of trained networks."""


@torch.no_grad()
def randomize_gates(model: nn.Module, seed: int) -> None:
    """Open the gates of an untrained network at random, in place: the "random features" baseline.

    As initialised every gate is zero and each block is the identity, so that the features are a
    patch embedding. After this the modulation weights are N(0, 0.02^2) and their biases
    N(0, 0.5^2): shifts, scales and gates are of the size that training gives them, so attention and
    MLPs mix tokens and channels.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for layer in modulation_layers(model):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
        nn.init.normal_(layer.bias, std=RANDOM_GATE_STD, generator=generator)
