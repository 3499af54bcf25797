"""The claims about training from scratch, each as two settings of the grid `scratch`; and a table of all settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.readings import SeedScores, Statement
from megdet_hpc.study.scratch import RATES

Row = dict[str, Any]

FACTORS = ("detector", "norm", "rate", "pool", "clip", "first", "where")
"""Columns that tell settings apart; the others follow from them, or are the seed."""
_DEFAULTS: Row = {"rate": "usual", "pool": "align", "clip": False, "first": "scratch", "where": "all"}
_NORMS = {"none": "no normalization", "all": "CGBN over all images", "gn": "GN"}


def sample_of(rows: Sequence[Row], name: str = "", **factors: Any) -> SeedScores:
    """The finished seeds of one setting.

    Args:
        rows: rows of runs, as rows_of gives them; a run may be in several lines.
        name: name in sentences; "": made from the factors.
        factors: values by name in FACTORS; those left out are the usual ones.
    """
    own = finished_of(rows, **factors)
    failed = sum(row["status"] == "failed" for row in own)
    return SeedScores(name or named(_wanted(factors)), tuple(row["AP"] or 0.0 for row in own), failed)


def _wanted(factors: Row) -> Row:
    """All factors of a setting, of which those left out are the usual ones."""
    wanted = {**_DEFAULTS, **factors}
    if wanted["norm"] == "none":
        wanted["where"] = ""
    if wanted["detector"] != "two":
        wanted["pool"] = ""
    return wanted


def finished_of(rows: Sequence[Row], **factors: Any) -> list[Row]:
    """The rows of one setting's finished seeds, each once.

    Args:
        rows: rows of runs, as rows_of gives them; a run may be in several lines.
        factors: values by name in FACTORS; those left out are the usual ones.
    """
    wanted = _wanted(factors)
    own = [row for row in rows if all(row[key] == wanted[key] for key in FACTORS)]
    by_seed = {row["seed"]: row for row in own if row["status"] in FINISHED}
    return [row for _, row in sorted(by_seed.items())]


def named(factors: Row) -> str:
    """A setting in words: its normalization, and what is not as usual."""
    norm = factors["norm"]
    words = [_NORMS.get(norm, f"BN over {norm.removeprefix('bn')}")]
    words += [f"{factors['rate']} rate"] * (factors["rate"] != "usual") + ["RoIPool"] * (factors["pool"] == "pool")
    words += ["clipped"] * bool(factors["clip"]) + ["from weights"] * (factors["first"] == "weights")
    words += [f"{factors['where']} only"] * (factors["where"] in ("backbone", "heads"))
    return ", ".join(words)


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting: the number of seeds, the mean and the deviation of AP, and each seed's AP."""
    settings = dict.fromkeys(tuple(row[key] for key in FACTORS) for row in rows)
    found = []
    for values in settings:
        factors = dict(zip(FACTORS, values, strict=True))
        own = sample_of(rows, **factors)
        found.append({
            **factors,
            "seeds": len(own.scores),
            "failed": own.failed,
            "AP": own.mean if own.scores else None,
            "scatter": own.deviation,
            "AP of each seed": " ".join(f"{score:.3f}" for score in own.scores) or None,
        })  # fmt: skip
    return found


