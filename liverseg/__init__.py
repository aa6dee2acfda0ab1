"""Liver and liver-tumour segmentation from CT: preprocess, train, evaluate, load a model, segment."""

from liverseg import errors
from liverseg.api import evaluate, load, preprocess, train
from liverseg.results import Cache, Progress, Run, Scores
from liverseg.version import __version__

__all__ = [
    "Cache",
    "Progress",
    "Run",
    "Scores",
    "__version__",
    "errors",
    "evaluate",
    "load",
    "preprocess",
    "train",
]
