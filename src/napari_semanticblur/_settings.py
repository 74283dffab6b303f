"""Preferences: napari's page for this plugin, or the defaults where napari has none."""

from __future__ import annotations

from dataclasses import dataclass

from semanticblur_core.errors import ConfigError


@dataclass(frozen=True)
class Preferences:
    """What the widgets start with; the manifest declares the same names and defaults."""

    model: str = "default"
    device: str = "auto"
    size: str = "320"
    threshold: float = 0.5


def set_default_model(name: str) -> None:
    """Make a model the one that widgets start with, for this user.

    Raises
    ------
    ConfigError
        If this napari keeps no preferences for plugins.
    """
    try:
        from napari.settings import get_plugin_settings

        chosen = get_plugin_settings("napari-semanticblur").detect
    except (ImportError, KeyError, AttributeError):
        raise ConfigError(
            "this napari keeps no preferences for plugins (0.9 does); choose the model in Detect"
        ) from None
    chosen.model = name


def preferences() -> Preferences:
    """Preferences of the user; pages of settings for plugins came with napari 0.9."""
    try:
        from napari.settings import get_plugin_settings
    except ImportError:
        return Preferences()
    try:
        chosen = get_plugin_settings("napari-semanticblur").detect
    except (KeyError, AttributeError):  # not registered: run from a script without the manifest
        return Preferences()
    return Preferences(chosen.model, chosen.device, chosen.size, chosen.threshold)
