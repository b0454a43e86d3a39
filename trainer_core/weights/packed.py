"""Layouts of quantised weights that can't be read, recognised by the names and types in a file's header."""

from __future__ import annotations

from collections.abc import Collection

# Endings of names that together tell the layout.
_LAYOUTS = (
    ("nunchaku's SVDQuant", (".qweight", ".wscales")),
    ("the layout of GPTQ or AWQ", (".qweight", ".qzeros")),
    ("fp8 with a scale per block", (".weight_scale_inv",)),
    ("NVFP4 with a scale per block", (".weight_scale_2",)),
    ("bitsandbytes' int8", (".SCB",)),
    ("bitsandbytes' FP4", (".quant_state.bitsandbytes__fp4",)),
    ("quanto's own layout", ("._data", "._scale")),
    ("SDNQ's layout", (".weight", ".zero_point")),
    ("HQQ's layout", (".W_q",)),
)


def packed_layout(names: Collection[str]) -> tuple[str, str]:
    """The layout of a file's quantised weights and the name of one of them, or two empty texts if none is known."""
    for layout, endings in _LAYOUTS:
        found = [next((name for name in names if name.endswith(ending)), "") for ending in endings]
        if all(found):
            return layout, found[-1]
    return "", ""
