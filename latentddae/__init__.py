"""Denoising diffusion autoencoders at scale: encode, pretrain, transfer (arXiv 2303.09769)."""

__version__ = "0.1.0"
