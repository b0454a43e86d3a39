"""Quantised weights of all formats, and whether the kernels' codes of them are those of plain torch."""

from __future__ import annotations

import torch

from tests.support.both_passes import quantised_layer
from trainer_core.config import BaseModelPrecision
from trainer_core.precision import eight_bit
from trainer_core.precision.formats import EightBits, QuantisedWeight

FORMATS = ("nf4-bnb", "int4-quanto", "int2-quanto", "e4m3", "e4m3 with a scale per row", "e5m2")


def quantised_weight(form: str, rows: int, columns: int, device: str) -> QuantisedWeight:
    """A weight [rows, columns]. In fp8 it has all codes that are numbers, and a row of zeros."""
    if not form.startswith("e"):
        precision: BaseModelPrecision = form  # type: ignore[assignment]
        return quantised_layer(precision, columns, rows, device).quantised
    dtype = torch.float8_e5m2 if form == "e5m2" else torch.float8_e4m3fn
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float().nan_to_num_(0, 0, 0)
    codes = numbers.repeat(-(-rows * columns // 256))[: rows * columns].view(rows, columns).to(dtype)
    codes[1] = 0
    scale = torch.linspace(0.01, 0.02, rows).unsqueeze(1) if "row" in form else torch.tensor(0.0123)
    return QuantisedWeight(EightBits(), {"codes": codes.to(device), "scale": scale.to(device)})


def assert_codes_are_those_of_plain_torch(weight: QuantisedWeight) -> None:
    """Bit by bit, also transposed."""
    from trainer_core.precision import weight_kernels

    tensors = list(weight.tensors.values())
    sizes = eight_bit._kernel_sizes(weight.format, tensors[0])
    assert sizes is not None
    wanted = eight_bit.coded(weight.format, [each.cpu() for each in tensors], torch.int8)
    for transposed in (False, True):
        codes, scales = weight_kernels.quantise(*sizes, tensors, 127.0, transposed=transposed)
        assert codes.is_contiguous()
        assert torch.equal((codes.T if transposed else codes).cpu(), wanted.codes), (weight.format, transposed)
        assert torch.equal(scales.cpu(), wanted.scales), (weight.format, transposed)
