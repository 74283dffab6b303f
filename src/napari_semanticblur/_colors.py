"""Codes and colours of annotations and results: blue is sharp, orange is blurred.

The pair stays apart under the common kinds of colour blindness (Okabe and Ito 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napari.utils.colormaps import DirectLabelColormap

UNLABELLED, SHARP, BLURRED = 0, 1, 2
SHARP_COLOR, BLURRED_COLOR = "#0072B2", "#E69F00"
# A label that means nothing here, as scripts can paint it: it is refused, so it is to be seen.
OTHER_COLOR = "#CC79A7"
MAP_COLORMAP = "inferno"
HEAT_COLORMAP = "viridis"
# Behind black text; a word says the same, so that nobody has to tell the two apart.
PASSED_COLOR, FAILED_COLOR = "#b7e4c0", "#f7bcb5"


def label_colormap() -> DirectLabelColormap:
    """Colormap of a Labels layer of these codes; anything else stands out."""
    from napari.utils.colormaps import DirectLabelColormap

    return DirectLabelColormap(
        color_dict={
            None: OTHER_COLOR,
            UNLABELLED: "transparent",
            SHARP: SHARP_COLOR,
            BLURRED: BLURRED_COLOR,
        }
    )
