"""Names of the programs of data_prep/ as they are called here, in a checkout or in an installed package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def as_called_here(text: str) -> str:
    """A message that names programs of data_prep/ in a form that works in the current folder.

    Args:
        text: message with the names used in a checkout: `python data_prep/pack_coco.py`, `data_prep/fetch_coco.sh`.

    Returns:
        The same text in a checkout. Elsewhere `python -m data_prep.pack_coco`, and the full path of a shell script.
    """
    if Path("data_prep", "pack_coco.py").is_file():
        return text
    text = re.sub(r"(?:python )?(?<![\w/])data_prep/(\w+)\.py\b", r"python -m data_prep.\1", text)
    return re.sub(r"(?<![\w/])data_prep/(\w+\.sh)\b", lambda found: f"bash {shlex.quote(str(_ROOT / found[0]))}", text)
