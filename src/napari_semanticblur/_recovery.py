"""What a program that did not end well left behind, and which image it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from napari_semanticblur._annotation_source import is_of
from semanticblur_core.data.autosave import JOURNALS, user_journals
from semanticblur_core.data.journal import Leftover, find_leftovers

if TYPE_CHECKING:
    from napari.layers import Image

Offer = tuple[Leftover, Path | None]


def find_offers(store: Path | None) -> tuple[list[Offer], list[str]]:
    """Unsaved changes in the user's folder and in a store, each with that store; and problems."""
    found, problems = find_leftovers(user_journals())
    offers: list[Offer] = [(leftover, None) for leftover in found]
    if store is not None:
        found, more = find_leftovers(store / JOURNALS)
        offers = [*((leftover, store) for leftover in found), *offers]
        problems += more
    return offers, problems


def strokes(n: int) -> str:
    """So many strokes, in words."""
    return f"{n} stroke{'s' * (n != 1)}"


def offer(leftover: Leftover) -> str:
    """A line for people."""
    when = leftover.time.astimezone().strftime("%d %b %H:%M")
    return f"Recovered {strokes(leftover.n_strokes)} of {leftover.name}, {when}"


def image_of(leftover: Leftover, images: Sequence[Image]) -> Image | None:
    """The open image that changes belong to: its pixels tell."""
    for image in images:
        if is_of(image, leftover.shape, leftover.facts.get("fingerprint")):
            return image
    return None
