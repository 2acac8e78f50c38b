"""Branches on t in Python (`if t < 0.5`, `max(t, 0)`): forward is run once for every answer, and what it returns is
chosen among by the condition, as torch.where would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

from torch import Tensor

from .elements import Elements, rows_of, same_for_all
from .functions import choose
from .refusal import refuse_python_value
from .values import StateValue, TimeValue

MOST_WAYS = 24  # through forward: as many runs, and all that they compute is computed at every evaluation
QUESTION = "a truth value is made of t (an if, a comparison in Python, min or max)"


@dataclass
class Way:
    """One way through forward. asked: the conditions it met, as elements.  rows: of the result; None where forward raised
    an error there, as it may outside of its domain."""

    asked: list[Tensor]
    answers: list[bool]
    rows: Tensor | None = None


@dataclass
class Branches:
    """Answers what forward asks of functions of t, all ways in turn. ids: a condition as elements."""

    ids: Callable[[TimeValue], Tensor]
    ways: list[Way] = field(default_factory=list)
    _planned: list[bool] = field(default_factory=list)

    @property
    def now(self) -> Way:
        return self.ways[-1]

    def begin(self) -> bool:
        """The next way; False where there is no other."""
        if self.ways:
            self._planned = list(self.now.answers)
            while self._planned and not self._planned[-1]:
                self._planned.pop()
            if not self._planned:
                return False
            self._planned[-1] = False
        if len(self.ways) == MOST_WAYS:
            refuse_python_value(f"{QUESTION}, more often than in {MOST_WAYS} ways")
        self.ways.append(Way([], []))
        return True

    def answer(self, value: TimeValue) -> bool:
        condition, now = self.ids(value).reshape(()), self.now
        for known, answer in zip(now.asked, now.answers):
            if int(known) == int(condition):
                return answer
        number = len(now.asked)
        if number == MOST_WAYS:  # a loop that t ends
            refuse_python_value(f"{QUESTION}, again and again")
        now.asked.append(condition)
        now.answers.append(self._planned[number] if number < len(self._planned) else True)
        return now.answers[number]

    def chosen(self, e: Elements) -> Tensor:
        """The rows of the result at any t."""
        return _chosen(e, [way for way in self.ways if way.rows is not None], 0)


def _chosen(e: Elements, ways: list[Way], depth: int) -> Tensor:
    if len(ways) == 1:
        return ways[0].rows
    sides = [[way for way in ways if way.answers[depth] is answer] for answer in (True, False)]
    if not all(sides):
        return _chosen(e, ways, depth + 1)
    yes, no = (StateValue(same_for_all(_chosen(e, side, depth + 1))) for side in sides)
    return rows_of(e.pointwise(choose, StateValue(ways[0].asked[depth]), yes, no).ids)
