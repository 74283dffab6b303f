"""These tests need napari and a display; a Qt object that leaks fails them."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("napari", reason="napari is not installed")

if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    pytest.skip("no display; run under xvfb-run", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """What imports made is not looked through whenever napari's fixture collects garbage."""
    import napari.window  # noqa: F401
    import torch  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def viewer(make_napari_viewer: Callable[..., Any]) -> Any:
    return make_napari_viewer(show=True, strict_qt="raise")
