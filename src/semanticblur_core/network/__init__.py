"""The network of the paper and its backbones."""

from semanticblur_core.network.semanticblur import SemanticBlur

__all__ = ["SemanticBlur"]
