"""How the programs of data_prep/ are called from here: they are in a checkout and in an installed package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def as_called_here(text: str) -> str:
    """A message in which the programs of data_prep/ are named by what works in the current folder.

    Args:
        text: names them as one types them in a checkout: `python data_prep/pack_coco.py`, `data_prep/fetch_coco.sh`.

    Returns:
        The same text in a checkout; elsewhere `python -m data_prep.pack_coco`, and a shell script by its full path.
    """
    if Path("data_prep", "pack_coco.py").is_file():
        return text
    text = re.sub(r"(?:python )?(?<![\w/])data_prep/(\w+)\.py\b", r"python -m data_prep.\1", text)
    return re.sub(r"(?<![\w/])data_prep/(\w+\.sh)\b", lambda found: f"bash {shlex.quote(str(_ROOT / found[0]))}", text)