def claims(rows: Sequence[Row]) -> list[Statement]:
    """What DSOD, ScratchDet and Rethinking ImageNet Pre-training say, each as two settings of this study."""

    def one(norm: str, **rest: Any) -> SeedScores:
        return sample_of(rows, detector="one", norm=norm, **rest)

    def two(norm: str, **rest: Any) -> SeedScores:
        return sample_of(rows, detector="two", norm=norm, **rest)

    def dsod(size: int) -> SeedScores:
        return sample_of(rows, detector="dsod", norm=f"bn{size}")

    best_one, best_two = (
        max((made("none", rate=rate) for rate in RATES), key=lambda own: own.mean if own.scores else -1.0)
        for made in (one, two)
    )
    post, scratchdet, rethinking = "DSOD's author", "ScratchDet", "Rethinking"
    pairs = [
        ("DSOD", "Statistics of 12 images are better than those of 4, all else equal.", dsod(12), dsod(4)),
        (scratchdet, "One stage from scratch needs normalization, at its better rate too.", one("all"), best_one),
        (scratchdet, "With BN the low rate is worse.", one("all"), one("all", rate="low")),
        (scratchdet, "Without normalization the low rate is better.", one("none", rate="low"), one("none")),
        (scratchdet, "Without normalization the higher rate fails.", one("none"), one("none", rate="higher")),
        (scratchdet, "With BN the higher rate is better still.", one("all", rate="higher"), one("all")),
        (scratchdet, "BN in backbone and heads is better than in the backbone.", one("all"),
         one("all", where="backbone")),
        (scratchdet, "BN in the backbone is better than none.", one("all", where="backbone"), best_one),
        (scratchdet, "BN in the heads alone is better than none.", one("all", where="heads"), best_one),
        ("DSOD", "One stage: statistics of all images are better than those of 2.", one("all"), one("bn2")),
        (rethinking, "One stage: GN works, better than BN over 2.", one("gn"), one("bn2")),
        (rethinking, "Two stages from scratch need normalization.", two("all"), best_two),
        (rethinking, "Two stages from scratch fail with BN over 2.", two("all"), two("bn2")),
        (rethinking, "Two stages: GN works, better than BN over 2.", two("gn"), two("bn2")),
        (rethinking, "Two stages: GN works, better than no normalization.", two("gn"), best_two),
        (scratchdet, "Two stages without normalization: the higher rate fails.", two("none"),
         two("none", rate="higher")),
        (scratchdet, "Two stages with CGBN: the higher rate is better.", two("all", rate="higher"), two("all")),
        (post, "Two stages without normalization: RoIAlign helps against RoIPool.", two("none"),
         two("none", pool="pool")),
        (post, "Two stages with BN over 2: RoIAlign helps against RoIPool.", two("bn2"), two("bn2", pool="pool")),
        (post, "Two stages with CGBN: RoIAlign helps against RoIPool.", two("all"), two("all", pool="pool")),
        (post, "Two stages with GN: RoIAlign helps against RoIPool.", two("gn"), two("gn", pool="pool")),
        (post, "Two stages with RoIPool: CGBN is a cure.", two("all", pool="pool"), two("bn2", pool="pool")),
        (post, "Two stages with RoIPool: GN is a cure.", two("gn", pool="pool"), two("bn2", pool="pool")),
        ("DSOD", "From scratch, one stage with BN over 2 is better than two stages with RoIPool and BN over 2.",
         replace(one("bn2"), name="one stage"), replace(two("bn2", pool="pool"), name="two stages, RoIPool")),
        (post, "One stage without normalization: clipping helps.", one("none", clip=True), one("none")),
        (post, "One stage with CGBN: clipping helps.", one("all", clip=True), one("all")),
        (post, "One stage without normalization, higher rate: clipping helps.",
         one("none", rate="higher", clip=True), one("none", rate="higher")),
        (scratchdet, "One stage: CGBN is better than clipping at the higher rate without it.", one("all"),
         one("none", rate="higher", clip=True)),
        (post, "Two stages without normalization, higher rate: clipping helps.",
         two("none", rate="higher", clip=True), two("none", rate="higher")),
        (post, "Two stages without normalization: clipping helps.", two("none", clip=True), two("none")),
        (scratchdet, "Two stages: CGBN is better than clipping at the higher rate without it.", two("all"),
         two("none", rate="higher", clip=True)),
        (post, "Two stages with CGBN: clipping helps.", two("all", clip=True), two("all")),
        (rethinking, "Two stages with CGBN: weights help a short training.", two("all", first="weights"),
         two("all")),
        (rethinking, "Two stages without normalization: weights help.", two("none", first="weights"), two("none")),
        (scratchdet, "One stage with CGBN: weights help a short training.", one("all", first="weights"),
         one("all")),
        (scratchdet, "One stage without normalization: weights help.", one("none", first="weights"), one("none")),
    ]  # fmt: skip
    return [Statement(*pair) for pair in pairs]
