"""conditioning_type: which references are cut by the target's rectangle, and whether they can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import ConditioningType, DatasetConfig
from ..geometry import Size, same_shape
from .images import shown


def reference_types(config: DatasetConfig, there: Sequence[bool]) -> tuple[ConditioningType, ...]:
    """Types of a pair's references, of which `there` says by folder whether it has one; none where all are auto."""
    kinds = config.conditioning_type
    if set(kinds) == {"auto"}:
        return ()
    if len(kinds) == 1:
        kinds *= len(config.reference_dirs)
    return tuple(kind for kind, has in zip(kinds, there, strict=True) if has)


def shape_problems(paths: Sequence[Path], sizes: Sequence[Size], kinds: Sequence[ConditioningType]) -> list[str]:
    """References under reference_strict of another shape than their target's, which is first in `paths` and `sizes`."""
    return [
        f"{shown(path)}: the reference is {size.width} x {size.height}, its target {sizes[0].width} x "
        f"{sizes[0].height}, so reference_strict can't cut both alike. Give it the target's shape (the size may "
        "differ), or set conditioning_type to reference_loose."
        for path, size, kind in zip(paths[1:], sizes[1:], kinds, strict=False)
        if kind == "reference_strict" and not same_shape(sizes[0], size)
    ]
