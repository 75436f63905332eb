"""What a precision means on this machine."""

import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.core.precision import resolve_precision

CPU = torch.device("cpu")


def test_auto_names_what_the_hardware_has() -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", CPU) == ("bf16" if capable else "fp32")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16", CPU)
