"""What the Python functions return: a cache, a run and its scores, each one line in a terminal and a page in a notebook.

Nothing heavy is imported before it is needed: ``import liverseg`` must stay as fast as ``liverseg --help``.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_cache.reader import CacheStore
    from liverseg.evaluation.case import CaseEvaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a function has come, for a callback.

    Attributes:
        done, total: Cases, or training steps.
        note: What has just been finished.
    """

    done: int
    total: int
    note: str


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache on disk. Open one with ``liverseg.Cache("data/liver.zarr")``.

    Attributes:
        path: Where it is, absolute, so that a change of the working directory does not move it; a Cache can be given
            wherever a path is expected.
        failed: Why the latest ``preprocess`` could not build a case, by case.
    """

    path: Path
    failed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def store(self) -> CacheStore:
        """The open store: ``store.read(case_id, "liver")`` gives the voxels of a view.

        Raises:
            CacheError: There is no cache.
        """
        from data_cache.reader import CacheStore

        return CacheStore.open(self.path)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """The finished cases, in natural order."""
        return self.store.case_ids

    def __len__(self) -> int:
        return len(self.case_ids)

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"Cache({str(self.path)!r}: {_cases(len(self))}{failed})"

    def _repr_html_(self) -> str:
        from data_cache.inspection import summarise_store
        from liverseg.pictures.page import html_table

        rows = [
            (
                s.meta.case_id,
                "×".join(map(str, s.meta.grid.shape_zyx[::-1])),
                _ml(s.liver_ml),
                _ml(s.tumour_ml),
            )
            for s in summarise_store(self.store)
        ]
        table = html_table(("case", "native x×y×z", "liver mL", "tumour mL"), rows)
        return f"<p>{html.escape(repr(self))}</p>{table}"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run on disk. Open one with ``liverseg.Run("runs/liver")``.

    Attributes:
        path: Its folder, absolute as in ``Cache``; a Run can be given wherever a path is expected.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def history(self) -> dict[str, list[float]]:
        """The columns of ``history.csv``, one number per epoch; NaN where an epoch has none."""
        from liverseg.pictures.curves import read_history

        return read_history(self.path / "history.csv")

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.history.get("epoch", ()))

    def __repr__(self) -> str:
        history = self.history
        best = _best_dice(history)
        score = "" if best is None else f", best mean validation Dice {best:.3f}"
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        return f"Run({str(self.path)!r}: {epochs}{score})"

    def _repr_html_(self) -> str:
        from liverseg.pictures.curves import standalone_charts

        return f"<p>{html.escape(repr(self))}</p>{standalone_charts(self.history)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What ``evaluate`` measured.

    Attributes:
        cases: Everything measured of each case.
        failed: Why a case could not be scored, by case.
        summary: Means with intervals, lesions and burden: the content of ``summary.json``.
        out: The folder that holds ``scores.csv``, ``summary.json``, overlays and volumes; absolute as in ``Cache``.
    """

    cases: tuple[CaseEvaluation, ...]
    failed: Mapping[str, str]
    summary: Mapping[str, Any]
    out: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())

    @property
    def liver_dice(self) -> float | None:
        """Mean over the cases that have a liver."""
        return self._mean("liver")

    @property
    def tumour_dice(self) -> float | None:
        """Mean over the cases that have a tumour."""
        return self._mean("tumour")

    def _mean(self, name: str) -> float | None:
        mean: float | None = self.summary[name]["dice"]["mean"] if self.cases else None
        return mean

    def rows(self) -> list[dict[str, str]]:
        """The rows of ``scores.csv``."""
        from data_cache.files import read_csv

        return read_csv(self.out / "scores.csv")

    def to_pandas(self) -> Any:
        """``scores.csv`` as a DataFrame whose index is the case.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.read_csv(self.out / "scores.csv", index_col="case")

    def __repr__(self) -> str:
        dice = ", ".join(f"{n} Dice {_number(self._mean(n))}" for n in ("liver", "tumour"))
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"Scores({_cases(len(self.cases))}, {dice}{failed}, in {str(self.out)!r})"

    def _repr_html_(self) -> str:
        from liverseg.pictures.page import html_table

        rows = [
            (e.case_id, *(_number(e.predicted.of(name).dice) for name in ("liver", "tumour")))
            for e in self.cases
        ]
        table = html_table(("case", "liver Dice", "tumour Dice"), rows)
        return f"<p>{html.escape(repr(self))}</p>{table}"


def _best_dice(history: Mapping[str, list[float]]) -> float | None:
    """What ``best.pt`` is best by: the mean of the classes that the validation cases have."""
    columns = [history.get(f"val_dice_{name}", []) for name in ("liver", "tumour")]
    known = [[dice for dice in epoch if dice == dice] for epoch in zip(*columns, strict=True)]
    return max((sum(epoch) / len(epoch) for epoch in known if epoch), default=None)


def _cases(n: int) -> str:
    return f"{n} case{'' if n == 1 else 's'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _ml(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
