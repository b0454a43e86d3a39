"""Values of a wrong type, size or encoding that an API caller or a file can send in place of any setting."""

from __future__ import annotations

from typing import Any

DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]

HOSTILE: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "half": 0.5,
    "1e308": 1e308,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "65 bits": 2**64,
    "5,000 digits": 10**5_000,
    "empty text": "",
    "number as text": "3",
    "half a surrogate pair": "a\ud800b",
    "zero character": "a\0b",
    "line break": "a\nb",
    "long text": "x" * 1_000_000,
    "long unprintable text": "\x1b" * 100_000,
    "empty list": [],
    "list": [1, "a", None],
    "long list": ["a"] * 100_000,
    "deep list": DEEP,
    "object": {"a": 1},
    "object of half a surrogate pair": {"\udfff": "\udfff"},
    "bytes": b"\xff",
}
