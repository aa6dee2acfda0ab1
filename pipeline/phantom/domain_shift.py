"""Phantoms with a domain shift: scans that a network trained on ordinary phantoms should be uncertain about."""

from __future__ import annotations

from dataclasses import asdict, replace

from pipeline.phantom.anatomy import Anatomy, DomainShift, Enhancement

NOISE_TIMES = 2.0
# Share of each tissue's difference from unenhanced muscle that is left; ordinary scans keep all of it.
CONTRAST_LEFT = 0.25
GREY_HU = 55.0
# Ordinary tumours are 40 to 80 HU darker than the liver or 20 to 40 brighter.
DENSE_HU = 130.0


def with_domain_shift(anatomy: Anatomy, kind: DomainShift) -> Anatomy:
    """The same patient with doubled ``noise``, little ``contrast`` between tissues, or each ``tumour`` denser than any
    ordinary one; the label is unchanged."""
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
