"""What the helper nodes share."""

from __future__ import annotations


class AnyType(str):
    """A socket that fits every other one."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


class Node:
    """ComfyUI's class attributes, with the commonest values."""

    CATEGORY = "tests"
    FUNCTION = "run"
    OUTPUT_NODE = False
    RETURN_TYPES: tuple[str, ...] = ()


class Uncached(Node):
    """Runs in every prompt."""

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802 - ComfyUI's name
        return float("nan")
