"""The uncertainty of scans that differ from the training data: can it tell them from the ordinary ones?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_cache.errors import CacheError
from data_cache.reader import CacheStore
from liverseg.evaluation.raw_case import require_raw
from liverseg.inference.segment import Predictor, segment
from liverseg.inference.uncertainty_files import UncertaintySummary, summarise_segmentation
from pipeline.prepare import read_scan

Outcome = UncertaintySummary | Exception


def measure_shifted(
    predictor: Predictor,
    store: CacheStore,
    *,
    raw: Path,
    report: Callable[[str, Outcome], None],
) -> dict[str, UncertaintySummary]:
    """The uncertainty of every case of a store of shifted scans, by case ID; no label is needed.

    Args:
        predictor: With samples.
        store: A store of scans that differ from the training data, built with the network's spec.
        raw: Folder of the data set that it was built from.
        report: Called with each case's summary, or with why it has none.

    Raises:
        CacheError: The store was built with another spec than the network was trained with.
        DataSetError: ``raw`` is another data set.
    """
    if store.schema.spec != predictor.spec:
        raise CacheError(f"{store.path}: built with another spec than the network was trained with")
    require_raw(store, store.case_ids, raw)
    for case_id, failure in store.damaged.items():
        report(case_id, failure)
    done = {}
    for case_id in store.case_ids:
        try:
            image = store.meta(case_id).image
            scan = read_scan(raw / image.path, predictor.spec)
            image.require_content(raw / image.path, scan.sha256)
            summary = summarise_segmentation(segment(scan, predictor), scan, predictor.training)
        except Exception as failure:  # of whatever kind: it must not cost the other cases
            report(case_id, failure)
        else:
            done[case_id] = summary
            report(case_id, summary)
    return done
