"""The folder for the results of `megdet eigenspectrum`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.eigenspectrum.__main__ import folder_of_results
from megdet_hpc.errors import UserError


def test_a_folder_without_results_is_left_only_where_it_was_before(tmp_path: Path) -> None:
    new, earlier, begun = tmp_path / "new", tmp_path / "earlier", tmp_path / "begun"
    earlier.mkdir()
    for output in (new, earlier, begun):
        with pytest.raises(UserError, match="no image"), folder_of_results(output):
            if output == begun:
                (output / "eigenspectrum.csv").touch()
            raise UserError("no image reached any layer")
    assert not new.exists() and earlier.is_dir() and (begun / "eigenspectrum.csv").exists()
    with folder_of_results(new):
        pass
    assert new.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be made"), folder_of_results(tmp_path / "file"):
        pass
