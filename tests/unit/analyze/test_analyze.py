"""Planted errors are counted as what they are, the figures are pycocotools', and the page stands alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc.analyze.__main__ import main
from megdet_hpc.analyze.analysis import Analysis, analyze
from megdet_hpc.analyze.charts import most_confused
from megdet_hpc.analyze.output import TABLES
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluate import main as evaluate
from megdet_hpc.evaluation.coco import COCO_MAX_DETECTIONS, score
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.results import write_results
from tests.cases.scoring_sets import coco, pack, truth


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedCoco:
    """Six images with four boxes each, red and blue in turn."""
    return PackedCoco(pack(coco(image_ids=range(1, 7)), tmp_path_factory.mktemp("analyze")))


def analysed(packed: PackedCoco, table: DetectionTable, **options: float) -> Analysis:
    options = {"max_detections": COCO_MAX_DETECTIONS, "score": 0.1, **options}
    return analyze(packed, table, num_images=len(packed), **options)  # type: ignore[arg-type]


def counts(found: Analysis) -> dict[str, int]:
    return {row["error"]: row["count"] for row in found.errors if row["count"]}


def with_row(table: DetectionTable, box: list[float], category: int, value: float = 0.5) -> DetectionTable:
    """A detection more, in the first image."""
    one = DetectionTable(table.image_ids[:1], np.array([box], float), np.array([value]), np.array([category]))
    return DetectionTable.joined([table, one])


def test_perfect_detections_have_no_error(packed: PackedCoco) -> None:
    found = analysed(packed, truth(packed))
    assert counts(found) == {} and found.metrics["AP"] == pytest.approx(1)
    assert found.confusion.tolist() == [[12, 0, 0], [0, 12, 0], [0, 0, 0]]
    assert all(row["F1"] == 1 for row in found.images)
    assert [row["AP"] for row in found.classes] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("kind", "box", "category"),
    [
        ("Cls", [8, 10, 36, 28], 2),
        ("Loc", [26, 10, 36, 28], 1),  # IoU 18 / 54
        ("Both", [26, 10, 36, 28], 2),
        ("Dupe", [8, 11, 36, 28], 1),
        ("Bkg", [100, 80, 10, 8], 1),
    ],
)
def test_a_planted_detection_is_of_its_type(packed: PackedCoco, kind: str, box: list[float], category: int) -> None:
    found = analysed(packed, with_row(truth(packed), box, category))
    assert counts(found) == {kind: 1}
    assert found.images[0]["image_id"] == 1 and found.images[0]["wrong"] == 1 and found.images[0]["missed"] == 0
    assert found.confusion[-1, category - 1] == 1


def test_a_planted_detection_that_is_surest_costs_ap(packed: PackedCoco) -> None:
    found = analysed(packed, with_row(truth(packed), [100, 80, 10, 8], 1, value=0.99))
    cost = {row["error"]: row["cost_AP50"] for row in found.errors}
    assert cost["Bkg"] == pytest.approx(1 - found.metrics["AP50"], abs=1e-9) and cost["Bkg"] > 0.01
    assert cost["Loc"] == cost["Dupe"] == 0


def test_a_box_without_detection_is_missed(packed: PackedCoco) -> None:
    table = truth(packed)
    found = analysed(packed, table.rows(np.arange(1, len(table))))
    assert counts(found) == {"Miss": 1} and found.confusion[0].tolist() == [11, 0, 1]
    assert (found.images[0]["image_id"], found.images[0]["missed"]) == (1, 1)


def test_where_no_detection_counts_every_box_is_missed(packed: PackedCoco) -> None:
    unsure = dataclasses.replace(truth(packed), scores=np.full(24, 0.5))
    found = analysed(packed, unsure, score=0.9)
    assert found.confusion.tolist() == [[0, 0, 12], [0, 0, 12], [0, 0, 0]]


def test_what_nothing_was_found_of_is_said(packed: PackedCoco) -> None:
    table = truth(packed)
    found = analysed(packed, table.rows(table.category_ids == 1))
    assert found.unfound == ["blue"] and counts(found) == {"Miss": 12}


def test_no_number_stands_for_what_does_not_exist(packed: PackedCoco) -> None:
    found = analysed(packed, truth(packed).rows(np.zeros(0, np.int64)))
    assert found.metrics["AP"] == 0 and counts(found) == {"Miss": 24}
    assert all(np.isnan(row["cost_AP50"]) for row in found.errors)
    assert np.isnan(found.calibration["ECE"]) and np.isnan(found.metrics["APl"])
    assert [np.isnan(row["AP"]) for row in found.ranges if row["by"] == "size"] == [False, True, True]


def test_a_detection_in_a_crowd_region_is_no_confusion(tmp_path: Path) -> None:
    source = coco()
    source["annotations"][0]["iscrowd"] = 1
    crowded = PackedCoco(pack(source, tmp_path / "set"))
    found = analysed(crowded, truth(crowded))
    assert found.confusion.tolist() == [[3, 0, 0], [0, 4, 0], [0, 0, 0]] and found.num_boxes == 7


def noisy(packed: PackedCoco) -> DetectionTable:
    """Detections of every quality, two a box, some of the other class."""
    rng, table = np.random.default_rng(0), truth(packed)
    table = DetectionTable.joined([table, table])
    boxes = table.boxes_xywh + rng.normal(0, 2.5, table.boxes_xywh.shape)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    other = np.where(rng.random(len(table)) < 0.2, 3 - table.category_ids, table.category_ids)
    return DetectionTable(table.image_ids, boxes, rng.random(len(table)), other)


def test_the_scores_are_those_of_pycocotools(packed: PackedCoco) -> None:
    for limit in (COCO_MAX_DETECTIONS, 2):
        found, theirs = (f(packed, noisy(packed), max_detections=limit) for f in (analysed, score))
        assert 0.1 < theirs.metrics["AP"] < 0.9
        assert found.metrics == pytest.approx(theirs.metrics, abs=1e-6, nan_ok=True)
        assert [row["AP"] for row in found.classes] == pytest.approx([c.ap for c in theirs.classes], abs=1e-6)
        assert [row["AP50"] for row in found.classes] == pytest.approx([c.ap50 for c in theirs.classes], abs=1e-6)
        sizes = [row["AP"] for row in found.ranges if row["by"] == "size"]
        assert sizes == pytest.approx([theirs.metrics[f"AP{s}"] for s in "sml"], abs=1e-6, nan_ok=True)


def test_ap_by_aspect_is_that_of_the_boxes_of_this_aspect(tmp_path: Path) -> None:
    source = coco(names={1: "thing"})
    for annotation in source["annotations"][::4]:
        annotation["bbox"] = [0, 0, 100, 20]
    packed = PackedCoco(pack(source, tmp_path / "set"))
    table = truth(packed)
    narrow = table.boxes_xywh[:, 2] < 100
    rows = {row["range"].split(" (")[0]: row for row in analysed(packed, table.rows(narrow)).ranges}
    assert rows["very wide"]["boxes"] == 2 and rows["very wide"]["AP"] == 0
    assert rows["square"]["boxes"] == 6 and rows["square"]["AP"] == pytest.approx(1)


def test_the_score_of_the_highest_f1(packed: PackedCoco) -> None:
    table = with_row(truth(packed), [100, 80, 10, 8], 1)
    threshold = analysed(packed, table, score=None).threshold  # type: ignore[arg-type]
    assert threshold.chosen and threshold.score == 0.9 and threshold.f1 == 1


def test_of_many_classes_the_most_confused_are_shown() -> None:
    matrix = np.zeros((301, 301), np.int64)
    matrix[7, 200], matrix[3, 3] = 5, 100
    assert {7, 200} <= set(most_confused(matrix, 20).tolist()) and len(most_confused(matrix, 20)) == 20


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.headings += tag == "h2"
        assert tag not in ("script", "link", "iframe")
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]


def test_files_of_a_results_file(packed: PackedCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "found.json", noisy(packed))
    arguments = ["--results", str(tmp_path / "found.json"), "--data.val", str(packed.directory)]
    main([*arguments, "--output", str(tmp_path / "out")])
    assert re.fullmatch(r"result: AP=0\.\d{3} AP50=0\.\d{3} images=6", capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert written["metrics"]["APl"] is None and written["source"]["images"] == "6"
    with open(tmp_path / "out" / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["AP"]) for row in rows] == [row["AP"] for row in written["classes"]]
    assert rows[0]["APl"] == "none"
    links = Links()
    links.feed((tmp_path / "out" / "index.html").read_text())
    assert links.headings == 8 and len(links.sources) > 6
    assert all(source.startswith("data:image/") for source in links.sources)
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--output", str(tmp_path / "out")])
    assert refused.value.code == 2 and "exists already" in capsys.readouterr().err
    assert {file.stem for file in (tmp_path / "out").glob("*.csv")} == set(TABLES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.csv").write_text("mine")
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--output", str(tmp_path / "mine")])
    assert refused.value.code == 2 and "images.csv: exists already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "images.csv").read_text() == "mine"


def test_evaluate_writes_the_same_page(packed: PackedCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "found.json", noisy(packed))
    arguments = ["--results", str(tmp_path / "found.json"), "--data.val", str(packed.directory)]
    evaluate([*arguments, "--limit", "4", "--report", str(tmp_path / "out")])
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("wrote ") and last[1].endswith("images=4")
    written = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert f"AP={written['metrics']['AP']:.3f} " in last[1] and written["source"]["images"] == "4"
    with pytest.raises(SystemExit) as refused:
        evaluate([*arguments, "--report", str(tmp_path / "out")])
    assert refused.value.code == 2 and "exists already; give another --report" in capsys.readouterr().err


def test_without_hotcoco(
    packed: PackedCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "found.json", noisy(packed))
    arguments = ["--results", str(tmp_path / "found.json"), "--data.val", str(packed.directory)]
    monkeypatch.setattr("megdet_hpc.evaluation.coco.importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    for program, option in ((main, "--output"), (evaluate, "--report")):
        with pytest.raises(SystemExit) as refused:
            program([*arguments, option, str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert refused.value.code == 2 and "is made by hotcoco, which is not installed; pip install hotcoco" in said
    assert not (tmp_path / "out").exists()
    evaluate(arguments)
    assert "images=6" in capsys.readouterr().out


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_opens_the_page(packed: PackedCoco, tmp_path: Path) -> None:
    write_results(tmp_path / "found.json", noisy(packed))
    out = tmp_path / "out"
    main(["--results", str(tmp_path / "found.json"), "--data.val", str(packed.directory), "--output", str(out)])
    page = (out / "index.html").read_text()
    counted = "document.title = [...document.images].filter(image => image.naturalWidth > 100).length + ' drawn'"
    script = f"<script>onload = () => {{ {counted} }}</script></body>"
    (out / "probe.html").write_text(page.replace("</body>", script))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", str(out / "probe.html")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"<title>{page.count('<img ')} drawn</title>" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one"),
        (["nowhere"], "no such folder"),
        (["."], "config.yaml"),
        (["--results", "x.json"], "--data.val"),
        (["run", "--score", "2"], "0 to 1"),
        (["run", "--max-detections", "0"], "1 or more"),
    ],
)
def test_bad_input_is_a_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert refused.value.code == 2 and len(said) == 1 and words in said[0]


@pytest.mark.parametrize("word", ["--output=found", "--output found"])
def test_evaluate_has_no_output(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate(["--results", "own.json", *word.split()])
    assert ended.value.code == 2 and "--output found is the folder of a training; --results" in capsys.readouterr().err
