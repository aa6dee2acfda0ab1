"""Phantoms unlike all others: what a network trained on ordinary ones has never seen, and ought to be unsure of."""

from __future__ import annotations

from dataclasses import asdict, replace

from pipeline.phantom.anatomy import Anatomy, Enhancement, Unlike

NOISE_TIMES = 2.0
# Of the distance between each tissue and unenhanced muscle; ordinary scans without contrast medium keep all of it.
CONTRAST_LEFT = 0.25
GREY_HU = 55.0
# Ordinary tumours are 40 to 80 HU darker than the liver or 20 to 40 brighter.
DENSE_HU = 130.0


def made_unlike(anatomy: Anatomy, kind: Unlike) -> Anatomy:
    """The same patient with ``noise`` doubled, without ``contrast`` between tissues, or with a ``tumour`` of a density
    that no ordinary one has; the label stays as it is."""
    match kind:
        case "noise":
            return replace(anatomy, noise_hu=NOISE_TIMES * anatomy.noise_hu)
        case "contrast":
            tissues = {
                name: GREY_HU + CONTRAST_LEFT * (hu - GREY_HU) for name, hu in asdict(anatomy.hu).items()
            }
            return replace(anatomy, hu=Enhancement(**tissues))
        case "tumour":
            dense = (replace(t, contrast_hu=DENSE_HU, rim_hu=0.0, core_hu=0.0) for t in anatomy.tumours)
            return replace(anatomy, tumours=tuple(dense))
