"""Photographs with real depth of field, from scikit-image."""

from __future__ import annotations

from typing import Any


def cat() -> list[tuple[Any, dict[str, Any], str]]:
    """A cat in focus before a soft background."""
    from skimage.data import chelsea

    return [(chelsea(), {"name": "cat", "rgb": True}, "image")]


def coffee() -> list[tuple[Any, dict[str, Any], str]]:
    """A cup of coffee on a table."""
    from skimage.data import coffee as photograph

    return [(photograph(), {"name": "coffee", "rgb": True}, "image")]
