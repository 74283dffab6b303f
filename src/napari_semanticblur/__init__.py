"""SemanticBlur in napari. A thin layer over `semanticblur_core`; importing it loads no Qt."""

from semanticblur_core import __version__

__all__ = ["__version__"]
