"""Which number format is chosen."""

import pytest
import torch

from allpet.precision import fast_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({}, "32-true"),
    ],
)
def test_bfloat16_is_chosen_only_where_the_processor_has_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_precision() == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_decides_before_the_processor(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert fast_precision() == expected
