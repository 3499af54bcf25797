"""`megdet predict` as it is typed: its results, its pictures, and what it says of bad input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import megdet_hpc
from megdet_hpc import evaluate
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError
from megdet_hpc.predict.__main__ import main
from megdet_hpc.predict.outputs import make_folder
from tests.cases.sets import encoded, scene
from tests.conftest import Here, Launch, run

PREDICT = ["-m", "megdet_hpc", "predict", "--device", "cpu", "--workers", "0"]


def rows_by_file(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of detections.json by the name of the file, without ids of images."""
    images = json.loads((output / "images.json").read_bytes())["images"]
    rows: dict[str, list[dict[str, Any]]] = {Path(image["file_name"]).name: [] for image in images}
    name = {image["id"]: Path(image["file_name"]).name for image in images}
    for row in json.loads((output / "detections.json").read_bytes()):
        rows[name[row.pop("image_id")]].append(row)
    return rows


def predict(*words: str | Path) -> int:
    """The status of the command, run in this process."""
    try:
        main([*map(str, words), "--device", "cpu", "--workers", "0"])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_same_pixels_give_what_evaluate_gives(trained: Path, shapes: Path, tmp_path: Path) -> None:
    """Boxes, scores and classes of the packed validation set, from its files: equal to the last digit written."""
    checkpoint = trained / "checkpoints" / "step_00000002.pt"
    scored = [sys.executable, "-m", "megdet_hpc", "evaluate", "--checkpoint", str(checkpoint), "--device", "cpu"]
    results = tmp_path / "evaluate.json"
    keys = ["--data.val", str(shapes / "val"), "--results", str(results), "--data.num_workers", "0"]
    assert run([*scored, *keys]).returncode == 0
    output = tmp_path / "found"
    words = ["--checkpoint", str(trained), str(shapes / "coco" / "val"), "--output", str(output), "--score", "0.05"]
    done = run([sys.executable, *PREDICT, *words])
    assert done.returncode == 0, done.stderr
    pack = PackedCoco(shapes / "val")
    names = {int(key): Path(pack.file_name(index)).name for index, key in enumerate(pack.image_ids)}
    expected: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for row in json.loads(results.read_bytes()):
        expected[names[row.pop("image_id")]].append(row)
    assert sum(map(len, expected.values())) > 100
    assert rows_by_file(output) == expected
    read = COCO(str(output / "images.json")).loadRes(str(output / "detections.json"))
    assert len(read.getAnnIds()) == sum(map(len, expected.values()))
    assert done.stdout.splitlines()[-1].startswith(f"result: pictures={len(names)} objects=")


def test_views_and_soft_nms_give_what_evaluate_gives(trained: Path, shapes: Path, tmp_path: Path, here: Here) -> None:
    """Two scales, the flip and soft-NMS; a video's frames and `load` go the same way."""
    checkpoint, results = trained / "checkpoints" / "step_00000002.pt", tmp_path / "evaluate.json"
    keys = ["--data.val", str(shapes / "val"), "--results", str(results), "--data.num_workers", "0", "--device", "cpu"]
    views = ["--evaluation.scales", "[80, 112]", "--evaluation.flip", "true", "--evaluation.soft_nms", "linear"]
    seldom = ["--evaluation.soft_nms_score", "0.05", "--evaluation.max_detections", "20", "--limit", "3"]
    done = here(evaluate.main, ["--checkpoint", str(checkpoint), *keys, *views, *seldom])
    assert done.returncode == 0, done.stderr
    line = "4 views of each image: short sides 80, 112, each flipped too; detections are merged by linear soft-NMS"
    assert done.stdout.splitlines()[0] == line
    pack = PackedCoco(shapes / "val")
    names = {int(key): pack.file_name(index) for index, key in enumerate(pack.image_ids[:3])}
    files = [shapes / "coco" / "val" / Path(name).name for name in names.values()]
    words = ["--scales", "80", "112", "--flip", "--soft-nms", "linear", "--max-detections", "20", "--score", "0.05"]
    assert predict(*files, "--checkpoint", trained, "--output", tmp_path / "found", "--no-pictures", *words) == 0
    expected: dict[str, list[dict[str, Any]]] = {Path(name).name: [] for name in names.values()}
    for row in json.loads(results.read_bytes()):
        expected[Path(names[row.pop("image_id")]).name].append(row)
    assert rows_by_file(tmp_path / "found") == expected
    assert sum(map(len, expected.values())) > 20
    asked = {"scales": (80, 112), "flip": True, "soft_nms": "linear", "max_detections": 20}
    found = megdet_hpc.load(trained, device="cpu", score=0.05, **asked)(files[0])
    assert found.scores == pytest.approx([row["score"] for row in expected[files[0].name]], abs=1e-6)


