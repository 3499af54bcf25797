"""megdet_hpc/data/packed_coco.py: what a pack gives back, and how it refuses a damaged one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep import rebuild_coco as rebuild_script
from data_prep.make_shapes import make_shapes
from data_prep.pack_coco import main
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import PackError
from megdet_hpc.errors import MachineError

Coco = dict[str, Any]


def pack_shapes(folder: Path) -> None:
    images, annotations = folder / "shapes" / "train", folder / "shapes" / "annotations" / "instances_train.json"
    command = ["--annotations", str(annotations), "--images", str(images), "--output", str(folder / "pack")]
    assert main([*command, "--shard-mib", "0.05"]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generated set in shapes/ and its pack of several shards in pack/."""
    folder = tmp_path_factory.mktemp("packed")
    make_shapes(folder / "shapes", num_train=40, num_val=1, seed=5, size=96)
    pack_shapes(folder)
    return folder


@pytest.fixture(scope="module")
def coco(folder: Path) -> Coco:
    source: Coco = json.loads((folder / "shapes" / "annotations" / "instances_train.json").read_bytes())
    return source


def test_index_agrees_with_the_source(folder: Path, coco: Coco) -> None:
    pack = PackedCoco(folder / "pack")
    assert len(pack) == 40
    assert len(pack.shard_paths) > 2
    assert pack.image_ids.dtype == np.int64
    assert pack.heights.dtype == pack.widths.dtype == np.int32
    assert pack.image_ids.tolist() == [image["id"] for image in coco["images"]]
    assert pack.heights.tolist() == [image["height"] for image in coco["images"]]
    assert pack.widths.tolist() == [image["width"] for image in coco["images"]]
    assert pack.categories == coco["categories"]
    assert pack.num_annotations == len(coco["annotations"])


def test_annotations_agree_with_the_source(folder: Path, coco: Coco) -> None:
    pack = PackedCoco(folder / "pack")
    empty = 0
    for index, image in enumerate(coco["images"]):
        expected = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        found = pack.annotations(index)
        empty += not expected
        assert found.boxes_xywh.shape == (len(expected), 4)
        assert [array.dtype for array in found] == [np.int64, np.float64, np.int64, *[np.bool_] * 3, np.float64]
        assert found.ids.tolist() == [a["id"] for a in expected]
        assert found.boxes_xywh.tolist() == [a["bbox"] for a in expected]
        assert found.category_ids.tolist() == [a["category_id"] for a in expected]
        assert found.iscrowd.tolist() == [bool(a["iscrowd"]) for a in expected]
        assert found.areas.tolist() == [a["area"] for a in expected]
        assert pack.segmentations(index) == [a["segmentation"] for a in expected]
    assert empty > 0


def test_absent_keys_have_defaults(tmp_path: Path, folder: Path) -> None:
    """The area of the box, no crowd, no segmentation."""
    make_shapes(tmp_path / "shapes", num_train=3, num_val=1, seed=1, size=64)
    path = tmp_path / "shapes" / "annotations" / "instances_train.json"
    coco = json.loads(path.read_bytes())
    for record in coco["annotations"]:
        del record["area"], record["iscrowd"], record["segmentation"]
    path.write_text(json.dumps(coco))
    pack_shapes(tmp_path)
    pack = PackedCoco(tmp_path / "pack")
    found = pack.annotations(0)
    assert len(found.ids) > 0
    np.testing.assert_array_equal(found.areas, found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3])
    assert not found.iscrowd.any()
    assert pack.segmentations(0) == [None] * len(found.ids)


def test_index_out_of_range(folder: Path) -> None:
    pack = PackedCoco(folder / "pack")
    for read in (pack.read_image_bytes, pack.annotations, pack.segmentations, pack.file_name):
        for index in (-1, 40):
            with pytest.raises(IndexError, match=rf"image {index} .* accepted are 0 to 39"):
                read(index)


def _digest(pack: PackedCoco) -> list[int]:
    return [hash(pack.read_image_bytes(index)) for index in range(len(pack))]


