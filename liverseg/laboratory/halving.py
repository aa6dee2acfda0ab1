"""Successive halving: which settings go on, and how far each of them has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from pydantic import ConfigDict

from data_cache.errors import ConfigError
from data_cache.records import STRICT
from liverseg.laboratory.one_case import Point
from liverseg.training.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One place of the grid."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    learning_rate: float
    gamma: float
    alpha: float

    @property
    def name(self) -> str:
        """A file's name."""
        return f"lr{self.learning_rate!r}_gamma{self.gamma!r}_alpha{self.alpha!r}"

    @property
    def text(self) -> str:
        """For a reader."""
        return f"learning rate {self.learning_rate:g}, γ {self.gamma:g}, α {self.alpha:g}"

    def within(self, config: TrainConfig) -> TrainConfig:
        """The configuration with this setting; raises ConfigError where a number is out of range."""
        return replace(
            config,
            loss=replace(config.loss, gamma=self.gamma, alpha=self.alpha),
            optim=replace(config.optim, learning_rate=self.learning_rate),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943; with η as in Hyperband, arXiv:1603.06560).

    All settings get a few steps, the best 1/η of them η times as many in all, and so on; the last get ``steps``. A
    setting goes on from where it stood, and along the learning rate of the whole of ``steps``: whoever is stopped was
    judged at a high one.

    Attributes:
        steps: Of those that are never stopped.
        every: Steps between two scores; a rung ends with one.
        rungs: How often there is a choice, counting the last.
        keep: η.
    """

    steps: int
    every: int
    rungs: int
    keep: int

    def ends(self) -> tuple[int, ...]:
        """The step at which each rung ends.

        Raises:
            ConfigError: There are too few steps for so many rungs.
        """
        scores = self.steps // self.every
        ends = [round(scores / self.keep**rung) for rung in reversed(range(self.rungs))]
        if not ends[0] or len(set(ends)) < len(ends):
            raise ConfigError(
                f"{self.steps} steps, scored every {self.every}, are too few for {self.rungs} rungs that keep one in "
                f"{self.keep}: the first would end at step {self.steps / self.keep ** (self.rungs - 1):.3g}"
            )
        return tuple(end * self.every for end in ends)

    def steps_of(self, count: int, *, rung: int) -> int:
        """Steps of all settings together from a rung (counted from 1) on, if ``count`` enter it and none ties."""
        total, ends = 0, (0, *self.ends())
        for before, end in list(pairwise(ends))[rung - 1 :]:
            total += count * (end - before)
            count = self.kept(count)
        return total

    def kept(self, count: int) -> int:
        """How many of ``count`` settings go on."""
        return max(1, count // self.keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How far a setting has come.

    Attributes:
        curve: Its scores so far.
        diverged: Its loss was not finite in the steps after the last of them.
        seconds: That it took, scoring included.
        failure: Why it has no end, where its process was killed; not kept, so that it is tried again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    setting: Setting
    curve: tuple[Point, ...] = ()
    diverged: bool = False
    seconds: float = 0.0
    failure: str | None = None

    @property
    def step(self) -> int:
        """The last that was scored."""
        return self.curve[-1].step if self.curve else 0

    @property
    def lost(self) -> bool:
        """It cannot go on."""
        return self.diverged or self.failure is not None

    @property
    def score(self) -> float:
        """Mean Dice of the classes at the last step, 0 for one that is lost."""
        return 0.0 if self.lost or not self.curve else self.curve[-1].score

    def score_at(self, step: int) -> float:
        """What ``score`` was when so many steps were done; 0 where it did not come so far."""
        return next((p.score for p in self.curve if p.step == step), 0.0)


def survivors(attempts: Sequence[Attempt], *, end: int, count: int) -> list[Setting]:
    """The ``count`` settings with the best score at the end of a rung, in the order of the grid.

    Whoever ties with the last of them stays, too: early on many have found nothing yet, and nothing tells them apart.
    One that is lost never stays, so that there may also be fewer.
    """
    scores = {a.setting: a.score_at(end) for a in attempts if a.step >= end}
    cut = sorted(scores.values(), reverse=True)[:count]
    return [setting for setting, score in scores.items() if score >= cut[-1]]


def ranked(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """The best first: who came further was better than who was stopped, and who is lost is last."""
    return tuple(sorted(attempts, key=lambda a: (a.lost, -a.step, -a.score)))