def test_what_is_written_agrees(trained: Path, shapes: Path, tmp_path: Path) -> None:
    """One set of detections in three files, a picture for each image, and less of all at a higher score."""
    folder, output = shapes / "coco" / "val", tmp_path / "found"
    assert predict("--checkpoint", trained, folder, "--output", output, "--score", "0.05", "--max-detections", "7") == 0
    rows = rows_by_file(output)
    assert max(map(len, rows.values())) == 7
    with open(output / "detections.csv", newline="") as file:
        table = list(csv.DictReader(file))
    names = {c["id"]: c["name"] for c in json.loads((output / "images.json").read_bytes())["categories"]}
    assert [(Path(row["file"]).name, row["category"], float(row["score"])) for row in table] == [
        (name, names[row["category_id"]], row["score"]) for name, own in rows.items() for row in own
    ]
    with open(output / "counts.csv", newline="") as file:
        counts = {row["category"]: int(row["objects"]) for row in csv.DictReader(file)}
    assert counts == {name: sum(row["category"] == name for row in table) for name in names.values()}
    for file in folder.iterdir():
        drawn, own = Image.open(output / "pictures" / file.name), Image.open(file)
        assert drawn.size == own.size
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(own.convert("RGB")))
        assert (difference > 60).any(axis=2).mean() > 0.01, file
    # a wrong word must not cost an earlier output, nor leave a folder
    for place in (output, tmp_path / "new"):
        wrong = ["--output", place, "--overwrite", "--scales", "80", "80"]
        assert predict("--checkpoint", trained, folder, *wrong) == 2
    assert rows_by_file(output) == rows and not (tmp_path / "new").exists()
    higher = sorted(float(row["score"]) for row in table)[len(table) // 2]
    again = ["--output", output, "--overwrite", "--max-detections", "7", "--no-pictures"]
    assert predict("--checkpoint", trained, folder, "--score", str(higher), *again) == 0
    kept = [row["score"] for own in rows_by_file(output).values() for row in own]
    assert 0 < len(kept) < len(table) and min(kept) >= higher - 1e-6
    assert not (output / "pictures").exists()


def test_files_that_fail_are_named_and_the_others_go_on(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((shapes / "coco" / "val").iterdir())[0]
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:400])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    bad = [tmp_path / name for name in ("cut.jpg", "empty.png", "notes.txt", "missing.jpg")]
    output = tmp_path / "found"
    assert predict("--checkpoint", trained, *bad, good, "--output", output, "--batch", "2") == 2
    shown = capsys.readouterr()
    with open(output / "failed.csv", newline="") as file:
        failed = list(csv.DictReader(file))
    assert [row["file"] for row in failed] == [str(path) for path in bad]
    for row in failed:
        assert f": {row['file']}: {row['reason']}\n" in shown.err
    assert failed[3]["reason"] == "no such file or directory"
    assert "failed=4" in shown.out.splitlines()[-1]
    assert list(rows_by_file(output)) == [good.name]
    assert [path.name for path in (output / "pictures").iterdir()] == [good.name]


