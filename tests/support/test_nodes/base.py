"""Base classes of the helper nodes."""

from __future__ import annotations


class AnyType(str):
    """A socket type that connects to every other type."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


class Node:
    """Default values for the class attributes that ComfyUI reads."""

    CATEGORY = "tests"
    FUNCTION = "run"
    OUTPUT_NODE = False
    RETURN_TYPES: tuple[str, ...] = ()


class Uncached(Node):
    """A node that runs in every prompt, because ComfyUI never caches it."""

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802 - ComfyUI's name
        return float("nan")
