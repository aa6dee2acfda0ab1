"""What a network was trained on: it travels with the weights, and its answers are judged by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from pydantic import ConfigDict

from data_cache.errors import RunError
from data_cache.reader import CacheStore
from data_cache.records import STRICT, parse
from data_cache.schema import FRACTION_ONE, CaseMeta, DataSetInfo
from data_cache.text import pluralise
from liverseg.measure.density import DensityReference, measure_density
from liverseg.measure.plausibility import AnswerFacts, LabelledView, ReferenceRanges, measure_facts
from pipeline.labels import decide

NOT_RECORDED = "Training data not recorded. Not a medical device."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The data set that a network learned from, and what its labels are like.

    Attributes:
        data_set: As its dataset.json says; None where the cache does not record it.
        n_cases: Training cases.
        ranges: Ranges over the labels of the training cases.
        density: HU in and around their livers; None for fewer than three cases, or where it was not recorded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    data_set: DataSetInfo | None
    n_cases: int
    ranges: ReferenceRanges
    density: DensityReference | None = None

    @classmethod
    def from_json(cls, data: object, *, source: str) -> Self | None:
        """Parse what travelled with a network, None where nothing did; raises RunError with every fault."""
        return None if data is None else parse(cls, data, source=source, error=RunError)

    @property
    def phantom(self) -> bool:
        """Whether the data set says that it is synthetic."""
        return self.data_set is not None and self.data_set.phantom

    def line(self) -> str:
        """Such as "28 phantoms of LIVER"."""
        if self.data_set is None:
            return f"{pluralise(self.n_cases, 'case')} of a data set that was not recorded"
        return f"{pluralise(self.n_cases, 'phantom' if self.phantom else 'case')} of {self.data_set.name}"

    def licence_note(self) -> str:
        """The terms that the weights inherit, as far as they are known."""
        stated = None if self.data_set is None else self.data_set.licence
        terms = "its licence is not recorded" if stated is None else f"licence as stated there: {stated}"
        return (
            f"Trained on {self.line()}; {terms}. Weights inherit the terms of the data. Not a medical device."
        )


def describe_training_data(store: CacheStore, case_ids: Sequence[str]) -> TrainingData:
    """Measure the labels of the training cases: about a tenth of a second each."""
    by_case = {i: view for i in case_ids if (view := _labelled_view(store, i)) is not None}
    views = by_case.values()
    measured = {i: found for i, view in by_case.items() if (found := measure_facts(view)) is not None}
    facts = [_with_native_volumes(found, store.meta(i)) for i, found in measured.items()]
    densities = [measure_density(v.image_zyx, v.label_zyx, v.grid.spacing_zyx_mm) for v in views]
    return TrainingData(
        data_set=store.schema.data_set,
        n_cases=len(case_ids),
        ranges=ReferenceRanges.of(facts),
        density=DensityReference.of([density for density in densities if density is not None]),
    )


def _with_native_volumes(facts: AnswerFacts, meta: CaseMeta) -> AnswerFacts:
    liver_ml, tumour_ml = meta.volume_ml(1), meta.volume_ml(2)
    assert liver_ml is not None
    assert tumour_ml is not None
    return facts.with_volumes(liver_ml=liver_ml + tumour_ml, tumour_ml=tumour_ml)


def _labelled_view(store: CacheStore, case_id: str) -> LabelledView | None:
    if "liver" not in store.meta(case_id).boxes:
        return None
    close, scan = store.read(case_id, "liver"), store.read(case_id, "scan")
    if close.fractions_czyx is None:
        return None
    return LabelledView(
        label_zyx=decide(close.fractions_czyx.astype(np.float32) / np.float32(FRACTION_ONE)),
        image_zyx=close.image_zyx,
        grid=close.grid,
        scan_zyx=scan.image_zyx,
        scan_grid=scan.grid,
        slice_mm=store.meta(case_id).grid.spacing_zyx_mm[0],
    )
