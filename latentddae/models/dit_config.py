"""The shape of a Diffusion Transformer: DiT's by default, and the options of its successors."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from latentddae.core.config import require
from latentddae.models.layers import NormName

MAX_DEPTH = 10_000  # each block is a module of its own
MAX_RATIO = 10_000.0
MAX_POSITIONS = 2**31  # numbers in the table of positions, which is computed at once


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape of a DiT. The defaults are DiT-XL/2 at 256 pixels without learned sigma."""

    kind: ClassVar[str] = "dit"
    augment_dim: ClassVar[int] = 0

    input_size: int = 32
    """Height and width of the latents."""
    patch_size: int = 2
    """Height and width of a patch, in latent pixels; one patch is one token."""
    in_channels: int = 4
    """Channels of the latents."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in multiples of hidden_size."""
    num_classes: int = 1000
    """Labels are 0 ... num_classes - 1, the null label is num_classes. 0: unconditional, without a
    label table."""
    learn_sigma: bool = False
    """Twice the output channels; the second half parametrises the reverse variance (DDPM)."""
    qk_norm: bool = False
    """Normalise queries and keys, head by head, so that attention logits cannot grow without bound
    (arXiv 2302.05442)."""
    norm: NormName = "layer"
    """`layer`: LayerNorm, with parameters on queries and keys only. `rms`: RMSNorm with a scale."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """`swiglu`: gated MLPs of two thirds of the hidden width, of the same size (LightningDiT)."""
    rope: bool = False
    """Turn queries and keys by their row and column (2-D RoPE), beside the position table."""
    position_grid: int = 0
    """Side of the grid, in tokens, whose positions the tokens are spread over: that of the network
    from which a warm start at another resolution comes. 0: their own."""
    adaln_shift: bool = True
    """Whether the condition shifts the inputs of attention and MLP, or scales and gates alone."""
    shared_adaln: bool = False
    """One modulation for all blocks and an offset for each (adaLN-single, arXiv 2310.00426), in
    place of one matrix per block: a third of a block's weights less.
    """
    register_tokens: int = 0
    """Learned tokens beside the image's (arXiv 2309.16588); they are in no block's output."""
    head_width: int = 0
    """Width of a wide and shallow transformer before the output (arXiv 2510.11690), which sees the
    patches anew and is modulated, token by token, by the last block's output. 0: none."""
    head_depth: int = 2
    """Blocks of the wide head."""
    head_heads: int = 16
    """Attention heads per block of the wide head."""

    def __post_init__(self) -> None:
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        require(
            self,
            positive=(*sizes, "head_depth", "head_heads"),
            non_negative=("num_classes", "register_tokens", "head_width", "position_grid"),
            at_most={"depth": MAX_DEPTH, "head_depth": MAX_DEPTH, "mlp_ratio": MAX_RATIO},
        )
        if self.mlp_hidden <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {self.hidden_size}")
        if self.tokens * self.hidden_size > MAX_POSITIONS:
            raise ValueError(
                f"input_size, patch_size and hidden_size give a table of {self.tokens:,} positions "
                f"of {self.hidden_size:,} channels; the largest has {MAX_POSITIONS:,} numbers"
            )
        self._check_heads("hidden_size", "num_heads")
        self._check_heads("head_width", "head_heads")
        if self.head_width:
            _ = self.head  # checked as a network of its own
        if self.norm not in get_args(NormName):
            raise ValueError(f"norm is layer or rms, got {self.norm!r}")
        if self.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp is gelu or swiglu, got {self.mlp!r}")

    def _check_heads(self, width_name: str, heads_name: str) -> None:
        width, heads = getattr(self, width_name), getattr(self, heads_name)
        if width % heads:
            raise ValueError(f"{width_name} {width} is not a multiple of {heads_name} {heads}")
        if self.rope and width // heads % 4:
            raise ValueError(
                f"rope needs heads of a multiple of 4 channels, {width_name} {width} and "
                f"{heads_name} {heads} give {width // heads}"
            )

    def for_data(
        self, *, size: int, channels: int, num_classes: int, learn_sigma: bool
    ) -> "DiTConfig":
        """This shape for latents of `size` and `channels`, labels and an objective.

        Raises ValueError where they do not fit.
        """
        return replace(
            self,
            input_size=size,
            in_channels=channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def positions(self) -> tuple[int, int]:
        """Tokens along one side, and the side of the grid that they are spread over."""
        return self.grid_size, self.position_grid or self.grid_size

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.grid_size**2

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLPs: two thirds of it with a gate, which has a matrix of its own."""
        hidden = int(self.hidden_size * self.mlp_ratio)
        return 2 * hidden // 3 if self.mlp == "swiglu" else hidden

    @property
    def modulations(self) -> int:
        """Vectors that modulate a block: shift, scale and gate of attention, then of the MLP."""
        return 6 if self.adaln_shift else 4

    @property
    def head(self) -> "DiTConfig":
        """The shape of the wide head's blocks."""
        return replace(
            self,
            hidden_size=self.head_width,
            num_heads=self.head_heads,
            depth=self.head_depth,
            shared_adaln=False,
            register_tokens=0,
            head_width=0,
        )
