"""What the original project says of its losses, and what an experiment says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from liverseg.laboratory.one_case import Point
from liverseg.model.losses import LossName

# A loss has learnt a tumour that it overlaps by half: below that, a reader would not call it found.
LEARNT_DICE = 0.5
# Good enough to be measured by.
GOOD_DICE = 0.8

Class = Literal["liver", "tumour"]
Outcome = Literal["confirmed", "refuted", "not decided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """That a loss alone learns the tumour of one case within so many steps, or that it does not."""

    loss: LossName
    learns: bool
    within: int

    @property
    def text(self) -> str:
        """In words."""
        verb = "learns" if self.learns else "does not learn"
        return f"{self.loss} {verb} the tumour within {self.within} steps"


HYPOTHESES = (
    Hypothesis(loss="dice", learns=False, within=300),
    Hypothesis(loss="focal", learns=False, within=300),
    Hypothesis(loss="dice_focal", learns=True, within=100),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """How the training with one loss went: all that a hypothesis is judged by.

    Attributes:
        curve: In the order of steps.
        diverged: It ended with a loss that was not finite.
    """

    curve: Sequence[Point]
    diverged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a hypothesis, and why."""

    hypothesis: Hypothesis
    outcome: Outcome
    reason: str

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.hypothesis.text}: {self.outcome} ({self.reason})"


def steps_to(curve: Sequence[Point], of: Class, dice: float) -> int | None:
    """The first recorded step at which a class's Dice is at least ``dice``; None if it never is."""
    reached = (p.step for p in curve if (value := getattr(p, of)) is not None and value >= dice)
    return next(reached, None)


def judge(hypothesis: Hypothesis, courses: Mapping[LossName, TrainingCurve]) -> Verdict:
    """A hypothesis against what was seen; nothing is concluded from too few steps, or from a loss that diverged.

    Args:
        hypothesis: One of ``HYPOTHESES``.
        courses: By loss; one that was not run is missing.
    """
    outcome, reason = _judge(hypothesis, courses.get(hypothesis.loss))
    return Verdict(hypothesis=hypothesis, outcome=outcome, reason=reason)


def _judge(hypothesis: Hypothesis, course: TrainingCurve | None) -> tuple[Outcome, str]:
    if course is None:
        return "not decided", "this loss was not run"
    if course.curve and all(p.tumour is None for p in course.curve):
        return "not decided", "the case has no tumour"
    step = steps_to(course.curve, "tumour", LEARNT_DICE)
    if step is not None and step <= hypothesis.within:
        reason = f"tumour Dice reached {LEARNT_DICE:g} at step {step}"
        return ("confirmed" if hypothesis.learns else "refuted"), reason
    if course.diverged:
        return "not decided", "the loss was not finite: lower optim.learning_rate"
    ran = course.curve[-1].step if course.curve else 0
    if ran < hypothesis.within:
        return "not decided", f"only {ran} steps were run, and tumour Dice stayed below {LEARNT_DICE:g}"
    best = max((p.tumour or 0.0 for p in course.curve if p.step <= hypothesis.within), default=0.0)
    later = "" if step is None else f"; it reached {LEARNT_DICE:g} at step {step}"
    reason = f"tumour Dice was {best:.3f} at most within {hypothesis.within} steps{later}"
    return ("refuted" if hypothesis.learns else "confirmed"), reason
