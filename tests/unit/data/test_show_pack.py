"""data_prep/show_pack.py: what the pictures show, their options, data that cannot be shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep.make_shapes import make_shapes, run_lengths
from data_prep.pack_coco import main as pack_main
from data_prep.pack_statistics import draw_statistics, image_file_sizes, images_per_category, plain_number
from data_prep.show_pack import draw_images, main
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GREY = 200


@pytest.fixture(scope="module")
def shapes_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    make_shapes(folder / "shapes", num_train=12, num_val=1, seed=3, size=64)
    return pack(folder, folder / "shapes" / "annotations" / "instances_train.json", folder / "shapes" / "train")


def pack(folder: Path, annotations: Path, images: Path) -> Path:
    source = ["--annotations", str(annotations), "--images", str(images)]
    assert pack_main([*source, "--output", str(folder / "packed"), "--shard-mib", "0.01"]) == 0
    return folder / "packed"


def grey_pack(folder: Path, annotations: list[dict[str, Any]], num_images: int = 1, num_categories: int = 2) -> Path:
    """Grey images of 40 x 30 pixels with ids from 1, categories with ids 10, 20, ..."""
    (folder / "images").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(1, num_images + 1)]
    for image in images:
        Image.new("RGB", (40, 30), (GREY,) * 3).save(folder / "images" / str(image["file_name"]))
    records = [{"id": k, "image_id": 1, "category_id": 10, **record} for k, record in enumerate(annotations)]
    categories = [{"id": 10 * k, "name": f"thing {k}"} for k in range(1, num_categories + 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": records, "categories": categories}))
    return pack(folder, path, folder / "images")


def drawn(folder: Path) -> NDArray[np.uint8]:
    """The first image of a pack as it is drawn, sampled once in the middle of each of its pixels: [30, 40, 3]."""
    figure = draw_images(PackedCoco(folder), [0], "")
    figure.canvas.draw()
    page = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    axes = figure.axes[0]
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    points = axes.transData.transform(np.stack([x.ravel(), y.ravel()], axis=1))
    plt.close(figure)
    columns, rows = points.astype(int).T
    return np.asarray(page[page.shape[0] - 1 - rows, columns, :3]).reshape(30, 40, 3)


def rectangle_mask(left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    mask = np.zeros((30, 40), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def compressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


MASK = rectangle_mask(20, 18, 36, 26)
SEGMENTATIONS: dict[str, Any] = {
    "polygon": [[20, 18, 36, 18, 36, 26, 20, 26]],
    "RLE": run_lengths(MASK),
    "compressed RLE": compressed(MASK),
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_mask_is_drawn_where_it_is(kind: str, tmp_path: Path) -> None:
    """Box and name are elsewhere; of the grey image only the mask is coloured."""
    record = {"bbox": [1, 1, 12, 8], "segmentation": SEGMENTATIONS[kind], "iscrowd": int(kind != "polygon")}
    picture = drawn(grey_pack(tmp_path, [record])).astype(int)
    changed = (np.abs(picture - GREY) > 20).any(axis=2)
    below = np.s_[14:, 16:]
    assert np.array_equal(changed[below], MASK[below])


def test_box_is_drawn_where_it_is(tmp_path: Path) -> None:
    record = {"bbox": [14.5, 12.5, 20, 10], "segmentation": []}
    changed = (np.abs(drawn(grey_pack(tmp_path, [record])).astype(int) - GREY) > 20).any(axis=2)
    outline = rectangle_mask(14, 12, 35, 23) & ~rectangle_mask(15, 13, 34, 22)
    below = np.s_[18:]  # the name covers the upper left corner
    assert np.array_equal(changed[below], outline[below])
    assert changed[12, 14:35].all() and not changed[:11].any()


def test_image_without_boxes_is_drawn_as_it_is(tmp_path: Path) -> None:
    assert (drawn(grey_pack(tmp_path, [])) == GREY).all()


def test_counts_of_categories_and_file_sizes(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 2, 2]}
    records: list[dict[str, Any]] = [box, box, {**box, "image_id": 2}, {**box, "category_id": 20, "iscrowd": 1}]
    folder = PackedCoco(grey_pack(tmp_path, records, num_images=3, num_categories=3))
    images, boxes = images_per_category(folder)
    assert images.tolist() == [2, 0, 0]
    assert boxes.tolist() == [3, 0, 0]
    expected = [(tmp_path / "images" / f"{k}.png").stat().st_size for k in (1, 2, 3)]
    assert image_file_sizes(folder).tolist() == expected


@pytest.mark.parametrize("num_categories", [1, 80, 150])
def test_statistics_of_unusual_sets(num_categories: int, tmp_path: Path) -> None:
    """No box, only flat ones, many categories: every name and panel is there."""
    records = [] if num_categories == 1 else [{"bbox": [1, 1, 0, 5]}]
    figure = draw_statistics(PackedCoco(grey_pack(tmp_path, records, num_categories=num_categories)), "title")
    figure.canvas.draw()
    assert len(figure.axes) == 7
    names = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert names == [f"thing {k}" for k in range(1, min(num_categories, 100) + 1)]
    assert ("of 150" in figure.axes[-1].get_title()) == (num_categories == 150)
    plt.close(figure)


def test_statistics_show_the_set(shapes_pack: Path) -> None:
    pack_of_shapes = PackedCoco(shapes_pack)
    figure = draw_statistics(pack_of_shapes, "title")
    per_image, sides = (sum(bar.get_height() for bar in axes.patches) for axes in figure.axes[:2])  # type: ignore[attr-defined]
    plt.close(figure)
    crowds = sum(int(pack_of_shapes.annotations(k).iscrowd.sum()) for k in range(len(pack_of_shapes)))
    assert per_image == len(pack_of_shapes)
    assert sides == pack_of_shapes.num_annotations - crowds


def test_plain_number() -> None:
    values = [0.05, 1.5, 999, 1500, 100000, 2e6]
    assert [plain_number(value) for value in values] == ["0.05", "1.5", "999", "1.5k", "100k", "2M"]


def test_command_writes_and_does_not_overwrite(
    shapes_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "pictures"
    command = [str(shapes_pack), "--output", str(output), "--images", "2"]
    assert main(command) == 0
    paths = [output / "images.png", output / "statistics.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    first = [path.read_bytes() for path in paths]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300
    assert main([*command, "--seed", "1"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == first
    assert main([*command, "--overwrite"]) == 0
    assert [path.read_bytes() for path in paths] == first
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert paths[0].read_bytes() != first[0]
    assert sorted(output.iterdir()) == paths


def test_default_folder_is_beside_the_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = grey_pack(tmp_path, [])
    monkeypatch.chdir(folder)
    assert main([".", "--images", "1"]) == 0
    assert {path.name for path in (tmp_path / "packed-pictures").iterdir()} == {"images.png", "statistics.png"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "0"], "--images 0: accepted are 1 to 100"),
        (["--images", "101"], "accepted are 1 to 100"),
        (["--seed", "-1"], "--seed -1: accepted are 0 or more"),
    ],
)
def test_bad_values(
    shapes_pack: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(shapes_pack), "--output", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "segmentation", [{"size": [30, 40], "counts": [5, 5]}, [[1, 2, 3]], {"counts": "abc"}, [["a", "b"]], "text"]
)
def test_bad_segmentation_is_named(segmentation: Any, tmp_path: Path) -> None:
    folder = grey_pack(tmp_path, [{"bbox": [1, 1, 2, 2], "segmentation": segmentation}])
    with pytest.raises(UserError, match=r"packed: image id 1, annotation id 0: its segmentation cannot be drawn"):
        draw_images(PackedCoco(folder), [0], "")
    plt.close("all")


def test_needs_no_torch() -> None:
    code = "import sys, data_prep.show_pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
