"""These tests need napari and a display; a Qt object that leaks fails them."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("napari", reason="napari is not installed")

if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    pytest.skip("no display; run under xvfb-run", allow_module_level=True)


@pytest.fixture
def viewer(make_napari_viewer: Callable[..., Any]) -> Any:
    return make_napari_viewer(show=True, strict_qt="raise")
