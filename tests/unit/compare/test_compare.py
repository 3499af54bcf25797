"""`megdet compare`: the table, its files and the picture, of runs in several states."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from megdet_hpc.compare.__main__ import main
from megdet_hpc.compare.figure import drawn_scores
from megdet_hpc.compare.table import text_of
from megdet_hpc.record.run_record import read_run


def written(
    folder: Path, batch: int, *, rows: int = 30, seconds: float = 0.5, scores: bool = True, **keys: object
) -> Path:
    """A run of an older version: its configuration, a row every 10 steps, an AP every 100."""
    folder.mkdir(parents=True)
    content: dict[str, object] = {"log_every": 10, "solver": {"epochs": 3.0}, **keys}
    (folder / "config.yaml").write_text(json.dumps(content))
    lines = []
    for step in range(10, 10 * rows + 1, 10):
        speed = {"images_per_s": batch / seconds, "step_max_s": seconds}
        lines.append({"step": step, "epoch": step / 100, "loss": 3 / (1 + step / 100), **speed})
        if scores and step % 100 == 0:
            # the best is not the last
            coco = {"val/AP": 0.3 - abs(step - 200) / 1000, "val/AP50": 0.5}
            lines.append({"step": step, "epoch": step / 100, **coco, "val/AP50_voc07": step / 1000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    one = written(tmp_path / "runs" / "one", 16, norm={"size": 16})
    two = written(tmp_path / "runs" / "two", 256, seconds=1.0, norm={"size": 32}, output="elsewhere")
    begun = written(tmp_path / "runs" / "begun", 16, rows=0)
    return [str(one), str(two), str(begun)]


def test_the_table_and_its_files(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "out" / name for name in ("c.csv", "c.json", "c.png")]
    options = [word for file in files for word in (f"--{file.suffix[1:]}".replace("png", "picture"), str(file))]
    main([*runs, *options])
    said = capsys.readouterr().out
    cells = [re.split(r" {2,}", line.strip()) for line in said.splitlines() if line]
    table = {title: values for title, *values in cells}
    assert table["run"] == ["one", "two", "begun"]
    assert table["norm.size"] == ["16", "32", "0"]  # a key that the third does not set has its default
    assert "output" not in table and "solver.epochs" not in table
    assert table["mini-batch [images]"] == ["16", "256", "-"]
    assert table["updates"] == ["300", "300", "0"] and table["of updates"][:2] == ["300", "300"]
    assert table["images seen"] == ["4,800", "76,800", "-"]
    assert table["AP, best"] == ["0.300", "0.300", "-"] and table["after updates"][:2] == ["200", "200"]
    assert table["AP, last"] == ["0.200", "0.200", "-"]
    assert table["weights scored"] == ["raw", "raw", "-"]
    assert table["time of the steps"] == ["2.5 min", "5.0 min", "-"]
    assert table["images/s"] == ["32", "256", "-"]

    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["one", "two", "begun"]
    assert (float(rows[1]["hours"]), rows[2]["AP_best"]) == (pytest.approx(300 / 3600), "")
    objects = json.loads(files[1].read_text())
    assert list(objects[0]) == list(rows[0]) and objects[1]["images_seen"] == 76800
    assert objects[2]["loss_last"] is None and objects[0]["loss_last"] == pytest.approx(0.7906, abs=1e-4)
    picture = imread(files[2])
    assert min(picture.shape[:2]) > 800
    assert (picture[:, picture.shape[1] // 2 :, :3].min(axis=-1) < 0.9).mean() > 0.02, "the panels fill it"
    # the colours of the first two runs are in all four panels
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    for color in ((31, 119, 180), (255, 127, 14)):
        near = abs(picture[..., :3] * 255 - color).max(axis=-1) < 4
        for rows_of, columns in ((slice(0, height), slice(0, width)), (slice(height, None), slice(width, None))):
            assert near[rows_of, columns].sum() > 50, color


def test_runs_are_compared_by_their_own_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = str(written(tmp_path / "voc", 16, evaluation={"metric": "voc07"}))
    other = str(written(tmp_path / "other", 16, evaluation={"metric": "voc07"}))
    coco = str(written(tmp_path / "coco", 16))

    def table(*runs: str) -> dict[str, list[str]]:
        main([*runs])
        cells = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line]
        return {title: values for title, *values in cells}

    alike, mixed = table(voc, other), table(voc, coco)
    assert alike["AP50_voc07, best"] == alike["AP50_voc07, last"] == ["0.300", "0.300"]
    assert alike["after updates"] == ["300", "300"] and "AP, best" not in alike
    assert alike["AP, last"] == ["0.200", "0.200"] and alike["AP50, last"] == ["0.500", "0.500"]
    assert mixed["evaluation.metric"] == ["voc07", "coco"] and mixed["AP50_voc07, best"] == ["0.300", "-"]
    assert mixed["AP, best"] == ["-", "0.300"] and mixed["AP, last"] == ["0.200", "0.200"]
    runs = [read_run(Path(run)) for run in (voc, other, coco)]
    assert drawn_scores(runs[:2]) == ("AP50_voc07", [[0.1, 0.2, 0.3]] * 2)
    label, values = drawn_scores(runs)
    assert label.startswith("COCO's AP") and values == [pytest.approx([0.2, 0.3, 0.2])] * 3


def test_a_run_without_scores_or_rows_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "a", 4, rows=1, scores=False)
    main([str(run), str(written(tmp_path / "b", 4, rows=0)), "--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 0
    assert capsys.readouterr().out.endswith(f"\n\nwrote {tmp_path / 'p.png'}\n")


def test_many_runs_come_in_parts() -> None:
    rows = [{"run": f"run_{number}", "state": "finished", "updates": number} for number in range(9)]
    text = text_of(rows, 60)
    assert max(map(len, text.splitlines())) <= 60
    parts = text.split("\n\n")
    assert [line.split()[0] for line in parts[-1].splitlines()] == ["run", "state", "updates"]
    assert " ".join(text.split()).count("run_") == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere"], "nowhere: no such folder; accepted: the folder of a run, its --output"),
        (["."], "is no run's folder: it has none of config.yaml"),
        (["RUN", "RUN"], "named twice; accepted: each run once"),
        (["RUN", "--picture", "x.jpg"], "--picture x.jpg; accepted: a name that ends in .png"),
        (["RUN", "--csv", "there.csv"], "--csv there.csv: is there already; --overwrite replaces it"),
        (["RUN", "--json", "there.csv/x.json"], "cannot be written"),
    ],
)
def test_refusals(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").touch()
    run = str(written(tmp_path / "runs" / "one", 4, rows=1))
    with pytest.raises(SystemExit) as ended:
        main([run if option == "RUN" else option for option in options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_time_to_an_ap(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def table(*words: str) -> dict[str, list[str]]:
        main([*words])
        cells = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line]
        return {title: values for title, *values in cells}

    # AP 0.2, 0.3, 0.2 after 100, 200, 300 updates of 0.5 and 1 s; without a number it is the highest of all runs
    found = table(*runs[:2])
    assert found["updates to AP 0.3"] == ["200", "200"] and found["time to AP 0.3"] == ["1.7 min", "3.3 min"]
    found = table(*runs, "--ap", "0.15", "0.9")
    assert found["updates to AP 0.15"] == ["100", "100", "-"]
    assert found["time to AP 0.15"] == ["0.8 min", "1.7 min", "-"]
    assert found["time to AP 0.9"] == ["-", "-", "-"]
    assert not [title for title in table(*runs) if "to AP" in title]  # one has no score
    with pytest.raises(SystemExit):
        main([*runs, "--ap", "30"])
    assert "--ap 30; accepted: 0 to 1" in capsys.readouterr().err


def test_the_plans_hours_stand_beside_the_updates_to_an_ap(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*runs, "--ap", "0.3", "0.9", "--gpus"])
    said = capsys.readouterr().out
    assert "updates to AP 0.3 as GPUs would make them" in said and "updates to AP 0.9 as" not in said
    assert "mini-batch   16 on   8 GPUs: 200 updates of 1.46 s = 0.081 h" in said
    assert "mini-batch  256 on 128 GPUs: 200 updates of 1.48 s = 0.0821 h" in said
    main([runs[0], runs[2], "--ap", "0.3", "--gpus"])
    assert "--gpus: nothing to compare; an AP must have been reached at two mini-batches" in capsys.readouterr().out
