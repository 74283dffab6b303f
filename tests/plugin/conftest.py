"""These tests need napari, but no display."""

import pytest

pytest.importorskip("napari", reason="napari is not installed")
