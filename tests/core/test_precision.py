"""What a precision means on this machine."""

import pytest
import torch

from latentddae.core import precision
from latentddae.core.errors import ConfigError
from latentddae.core.precision import products_of, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", "bf16"),
        (False, True, "GenuineIntel", "fp32"),  # half as fast as fp32 without AMX
        (False, True, "AuthenticAMD", "bf16"),
        (False, False, "AuthenticAMD", "fp32"),
        (False, False, "", "fp32"),
    ],
)
def test_auto_is_what_the_processor_multiplies_faster(
    amx, avx512, vendor, expected, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(precision, "cpu_vendor", lambda: vendor)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"  # asked for by name


def test_tf32_is_a_kernel_not_a_dtype(monkeypatch) -> None:
    """Exact where nothing rounds to TF32; the name is kept on a GPU that does."""
    assert resolve_precision("tf32", CPU) == "fp32"
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "tf32"), ((9, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_precision("tf32", cuda) == expected
    assert precision.DTYPES["tf32"] == torch.float32


def tf32_flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_products_and_convolutions_agree_and_come_back() -> None:
    """torch's default rounds convolutions and not products."""
    before = tf32_flags()
    with products_of("tf32"):
        assert tf32_flags() == (True, True)
        with products_of("fp32"):
            assert tf32_flags() == (False, False)
        assert tf32_flags() == (True, True)
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"  # a CPU stays exact
    with pytest.raises(ZeroDivisionError), products_of("tf32"):
        raise ZeroDivisionError
    assert tf32_flags() == before


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16", CPU)
