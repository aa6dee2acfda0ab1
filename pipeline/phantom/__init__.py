"""A synthetic Decathlon data set: patients that are drawn, painted and scanned."""

from pipeline.phantom.anatomy import Anatomy, PhantomSpec
from pipeline.phantom.dataset import render, write_phantoms
from pipeline.phantom.patient import draw_anatomy

__all__ = ["Anatomy", "PhantomSpec", "draw_anatomy", "render", "write_phantoms"]
