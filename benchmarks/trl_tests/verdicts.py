"""What the outcomes of TRL's tests mean: which of them fail with the Shadow trainers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What became of a test: `passed`, `skipped` or `failed`, and the error."""

    outcome: str
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether it did not end well."""
        return self.outcome == "failed"


@dataclass(frozen=True)
class Refusal:
    """A test that may fail.

    Args:
        error: expression that is found in its error.
        reason: why what it does is refused.
    """

    error: str
    reason: str


@dataclass
class Verdicts:
    """Tests by what they show; `faults` are test -> what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 where something is wrong, or nothing was shown."""
        return int(bool(self.faults) or not self.counts["passed"])

    def text(self, *, trl: str, checkout: str) -> str:
        """Return what is printed at the end."""
        counts = {**self.counts, "refused as listed": len(self.refused), "failed with TRL's own trainer too":
                  len(self.not_compared), "failed with ours alone": len(self.faults)}  # fmt: skip
        lines = [f"TRL {trl}, tests of {checkout}: {', '.join(f'{number} {name}' for name, number in counts.items())}."]
        for title, tests in (
            ("refused as listed", self.refused), ("failed with TRL's own trainer too", self.not_compared),
            ("failed with ours alone", self.faults),
        ):  # fmt: skip
            lines += [f"\n{title}:", *(f"  {test}\n    {words}" for test, words in tests.items())] if tests else []
        return "\n".join(lines)


def verdicts(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome], refusals: Mapping[str, Refusal]) -> Verdicts:
    """Return what the outcomes show.

    Args:
        ours: test -> outcome with the Shadow trainers.
        theirs: test -> outcome with TRL's, of those that failed and are not listed.
        refusals: tests that may fail.
    """
    found = Verdicts()
    for test, outcome in ours.items():
        listed = refusals.get(test)
        if outcome.outcome == "passed" and listed is not None:
            found.faults[test] = f"is listed as refused ({listed.reason}) and passes: take it from the list"
        elif not outcome.failed:
            found.counts[outcome.outcome] += 1
        elif listed is not None and re.search(listed.error, outcome.error):
            found.refused[test] = listed.reason
        elif listed is not None:
            found.faults[test] = f"is listed as refused with {listed.error!r}, and failed with: {outcome.error}"
        elif test in theirs and theirs[test].failed:
            found.not_compared[test] = theirs[test].error
        else:
            found.faults[test] = outcome.error
    return found
