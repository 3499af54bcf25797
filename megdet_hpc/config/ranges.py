"""Ranges beside the fields of a configuration, and the error that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megdet_hpc.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Accepted:
    """The values that a field accepts, as text and as a check."""

    text: str
    holds: Callable[[Any], bool]

    def each(self) -> Accepted:
        """The same for every item of a sequence of one or more."""
        return Accepted(f"{self.text} each", lambda items: len(items) >= 1 and all(map(self.holds, items)))

    def or_null(self) -> Accepted:
        """The same, and None too."""
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
    """Raise a UserError with the key, the value received and what is accepted, unless `holds`."""
    if not holds:
        raise UserError(f"{key} is {value!r}; accepted: {accepted}")


def check_ranges(part: Any, prefix: str = "") -> None:
    """Check every field that has a range, in a configuration and in its parts. null fits only where the type names it.

    An empty text, which would be the current folder, fits nowhere.

    Raises:
        UserError: names the key, the value received and the range accepted.
    """
    for field in dataclasses.fields(part):
        value, key = getattr(part, field.name), prefix + field.name
        if value is None and "None" not in str(field.type):
            raise UserError(f"{key} is null; accepted: {field.type}")
        if isinstance(value, str) and not value:
            raise UserError(f"{key} is empty; accepted: {field.type}")
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif accepted := field.metadata.get("accepted"):
            require(accepted.holds(value), key, value, accepted.text)