def test_fork_and_pickle_read_the_same(folder: Path) -> None:
    """Workers forked after the parent has read, and a pickled copy as spawn makes it."""
    pack = PackedCoco(folder / "pack")
    expected = _digest(pack)
    assert _digest(pickle.loads(pickle.dumps(pack))) == expected
    assert len(pickle.dumps(pack)) < 1000
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_digest, [pack, pack]) == [expected, expected]
    child = os.fork()  # as above without pickling: the child has the parent's very object
    if child == 0:
        os._exit(0 if _digest(pack) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    pack.close()
    assert _digest(pack) == expected


def test_import_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from megdet_hpc.data.packed_coco import PackedCoco; import megdet_hpc.data.coco_json; "
        f"PackedCoco({str(folder / 'pack')!r}); print([m for m in ('torch', 'horovod', 'mpi4py') if m in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_damaged_image_is_named(damaged: Path) -> None:
    pack = PackedCoco(damaged)
    path = pack.shard_paths[1]
    with h5py.File(path, "r") as file:
        position = file["images/bytes"].id.get_offset() + int(file["images/bytes_offset"][1]) + 100
        image_id = int(file["images/id"][1])
    with open(path, "r+b") as binary:
        binary.seek(position)
        byte = binary.read(1)[0]
        binary.seek(position)
        binary.write(bytes([byte ^ 1]))
    index = pack.image_ids.tolist().index(image_id)
    assert pack.read_image_bytes(index - 1)
    with pytest.raises(PackError, match=rf"shard-00001.h5: image id {image_id}: its bytes differ from their CRC-32"):
        pack.read_image_bytes(index)


def test_shard_replaced_while_open_is_noticed(damaged: Path) -> None:
    pack = PackedCoco(damaged)
    other, path = pack.shard_paths[0], pack.shard_paths[1]
    path.unlink()
    path.write_bytes(other.read_bytes()[:-1])
    last = len(pack) - 1
    assert pack.read_image_bytes(last)
    with pytest.raises(PackError, match=r"shard-00001.h5"):
        for index in range(last):
            pack.read_image_bytes(index)


def test_a_failing_file_system_is_no_bad_input(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = PackedCoco(damaged)

    def fails(*arguments: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pack._files, "read", fails)
    index = next(index for index in range(len(pack)) if len(pack.annotations(index).ids))
    for read in (pack.read_image_bytes, pack.segmentations):
        with pytest.raises(MachineError, match=rf"image id {pack.image_ids[index]}: cannot be read \(\[Errno 5\]"):
            read(index)


def _edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def _edit_source(folder: Path) -> None:
    path = folder / "shard-00001.h5"
    source = json.loads((folder / "manifest.json").read_bytes())["source"]["sha256"]
    path.write_bytes(path.read_bytes().replace(source.encode(), b"0" * 64))


def _swap(folder: Path) -> None:
    """Shards in each other's place, with the sizes the manifest gives."""
    (folder / "shard-00000.h5").write_bytes((folder / "shard-00001.h5").read_bytes())
    shards = json.loads((folder / "manifest.json").read_bytes())["shards"]
    shards[0] = {**shards[1], "file": "shard-00000.h5"}
    totals = {key: sum(shard[key] for shard in shards) for key in ("images", "annotations")}
    _edit_manifest(folder, shards=shards, totals=totals)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a copy": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing, so this copy of a pack is not"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
    "foreign": (lambda f: _edit_manifest(f, format="other"), "no manifest of format megdet_hpc.packed_coco"),
    "version": (lambda f: _edit_manifest(f, version=4), "format version 4 with orientation stored, "),
    "no shards": (lambda f: (f / "manifest.json").write_text(
        '{"format": "megdet_hpc.packed_coco", "version": 1}'), "manifest.json: without coco"),
    "missing": (lambda f: (f / "shard-00001.h5").unlink(), "shard-00001.h5: missing, but manifest.json lists it"),
    "short": (lambda f: os.truncate(f / "shard-00001.h5", 999), "shard-00001.h5: 999 bytes, manifest.json says"),
    "zeroed": (lambda f: (f / "shard-00001.h5").write_bytes(bytes((f / "shard-00001.h5").stat().st_size)),
               "shard-00001.h5: damaged"),
    "other source": (_edit_source, "shard-00001.h5: attribute source_sha256 is '0"),
    "swapped": (_swap, "shard-00000.h5: attribute shard is 1, expected 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pack_is_refused(name: str, damaged: Path) -> None:
    spoil, text = DAMAGES[name]
    spoil(damaged)
    with pytest.raises(PackError) as caught:
        PackedCoco(damaged)
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"no such folder; pack the set with"):
        PackedCoco(tmp_path / "train")
    (tmp_path / "train.partial").mkdir()
    with pytest.raises(PackError, match=r"run the same command of pack_coco again"):
        PackedCoco(tmp_path / "train")


@pytest.mark.parametrize(
    ("name", "inside", "text"),
    [
        ("packed", "val/manifest.json", "holds packed sets and is none; name one of them: val"),
        ("train.partial", "shard-00000.h5", "an unfinished pack; the same command of"),
        ("photos", "a.JPG", "holds images and no packed set; "),
        ("coco", "annotations/instances_val2017.json", "holds no packed set, since it has no manifest.json; "),
        ("empty", ".hidden", "holds no packed set, since it has no manifest.json; "),
    ],
)
def test_a_folder_that_is_no_pack_is_told_apart(name: str, inside: str, text: str, tmp_path: Path) -> None:
    """The packer names a pack once it is finished. So none of these is an interrupted one, except OUTPUT.partial."""
    file = tmp_path / name / inside
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(PackError, match=f"^{re.escape(str(tmp_path / name))}: {re.escape(text)}"):
        PackedCoco(tmp_path / name)


def test_rebuild_script(folder: Path, coco: Coco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "again.json"
    assert rebuild_script.main([str(folder / "pack"), "--output", str(output)]) == 0
    assert json.loads(output.read_bytes()) == coco
    assert rebuild_script.main([str(tmp_path / "none"), "--output", str(output)]) == 1
    assert capsys.readouterr().err.startswith(f"rebuild_coco: error: {tmp_path / 'none'}: no such folder")
