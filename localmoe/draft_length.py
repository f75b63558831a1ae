"""How many tokens to guess at a time: a fixed number, or what measuring finds to pay.

A pass of the model that checks k guesses takes a time t(k) and gives 1 + a(1) + a(1) a(2) + ... tokens, a(j) being how
often the j-th guess is right once those before it were. More tokens touch more experts, so a guess can cost more than
it brings: on small models, with slow drafters, in texts that are hard to foresee.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from statistics import median
from typing import Protocol


class DraftLength(Protocol):
    """Says before each pass how many tokens to guess, and hears what came of it."""

    @property
    def best(self) -> int:
        """The number found to give the most tokens a second; 0 where guessing loses, or nothing is known yet."""
        ...

    def next(self) -> int:
        """How many to guess now."""
        ...

    @property
    def rests(self) -> bool:
        """After `next`: whether the pass after this one guesses nothing, whatever comes of this one."""
        ...

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """A pass that checked `drafted` guesses and found the first `accepted` right took `seconds`, guessing included
        and without what every token takes once, however it was computed (drawing it, its text)."""
        ...


class FixedLength:
    """Always the same number."""

    def __init__(self, length: int) -> None:
        self.best = length
        self.rests = length == 0

    def next(self) -> int:
        """See `DraftLength`."""
        return self.best

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """See `DraftLength`."""


class MeasuredLength:
    """What gave the most tokens a second so far, in this process, up to `most`.

    Times are medians of the last few passes, so that another program's burst of work counts for nothing. Lengths next
    to the best are tried now and then. What guessing may lose against plain passes is bounded whatever the times are:
    it is paid out of a credit that a plain pass raises by a fiftieth of itself, and that what guessing gains fills.
    """

    _PLAIN_FIRST = 6  # passes without guesses before the first one
    _GUESSED_FIRST = 4  # passes with one guess before anything is decided
    _RECENT = 9  # passes that a time is the median of
    _DECAY = 0.98  # of what acceptance remembers, a pass
    _PRIOR, _PRIOR_WEIGHT = 0.6, 2  # acceptance before anything is known, as if so many guesses had been checked
    _OFTEN, _SELDOM = 64, 512  # passes until another length is tried again: doubling while guessing loses
    _TRIAL = 2  # passes of such a trial
    _REST = 32  # plain passes, at most, between two looks at the times where guessing loses: looking takes time, too
    _MARGIN = 1.02  # guessing must win by: it is not to lose when the measured times are a little off
    _CREDIT_RATE = 0.02  # of plain passes
    _FIRST_CREDIT, _MOST_CREDIT, _LEAST_CREDIT = 1.0, 4.0, -2.0  # plain passes

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: list[deque[float]] = [deque(maxlen=self._RECENT) for _ in range(most + 1)]
        self._medians: list[float | None] = [None] * (most + 1)  # theirs, where nothing has come since
        self._tried = [0.0] * (most + 1)  # guesses at this distance that were checked ...
        self._right = [0.0] * (most + 1)  # ... and right
        self._credit = self._FIRST_CREDIT
        self._since_trial = self._trials = self._trial_passes = 0
        self._interval = self._OFTEN
        self._trial = 0  # the length tried while `_trial_passes` are left
        self._rest, self._longest_rest = 0, 1  # passes that are plain ones whatever comes: longer each time

    @property
    def best(self) -> int:
        """See `DraftLength`. Among the lengths measured and the next longer one, as if times went on as they did."""
        if len(self._times[0]) < self._PLAIN_FIRST or len(self._times[1]) < self._GUESSED_FIRST:
            return 0
        winner, rate = 0, self._MARGIN / self._time(0)
        for length, tokens in enumerate(self._tokens(), start=1):
            before, time = self._time(length - 1), self._time(length)
            if not self._times[length]:
                time = before + max(before - self._time(length - 2), 0.0)
            if tokens / time > rate:
                winner, rate = length, tokens / time
            if not self._times[length]:
                break
        return winner

    def next(self) -> int:
        """See `DraftLength`."""
        if self._rest:
            self._rest -= 1
            return 0
        if len(self._times[0]) < self._PLAIN_FIRST:
            return 0
        wanted = 1 if len(self._times[1]) < self._GUESSED_FIRST else self._best_or_trial()
        if wanted:
            missing = self._risk(wanted) - self._credit
            if missing <= 0:
                self._longest_rest = 1
                return wanted
            passes = missing / self._CREDIT_RATE
        else:
            passes = self._interval - self._since_trial
        self._rest = max(0, min(int(passes), self._longest_rest) - 1)
        self._longest_rest = min(2 * self._longest_rest, self._REST)
        return 0

    @property
    def rests(self) -> bool:
        """See `DraftLength`."""
        return self._rest > 0

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """See `DraftLength`."""
        self._times[drafted].append(seconds)
        self._medians[drafted] = None
        self._since_trial += 1
        # A drafter may have had fewer guesses than it was asked for, but a trial of guessing needs one
        if self._trial_passes and min(drafted, 1) == min(self._trial, 1):
            self._trial_passes -= 1
        if not drafted:
            self._credit = min(self._credit + self._CREDIT_RATE, self._MOST_CREDIT)
            return
        for distance in range(1, min(accepted + 1, drafted) + 1):
            self._tried[distance] = self._tried[distance] * self._DECAY + 1
            self._right[distance] = self._right[distance] * self._DECAY + (distance <= accepted)
        if self._times[0]:
            tokens = 1 + accepted
            gain = tokens - self._time(drafted) / self._time(0)
            credit = self._credit + gain + self._CREDIT_RATE * tokens
            self._credit = max(min(credit, self._MOST_CREDIT), self._LEAST_CREDIT)

    def _time(self, length: int) -> float:
        """The median of its last passes; 0 where there were none."""
        found = self._medians[length]
        if found is None:
            found = self._medians[length] = median(self._times[length]) if self._times[length] else 0.0
        return found

    def _best_or_trial(self) -> int:
        best = self.best
        if self._trial_passes == 0 and self._since_trial >= self._interval:
            self._since_trial, self._trial_passes = 0, self._TRIAL
            self._interval = self._OFTEN if best else min(2 * self._interval, self._SELDOM)
            neighbours = (0, best + 1, 0, best - 1) if best else (1,)
            self._trial = min(neighbours[self._trials % len(neighbours)], self._most)
            self._trials += 1
        return self._trial if self._trial_passes else best

    def _risk(self, length: int) -> float:
        """What a pass whose guesses are all wrong loses, in plain passes."""
        extra = self._time(length) / self._time(0) - 1 if self._times[length] else 1.0
        return min(extra, self._MOST_CREDIT)

    def _tokens(self) -> Iterator[float]:
        """Tokens that a pass with one, two, ... guesses gives. A guess of which little is known is taken to be right as
        often as the one before it."""
        tokens = reach = 1.0
        share = self._PRIOR
        for right, tried in zip(self._right[1:], self._tried[1:], strict=True):
            share = (right + self._PRIOR_WEIGHT * share) / (tried + self._PRIOR_WEIGHT)
            reach *= share
            tokens += reach
            yield tokens