def test_photographs_as_they_come(trained: Path, tmp_path: Path) -> None:
    """A folder by --input, a blank in a name, a suffix in capitals; evaluate says that it is no packed set."""
    photos = tmp_path / "my photos"
    photos.mkdir()
    (photos / "first photo.jpg").write_bytes(encoded(scene(), "JPEG"))
    (photos / "second.PNG").write_bytes(encoded(scene()))
    output = tmp_path / "found"
    assert predict("--checkpoint", trained, "--input", photos, "--output", output) == 0
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["first photo.jpg", "second.jpg"]
    assert sorted(rows_by_file(output)) == ["first photo.jpg", "second.PNG"]
    scored = ["evaluate", "--checkpoint", str(trained), "--device", "cpu", "--data.val", str(photos)]
    refused = run([sys.executable, "-m", "megdet_hpc", *scored])
    assert refused.returncode == 2
    assert "holds images and no packed set" in refused.stderr, refused.stderr


def test_an_earlier_output_is_kept(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((shapes / "coco" / "val").iterdir())[0]
    output = tmp_path / "found"
    words = ["--checkpoint", trained, good, "--output", output, "--score", "0.05"]
    assert predict(*words) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert predict(*words) == 2
    assert capsys.readouterr().err.endswith(
        f"--output {output} holds earlier results; name a new folder, or give --overwrite\n"
    )
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert predict(*words, "--overwrite") == 0
    (output / "thesis.tex").write_text("years of work")
    assert predict(*words, "--overwrite") == 2
    assert "holds thesis.tex, which is none of its results" in capsys.readouterr().err
    assert (output / "thesis.tex").is_file() and (output / "detections.json").is_file()


def test_a_folder_of_the_users_own_is_no_earlier_output(tmp_path: Path) -> None:
    """It may hold names that are ours, such as pictures."""
    mine = tmp_path / "trip" / "pictures" / "a.jpg"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds pictures, which is none of its results; name a new folder"):
            make_folder(tmp_path / "trip", overwrite)
    assert mine.exists()
    make_folder(tmp_path / "cut", False)  # an output that was cut off before its end
    (tmp_path / "cut" / "pictures").mkdir()
    make_folder(tmp_path / "cut", True)
    assert not (tmp_path / "cut" / "pictures").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/*.jpg"], "nowhere/*.jpg: no file fits this pattern"),
        (["EMPTY"], "no picture or video in this folder"),
        (["PACK"], "is a packed set: megdet evaluate scores it"),
        ([], "no INPUT"),
        (["a.jpg", "--score", "1.5"], "--score is 1.5; accepted: 0 to 1"),
        (["a.jpg", "--batch", "0"], "--batch is 0; accepted: 1 or more"),
        (["a.jpg", "--max-detections", "0"], "--max-detections is 0; accepted: 1 or more"),
        (["a.jpg", "--scales", "100000"], "--scales 100000; accepted: 1 to 16384 each, each side once"),
        (["a.jpg", "--soft-nms", "foo"], "'linear', 'gaussian')\nSee"),
        (["a.jpg", "--scroe", "0.5"], "Did you mean --score?"),
        (["a.jpg", "--checkpoint", "EMPTY"], "is no run's folder"),
        (["a.jpg", "--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt: no such file"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    trained: Path,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, status 2, and nothing is written."""
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "PACK": str(shapes / "val")}
    output = tmp_path / "found"
    given = [places.get(word, word) for word in words]
    assert predict("--checkpoint", trained, "--output", output, *given) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parallel
def test_ranks_share_the_files(trained: Path, shapes: Path, tmp_path: Path, launch: Launch) -> None:
    """Two ranks leave the files of one process, byte for byte, and its status."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (height, width) in enumerate([(90, 120), (90, 120), (64, 64), (90, 120), (64, 64)]):
        (pictures / f"{number}.png").write_bytes(encoded(scene(height, width)))
    (pictures / "damaged.png").write_bytes(encoded(scene())[:300])
    left = []
    for ranks in (0, 2):
        output = tmp_path / f"by_{ranks}"
        words = ["--checkpoint", str(trained), str(pictures), "--output", str(output), "--score", "0.05"]
        done = launch(ranks, *PREDICT, *words, "--batch", "2")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("damaged.png: ") == 1
        left.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert len(left[0]) == 5 + 5 and left[0] == left[1]
