"""Ranges that stand beside the fields of a configuration, and the error that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megdet_hpc.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Accepted:
    """What a field accepts: as it is printed, and as it is checked."""

    text: str
    holds: Callable[[Any], bool]

    def each(self) -> Accepted:
        """The same of every item of a sequence, which has one or more."""
        return Accepted(f"{self.text} each", lambda items: len(items) >= 1 and all(map(self.holds, items)))

    def or_null(self) -> Accepted:
        """The same, or None."""
        return Accepted(f"{self.text}, or null", lambda value: value is None or self.holds(value))


AT_LEAST_0 = Accepted("0 or more", lambda value: value >= 0)
AT_LEAST_1 = Accepted("1 or more", lambda value: value >= 1)
ABOVE_0 = Accepted("more than 0", lambda value: value > 0)
FRACTION = Accepted("0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = Accepted("0 to 1, less than 1", lambda value: 0 <= value < 1)


def ranged(default: T, accepted: Accepted) -> T:
    """A dataclass field with a default and the range that it accepts."""
    made: T = dataclasses.field(default=default, metadata={"accepted": accepted})
    return made


def require(holds: bool, key: str, value: object, accepted: str) -> None:
    """Raise UserError with the key, the value received and what is accepted, unless it holds."""
    if not holds:
        raise UserError(f"{key} is {value!r}; accepted: {accepted}")


def check_ranges(part: Any, prefix: str = "") -> None:
    """Check every field of a configuration, those of its parts included, that has a range beside it.

    Raises:
        UserError: names the key, the value received and the range accepted.
    """
    for field in dataclasses.fields(part):
        value, key = getattr(part, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif accepted := field.metadata.get("accepted"):
            require(accepted.holds(value), key, value, accepted.text)
