"""Learn, apply, score and show: liver and liver-tumour segmentation from cached tensors."""

from liverseg.api import load

__all__ = ["load"]
