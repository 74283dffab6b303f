"""What is known of the focus of layers, by what it was measured with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from napari_semanticblur._checking import Settings
from semanticblur_core.focus.session import ArrayFocus
from semanticblur_core.inference.planes import Channels

# Of a layer; thumbnails of all its planes are in each.
_MOST_KEPT = 6


class Sessions:
    """The focus of each layer, and what was measured on it with other settings before."""

    def __init__(self) -> None:
        self._shown: WeakKeyDictionary[Any, ArrayFocus] = WeakKeyDictionary()
        self._kept: WeakKeyDictionary[Any, dict[Any, ArrayFocus]] = WeakKeyDictionary()
        self._settings: WeakKeyDictionary[ArrayFocus, Settings] = WeakKeyDictionary()
        self._prints: WeakKeyDictionary[ArrayFocus, dict[tuple[int, ...], int]]
        self._prints = WeakKeyDictionary()

    def __contains__(self, layer: Any) -> bool:
        return layer in self._shown

    def __iter__(self) -> Iterator[ArrayFocus]:
        """Those that are shown."""
        return iter(list(self._shown.values()))

    def shown(self, layer: Any) -> ArrayFocus | None:
        """What is shown of a layer, or None."""
        return self._shown.get(layer)

    def show(self, layer: Any, channels: Channels, settings: Settings) -> ArrayFocus:
        """Show what is known of a layer with these settings; nothing is, at first."""
        kept = self._kept.setdefault(layer, {})
        key = (channels, settings.key)
        path = layer.source.path
        session = kept.pop(key, None) or ArrayFocus(layer.name, path=Path(path) if path else None)
        kept[key] = session  # the latest last
        for oldest in list(kept)[:-_MOST_KEPT]:
            del kept[oldest]
        session.rename(layer.name)
        self._shown[layer] = session
        self._settings[session] = settings
        return session

    def switch(self, layer: Any, channels: Channels, settings: Settings) -> bool:
        """Show what was measured on a layer with these settings before, if anything was."""
        session = self._kept.get(layer, {}).get((channels, settings.key))
        if session is None or not session.images:
            return False
        self.show(layer, channels, settings)
        return True

    def settings(self, session: ArrayFocus) -> Settings:
        """What a session was measured with."""
        return self._settings[session]

    def prints(self, session: ArrayFocus) -> dict[tuple[int, ...], int]:
        """What tells whether regions are still those that planes were measured in."""
        return self._prints.setdefault(session, {})

    def forget_others(self, layer: Any) -> None:
        """Forget what was measured with other settings than what is shown."""
        shown = self._shown[layer]
        self._kept[layer] = {k: each for k, each in self._kept[layer].items() if each is shown}

    def drop(self, layer: Any) -> None:
        """Forget a layer."""
        del self._shown[layer], self._kept[layer]
