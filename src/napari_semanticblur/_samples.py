"""Photographs with real depth of field, from scikit-image, and a generated focal stack."""

from __future__ import annotations

from typing import Any

import numpy as np


def cat() -> list[tuple[Any, dict[str, Any], str]]:
    """A cat in focus before a soft background."""
    from skimage.data import chelsea

    return [(chelsea(), {"name": "cat", "rgb": True}, "image")]


def coffee() -> list[tuple[Any, dict[str, Any], str]]:
    """A cup of coffee on a table."""
    from skimage.data import coffee as photograph

    return [(photograph(), {"name": "coffee", "rgb": True}, "image")]


def focal_stack() -> list[tuple[Any, dict[str, Any], str]]:
    """A generated stack focused from left to right, and where it is blurred."""
    from napari_semanticblur._colors import BLURRED, SHARP, label_colormap
    from semanticblur_core.data.focal_stack import focal_stack as generate

    stack = generate()
    truth = np.where(stack.blurred, np.uint8(BLURRED), np.uint8(SHARP))
    labels = {"name": "truth", "visible": False, "opacity": 0.4, "colormap": label_colormap()}
    return [(stack.images, {"name": "focal stack"}, "image"), (truth, labels, "labels")]
