"""Bytes of a module's weights in a precision."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BaseModelPrecision

_GROUP = 128  # weights per scale and shift in quanto's int4 and int2
_NF4_BLOCK, _NF4_SCALES = 64, 256  # weights per 8-bit scale; 8-bit scales per float32 scale
_NF4_TABLES = 4 * (16 + 256 + 1)  # bytes of the float32 tables of codes and of scales, and the scales' offset


@dataclass(frozen=True, slots=True)
class WeightShapes:
    """Weights of a module: shapes [out, in] of the matrices that are quantised, and the number of all other weights."""

    matrices: tuple[tuple[int, int], ...]
    others: int


def stored_bytes(weights: WeightShapes, precision: BaseModelPrecision, element_bytes: int, *, in_file: float) -> int:
    """Bytes of weights in a precision, with scales. `in_file`: bytes per weight in the file, for precision `file`."""
    matrices = sum(_matrix_bytes(*shape, precision, element_bytes, in_file) for shape in weights.matrices)
    return round(matrices + weights.others * element_bytes)


def _matrix_bytes(rows: int, columns: int, precision: BaseModelPrecision, element_bytes: int, in_file: float) -> float:
    weights = rows * columns
    if precision == "none":
        return weights * element_bytes
    if precision == "file":  # 1-byte codes are kept; wider weights are converted to the compute dtype
        return weights * (1 + (element_bytes - 1) * min(1.0, max(0.0, in_file - 1)))
    if precision in ("int8-quanto", "fp8-quanto"):
        return weights + 4 * rows
    if precision == "nf4-bnb":
        scales = -(-weights // _NF4_BLOCK)
        return weights / 2 + scales + 4 * -(-scales // _NF4_SCALES) + _NF4_TABLES
    bits = 4 if precision == "int4-quanto" else 2
    return weights * bits / 8 + 2 * element_bytes * weights / _GROUP
