"""The plugin's manifest is valid and everything it names exists."""

from pathlib import Path

import numpy as np
from npe2 import PluginManifest

import napari_semanticblur

PACKAGE = Path(napari_semanticblur.__file__).parent


def test_every_command_resolves() -> None:
    manifest = PluginManifest.from_file(PACKAGE / "napari.yaml")
    assert manifest.name == "napari-semanticblur"
    manifest.validate_imports()


def test_the_command_palette_offers_only_what_runs_without_arguments() -> None:
    contributions = PluginManifest.from_file(PACKAGE / "napari.yaml").contributions
    called = [*(contributions.readers or []), *(contributions.writers or [])]
    needing = {contribution.command for contribution in called}
    disabled = {each.id for each in contributions.commands or [] if each.enablement == "False"}
    assert disabled == needing


def test_the_installed_distribution_carries_the_manifest() -> None:
    assert PluginManifest.from_distribution("napari-semanticblur").display_name == "SemanticBlur"


def test_samples_are_rgb_photographs() -> None:
    from napari_semanticblur import _samples

    for sample in (_samples.cat, _samples.coffee):
        ((image, attributes, kind),) = sample()
        assert kind == "image"
        assert attributes["rgb"]
        assert image.shape[2] == 3
        assert image.dtype == np.uint8
