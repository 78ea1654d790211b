"""What is broken in a dataset, collected while everything is looked at."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

RESTORE = "restore the file from where the dataset comes from, or leave its episodes out (delete-episodes)"
LISTED = 3  # episodes of one file with the same problem; more are told in one sentence


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is broken: in which file (relative to the dataset), what and where in it, and what would repair it."""

    place: str
    what: str
    repair: str


class Problems(list[Problem]):
    """Problems in the order in which they were found."""

    def report(self, place: str, what: str, repair: str) -> None:
        self.append(Problem(place, what, repair))

    def report_episodes(self, place: str, findings: Mapping[int, str], repair: str) -> None:
        """Report what was found in some episodes of a file, in one sentence if they are many."""
        for episode, what in list(findings.items())[: LISTED if len(findings) <= LISTED else 1]:
            also = f"; likewise in all of the episodes {spans(findings)}" if len(findings) > LISTED else ""
            self.report(place, f"episode {episode} {what}{also}", repair)


def spans(numbers: Iterable[int]) -> str:
    """Write whole numbers as people do: 0-3, 7."""
    ascending = np.array(sorted(numbers), np.int64)
    parts = np.split(ascending, np.flatnonzero(np.diff(ascending) != 1) + 1)
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts if len(part)]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:6], f"... ({len(ascending)} in all)"])
