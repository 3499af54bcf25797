"""Categories of a set, and which categories of two sets are the same. Names decide, and ids only where names cannot."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.errors import UserError

_SHOWN = 20  # categories named in one line


class Categories:
    """The map between COCO's category ids, which have gaps, and the model's labels 1, 2, 3, ..."""

    def __init__(self, categories: list[dict[str, object]]) -> None:
        ordered = sorted(categories, key=lambda c: int(str(c["id"])))
        self.ids = [int(str(c["id"])) for c in ordered]
        self.names = [str(c.get("name", c["id"])) for c in ordered]
        self._label = {category: label for label, category in enumerate(self.ids, start=1)}

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any], like: Categories) -> Categories:
        """Categories that a checkpoint holds. If it stores no names, `like` gives the names of its ids."""
        ids: list[int] = state["category_ids"]
        names = state.get("category_names") or [like.name(key) if key in like.ids else str(key) for key in ids]
        return cls([{"id": key, "name": name} for key, name in zip(ids, names, strict=True)])

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, category_id: int) -> int:
        """Label of a category id, 1 and up."""
        return self._label[category_id]

    def name(self, category_id: int) -> str:
        """Name of a category id."""
        return self.names[self._label[category_id] - 1]

    def check_same(self, other: Categories, ours: str, theirs: str) -> None:
        """Raises UserError unless both have the same ids with the same names, so that labels mean the same."""
        if text := difference(self, other, ours, theirs):
            counts = (
                f"{ours} has {len(self)} categories, {theirs} has {len(other)}: " if len(self) != len(other) else ""
            )
            raise UserError(f"categories differ: {counts}{text}; they must be the same")


@dataclass(frozen=True)
class LabelIds:
    """The category ids that a scored set gives the labels of a model."""

    ids: NDArray[np.int64]  # [labels + 1] by label
    present: NDArray[np.bool_]  # [labels + 1] whether the set has the category; not at 0, the background
    note: str
    """What a user should know of it; "" where both sets agree."""


def difference(ours: Categories, theirs: Categories, our_name: str, their_name: str) -> str:
    """The first category id, if any, whose name is not the same in two sets: `id 2 is x in OURS, y in THEIRS`."""
    for key in sorted({*ours.ids, *theirs.ids}):
        here, there = (c.name(key) if key in c.ids else None for c in (ours, theirs))
        if here != there:
            if here is None or there is None:
                have, lack = (our_name, their_name) if there is None else (their_name, our_name)
                return f"id {key} is {here or there} in {have}, and {lack} has no such id"
            return f"id {key} is {here} in {our_name}, {there} in {their_name}"
    return ""


def match_labels(trained: Categories, scored: Categories, trained_name: str, scored_name: str) -> LabelIds:
    """Find the trained categories in a set that is scored, by name.

    The set may number them differently and may lack some. A category that was not trained is refused: its boxes could
    never be found, and the AP would count them as misses of the detector.

    Args:
        trained: categories of the model's labels.
        scored: categories of the set.
        trained_name, scored_name: names of both for messages, such as data.train and data.val.

    Raises:
        UserError: the set has a category that the model has not, or names occur twice and ids do not agree either.
    """
    text = difference(trained, scored, trained_name, scored_name)
    twice = [
        f"{name!r} occurs twice in {where}"
        for categories, where in ((trained, trained_name), (scored, scored_name))
        for name, count in Counter(categories.names).items()
        if count > 1
    ]
    if twice:
        found = {key: key for key, name in zip(scored.ids, scored.names, strict=True) if _has(trained, key, name)}
        if len(found) < len(scored):
            raise UserError(f"categories differ: {text}; names cannot tell which is which, since {twice[0]}")
    else:
        trained_id = dict(zip(trained.names, trained.ids, strict=True))
        for name in scored.names:
            if name not in trained_id:
                raise UserError(
                    f"categories differ: {text}; {scored_name} has {name!r}, {_lack(name, trained_id, trained_name)}"
                )
        found = {trained_id[name]: key for key, name in zip(scored.ids, scored.names, strict=True)}
    ids, present = np.zeros(len(trained) + 1, np.int64), np.zeros(len(trained) + 1, np.bool_)
    for label, key in enumerate(trained.ids, start=1):
        ids[label], present[label] = found.get(key, 0), key in found
    return LabelIds(ids, present, _note(trained, found, trained_name, scored_name))


def _has(categories: Categories, key: int, name: str) -> bool:
    return key in categories.ids and categories.name(key) == name


def _lack(name: str, others: dict[str, int], where: str) -> str:
    """The end of a message: a set lacks a name, and which of its names may be meant."""
    plain = {" ".join(other.split()).casefold(): other for other in others}
    if near := plain.get(" ".join(name.split()).casefold()):
        return f"{where} has {near!r}: make case and blanks the same in both"
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f"which {where} has not" + (f" (the nearest is {close[0]!r})" if close else "")


def _note(trained: Categories, found: dict[int, int], trained_name: str, scored_name: str) -> str:
    said = []
    moved = [f"{trained.name(old)} {old} -> {new}" for old, new in found.items() if old != new]
    if moved:
        said.append(f"{scored_name} numbers them differently than {trained_name}; matched by name: {_list(moved)}")
    absent = [name for key, name in zip(trained.ids, trained.names, strict=True) if key not in found]
    if absent:
        said.append(
            f"{scored_name} lacks {len(absent)} of {trained_name}'s {len(trained)} ({_list(absent)}); what is found of "
            "them is left out"
        )
    return "categories: " + "; ".join(said) if said else ""


def _list(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
