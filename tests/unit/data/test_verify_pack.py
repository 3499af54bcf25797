"""data_prep/verify_pack.py names every kind of damage, and PackedCoco opens none whose index cannot be right."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep import pack_coco, verify_pack
from data_prep.findings import LISTED
from data_prep.make_shapes import make_shapes
from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import PackError
from tests.conftest import Launch

ROOT = Path(__file__).resolve().parents[3]
SHARD = "shard-00001.h5"
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generated set in shapes/ and its pack of several shards in pack/."""
    folder = tmp_path_factory.mktemp("verify")
    make_shapes(folder / "shapes", num_train=NUM_IMAGES, num_val=1, seed=5, size=96)
    command = ["--annotations", str(original(folder)), "--images", str(folder / "shapes" / "train")]
    assert pack_coco.main([*command, "--output", str(folder / "pack"), "--shard-mib", "0.05"]) == 0
    return folder


def original(folder: Path) -> Path:
    return folder / "shapes" / "annotations" / "instances_train.json"


def manifest_of(pack: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((pack / "manifest.json").read_bytes())
    return manifest


def edit_manifest(pack: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_of(pack)
    change(manifest)
    (pack / "manifest.json").write_text(json.dumps(manifest))
    (pack / "index.bin").unlink(missing_ok=True)  # of the manifest as it was


def flip(path: Path, position: int) -> None:
    """Flip the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_shard(pack: Path, change: Callable[[h5py.File], object], name: str = SHARD) -> None:
    """Change a shard and let size and SHA-256 in the manifest follow, so that only the content is wrong."""
    with h5py.File(pack / name, "r+") as file:
        change(file)
    data = (pack / name).read_bytes()

    def follow(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            if shard["file"] == name:
                shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(pack, follow)


def set_entry(dataset: str, entry: Any, value: Any) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        file[dataset][entry] = value

    return lambda pack: edit_shard(pack, change)


def replace_dataset(dataset: str, make: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        data = make(file[dataset][()])
        del file[dataset]
        file.create_dataset(dataset, data=data)

    return lambda pack: edit_shard(pack, change)


def flip_in(dataset: str, byte: int) -> Callable[[Path], None]:
    def spoil(pack: Path) -> None:
        with h5py.File(pack / SHARD, "r") as file:
            position = file[dataset].id.get_offset() + byte
        flip(pack / SHARD, position)

    return spoil


def flip_in_segmentation(pack: Path) -> None:
    """Change a digit of the shard's first segmentation, which stays JSON."""

    def change(file: h5py.File) -> None:
        text = file["annotations/segmentation"][:100].tobytes()
        digit = next(place for place, byte in enumerate(text) if byte in b"2345678")
        file["annotations/segmentation"][digit] = text[digit] ^ 1

    edit_shard(pack, change)


def move_segmentation(pack: Path) -> None:
    """Give the second annotation of the shard's first image with several the segmentation of the first."""

    def change(file: h5py.File) -> None:
        file["annotations/segmentation_offset"][1] = 0

    edit_shard(pack, change)


def replace_image(pack: Path, data: bytes) -> None:
    """Put `data`, cut or filled up to the length, in place of the shard's first image, with its CRC-32."""

    def change(file: h5py.File) -> None:
        length = int(file["images/bytes_offset"][1])
        entry = data[:length].ljust(length, b"\0")
        file["images/bytes"][:length] = np.frombuffer(entry, np.uint8)
        file["images/crc32"][0] = zlib.crc32(entry)

    edit_shard(pack, change)


def repeat_id(pack: Path) -> None:
    with h5py.File(pack / "shard-00000.h5", "r") as file:
        image_id = file["images/id"][0]
    set_entry("images/id", 0, image_id)(pack)


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def verify(capsys: pytest.CaptureFixture[str], pack: Path, *options: str) -> tuple[int, str, list[str]]:
    """Exit status, standard output and the findings' lines."""
    status = verify_pack.main([str(pack), *options])
    out, err = capsys.readouterr()
    lines = [line.removeprefix("verify_pack: ") for line in err.splitlines() if line.startswith("verify_pack: ")]
    assert "Traceback" not in err
    return status, out, lines


def shard_image(pack: Path, local: int = 0) -> str:
    """How messages name an image of the damaged shard."""
    with h5py.File(pack / SHARD, "r") as file:
        begin, end = file["images/file_name_offset"][local : local + 2]
        return f"image id {file['images/id'][local]} (file '{file['images/file_name'][begin:end].tobytes().decode()}')"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_whole_pack(workers: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--decode", "--annotations", str(original(folder)), "--workers", workers]
    status, out, lines = verify(capsys, folder / "pack", *options)
    num_shards = len(manifest_of(folder / "pack")["shards"])
    assert (status, lines) == (0, [])
    assert num_shards > 3
    assert out.startswith(f"verified: {NUM_IMAGES} images, ")
    assert f", {num_shards} shards, decoded, equal to the original, " in out


def test_flipped_byte_in_an_image(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = shard_image(damaged, 1)
    with h5py.File(damaged / SHARD, "r") as file:
        begin = int(file["images/bytes_offset"][1])
    flip_in("images/bytes", begin + 100)(damaged)
    status, _, lines = verify(capsys, damaged)
    assert status == 1
    assert lines[0].startswith(f"image: {SHARD}: {image}: its bytes have the CRC-32 ")
    assert lines[1].startswith(f"sha256: {SHARD}: SHA-256 is ")
    assert "its images are right" not in lines[1]
    assert len(lines) == 3


def test_changed_digit_of_a_box_is_traced_by_the_original(
    folder: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(damaged / SHARD, "r") as file:
        image = int(np.searchsorted(file["annotations/offset"][()], 0, side="right")) - 1
        annotation_id, image_id = file["annotations/id"][0], file["images/id"][image]
    flip_in("annotations/bbox", 5)(damaged)
    status, _, lines = verify(capsys, damaged)
    assert (status, len(lines)) == (1, 2)
    assert lines[0].startswith(f"sha256: {SHARD}: ")
    assert "its images are right, so the damage is in the index or the annotations" in lines[0]
    _, _, lines = verify(capsys, damaged, "--annotations", str(original(folder)))
    text = f"annotations: {SHARD}: annotation id {annotation_id} of image id {image_id}: bbox is ["
    assert [line for line in lines if line.startswith(text)]


Damage = tuple[Callable[[Path], object], str]

# What the shard holds is wrong, and its size and SHA-256 in the manifest are those of the damaged file.
INDEX_DAMAGES: dict[str, Damage] = {
    "offset beyond the data": (set_entry("images/bytes_offset", 1, 10**12),
        "offsets: shard-00001.h5: SECOND: images/bytes_offset[1] is 1000000000000, accepted: rising from 0 to "),
    "falling offset": (set_entry("annotations/offset", 1, -1),
        "offsets: shard-00001.h5: SECOND: annotations/offset[1] is -1, accepted: rising from 0 to "),
    "segmentation offset": (set_entry("annotations/segmentation_offset", 0, 3),
        "annotations/segmentation_offset[0] is 3, accepted: rising from 0 to "),
    "no height": (set_entry("images/height", 0, 0), "IMAGE: images/height[0] is 0, accepted: 1 to 2147483647 pixels"),
    "negative width": (set_entry("images/width", 0, -96), "IMAGE: images/width[0] is -96, accepted: 1 to "),
    "unknown encoding": (set_entry("images/encoding", 0, 7), "IMAGE: images/encoding[0] is 7, accepted: 0 to 1"),
    "unknown category": (set_entry("annotations/category_id", 0, 3),
        "annotations/category_id[0] is 3, accepted: the ids of the manifest's categories"),
    "infinite box": (set_entry("annotations/bbox", (0, 0), np.inf), "annotations/bbox[0] is [inf, "),
    "negative box": (set_entry("annotations/bbox", (0, 3), -2.0), "accepted: 4 finite numbers x, y, width >= 0"),
    "infinite area": (set_entry("annotations/area", 0, np.inf), "annotations/area[0] is inf, accepted: a finite"),
    "iscrowd": (set_entry("annotations/iscrowd", 0, 2), "annotations/iscrowd[0] is 2, accepted: 0, 1, or -1"),
    "difficult": (set_entry("annotations/difficult", 0, 9), "annotations/difficult[0] is 9, accepted: 0, 1, or -1"),
    "fewer heights": (replace_dataset("images/height", lambda h: h[:1]),
        "counts: shard-00001.h5: images/height is int32 of shape (1,), the format and manifest.json's counts say"),
    "another type": (replace_dataset("annotations/bbox", lambda b: b.astype("<f4")),
        "counts: shard-00001.h5: annotations/bbox is float32 of shape "),
    "no ids": (lambda p: edit_shard(p, lambda f: f["images"].move("id", "other")),
        "unreadable shard: shard-00001.h5: HDF5 cannot read it"),
    "repeated id": (repeat_id, " occurs 2 times: shard-00000.h5 (image id "),
    "shard version": (lambda p: edit_shard(p, lambda f: f.attrs.__setitem__("format_version", np.int64(1))),
        "version: shard-00001.h5: attribute format_version is 1, expected 2"),
    "other pack": (lambda p: edit_shard(p, lambda f: f.attrs.__setitem__("source_sha256", "0" * 64)),
        "foreign shard: shard-00001.h5: attribute source_sha256 is '0"),
    "other place": (lambda p: edit_shard(p, lambda f: f.attrs.__setitem__("shard", np.int64(3))),
        "foreign shard: shard-00001.h5: attribute shard is 3, expected 1"),
    "totals": (lambda p: edit_manifest(p, lambda m: m["totals"].update(images=41)),
        "manifest: manifest.json: totals say 41 images, the shards' counts add up to 40"),
    "shard's file": (lambda p: edit_manifest(p, lambda m: m["shards"][1].update(file="../shard-00001.h5")),
        "manifest: manifest.json: shards[1] names the file '../shard-00001.h5', expected 'shard-00001.h5'"),
    "shard's count": (lambda p: edit_manifest(p, lambda m: m["shards"][1].update(images=None)),
        "manifest: manifest.json: shards[1] is {'file': 'shard-00001.h5', 'images': None"),
    "no categories": (lambda p: edit_manifest(p, lambda m: m["coco"].pop("categories")),
        "manifest: manifest.json: coco has no list of categories"),
    "missing": (lambda p: (p / SHARD).unlink(), "missing shard: shard-00001.h5: missing, but manifest.json lists it"),
    "truncated": (lambda p: os.truncate(p / SHARD, 999), "size: shard-00001.h5: truncated: 999 bytes, manifest.json"),
    "manifest version": (lambda p: edit_manifest(p, lambda m: m.update(version=3)),
        "format version 3 with orientation stored, this reader knows 1 and 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX_DAMAGES)
def test_damage_is_listed_and_not_opened(name: str, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, text = INDEX_DAMAGES[name]
    text = text.replace("IMAGE", shard_image(damaged)).replace("SECOND", shard_image(damaged, 1).split(" (")[0])
    spoil(damaged)
    status, out, lines = verify(capsys, damaged)
    assert (status, out) == (1, "")
    assert any(text in line for line in lines), lines
    assert "error: " in lines[-1]
    with pytest.raises(PackError) as caught:
        PackedCoco(damaged)
    if name != "repeated id":
        assert "manifest.json" in str(caught.value) or SHARD in str(caught.value)
    assert "\n" not in str(caught.value)


# What opening does not read, or cannot know to be wrong.
OTHER_DAMAGES: dict[str, Damage] = {
    "sha256": (lambda p: edit_manifest(p, lambda m: m["shards"][1].update(sha256="0" * 64)),
        "or manifest.json is wrong"),
    "image_bytes": (lambda p: edit_manifest(p, lambda m: m["totals"].update(image_bytes=1)),
        "totals: manifest.json: totals.image_bytes is 1, the shards hold "),
    "summary": (lambda p: edit_manifest(p, lambda m: m["summary"].update(crowd=99)),
        "totals: manifest.json: summary.crowd is 99, the shards hold "),
    "skipped": (lambda p: edit_manifest(p, lambda m: m["summary"].update(skipped={})),
        "manifest: manifest.json: summary.skipped does not count"),
    "unlisted": (lambda p: (p / "shard-00099.h5").write_bytes(b"x"),
        "foreign shard: shard-00099.h5: lies in the folder, but manifest.json does not list it"),
    "source position twice": (set_entry("images/source_index", 0, 0), "source_index: images/source_index 0 occurs 2"),
    "source position absent": (set_entry("images/source_index", 0, 0),
        "source_index: no shard holds the image at position "),
    "source position beyond": (set_entry("annotations/source_index", 0, 10**6),
        "source_index is 1000000, accepted: 0 to "),
    "annotation id twice": (set_entry("annotations/id", slice(0, 2), 77), "duplicate id: annotation id 77 occurs "),
    "file name": (set_entry("images/file_name", 0, 255), "images/file_name[0] is damaged ('utf-8' codec"),
    "segmentation": (set_entry("annotations/segmentation", 0, 33), "annotations/segmentation[0] is damaged (Expecting"),
    "segmentation's checksum": (flip_in_segmentation, "segmentation: shard-00001.h5: IMAGE: its segmentations have "),
    "segmentation's border": (move_segmentation, "segmentation: shard-00001.h5: IMAGE: its segmentations have the CRC"),
    "no JPEG": (lambda p: replace_image(p, b"RIFF"), "image: shard-00001.h5: IMAGE: begins with b'RIFF'"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_DAMAGES)
def test_damage_is_listed(name: str, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, text = OTHER_DAMAGES[name]
    text = text.replace("IMAGE", shard_image(damaged))
    spoil(damaged)
    status, out, lines = verify(capsys, damaged)
    assert (status, out) == (1, "")
    assert any(text in line for line in lines), lines


def test_decode_finds_what_checksums_do_not(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = shard_image(damaged)
    replace_image(damaged, jpeg(33, 17))
    assert verify(capsys, damaged)[0] == 0
    status, _, lines = verify(capsys, damaged, "--decode")
    assert status == 1
    assert lines[0].startswith(f"decode: {SHARD}: {image}: is 33 x 17 pixels, the index says ")
    replace_image(damaged, jpeg(96, 96)[:300])
    _, _, lines = verify(capsys, damaged, "--decode")
    assert lines[0].startswith(f"decode: {SHARD}: {image}: ")


def test_all_findings_are_counted_and_the_first_spelt_out(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(damaged.glob("shard-*.h5"))[1:]:
        edit_shard(damaged, lambda file: file["images/crc32"].__setitem__(slice(None), 1), path.name)
    (damaged / "shard-00000.h5").unlink()
    spoilt = NUM_IMAGES - manifest_of(damaged)["shards"][0]["images"]
    status, _, lines = verify(capsys, damaged)
    assert status == 1
    assert sum(line.startswith("image: shard-") for line in lines) == LISTED
    assert f"image: ... and {spoilt - LISTED} more" in lines
    assert any(line.startswith("missing shard: shard-00000.h5") for line in lines)
    assert lines[-1].endswith(f"{spoilt + 1} findings; copy or pack it again")


def test_any_flipped_bit_is_found(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In HDF5's own structures and in ours."""
    data = (damaged / SHARD).read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 12).tolist() + list(range(0, 2000, 100)):
        flip(damaged / SHARD, position)
        status, _, lines = verify(capsys, damaged)
        assert status == 1, position
        assert SHARD in lines[0]
        (damaged / SHARD).write_bytes(data)
    assert verify(capsys, damaged)[0] == 0


def test_bad_image_left_out_by_the_packer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pack with skips equals the rest of its source."""
    coco = json.loads(original(folder).read_bytes())
    coco["images"][3]["width"] = 0
    coco["annotations"][5]["bbox"] = [0, 0, -1, 1]
    source = tmp_path / "source.json"
    source.write_text(json.dumps(coco))
    command = ["--annotations", str(source), "--images", str(folder / "shapes" / "train"), "--on-error", "skip"]
    assert pack_coco.main([*command, "--output", str(tmp_path / "pack")]) == 0
    capsys.readouterr()
    status, out, lines = verify(capsys, tmp_path / "pack", "--annotations", str(source))
    assert (status, lines) == (0, [])
    assert f"verified: {NUM_IMAGES - 1} images" in out
    coco["annotations"][-1]["area"] = 3
    source.write_text(json.dumps(coco))
    status, _, lines = verify(capsys, tmp_path / "pack", "--annotations", str(source))
    assert status == 1
    assert f"the original says 3 (annotations[{len(coco['annotations']) - 1}])" in lines[0]


def test_bad_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        ([str(folder / "pack"), "--workers", "0"], "error: --workers 0: accepted are 1 or more"),
        ([str(tmp_path / "none")], f"error: {tmp_path / 'none'}: no such folder"),
        ([str(folder / "pack"), "--annotations", str(tmp_path / "none")], "none: no such file"),
    ):
        assert verify_pack.main(options) == 1
        assert text in capsys.readouterr().err


@pytest.mark.parallel
def test_ranks_share_the_shards(folder: Path, damaged: Path, launch: Launch) -> None:
    """Fewer and more ranks than shards."""
    pytest.importorskip("mpi4py", reason="mpi4py not installed")
    script, num_shards = str(ROOT / "data_prep" / "verify_pack.py"), len(manifest_of(damaged)["shards"])
    result = launch(2, script, str(folder / "pack"), "--decode", "--annotations", str(original(folder)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"verified: {NUM_IMAGES} images") == 1
    flip_in("images/bytes", 100)(damaged)
    (damaged / "shard-00000.h5").unlink()
    for ranks in (2, num_shards + 1):
        result = launch(ranks, script, str(damaged))
        assert result.returncode == 1
        assert result.stderr.count(f"verify_pack: image: {SHARD}: {shard_image(damaged)}") == 1
        assert result.stderr.count("verify_pack: missing shard: shard-00000.h5") == 1
        assert "Traceback" not in result.stderr


def test_damaged_segmentation_is_named_when_read(damaged: Path) -> None:
    with h5py.File(damaged / SHARD, "r") as file:
        image = int(np.searchsorted(file["annotations/offset"][()], 0, side="right")) - 1
        image_id = int(file["images/id"][image])
    flip_in_segmentation(damaged)
    pack = PackedCoco(damaged)
    text = rf"{SHARD}: image id {image_id}: its segmentations are damaged \(their bytes differ from their CRC-32\)"
    with pytest.raises(PackError, match=text):
        pack.segmentations(pack.image_ids.tolist().index(image_id))
    with pytest.raises(PackError, match=text):
        rebuild_coco(pack)
    assert rebuild_coco(pack, with_segmentations=False)["annotations"]


def test_imports_no_torch() -> None:
    code = (
        "import sys, data_prep.verify_pack, data_prep.stage_pack; "
        "print([m for m in ('torch', 'horovod', 'mpi4py') if m in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def unpickling(source: str) -> list[str]:
    """What in a module could unpickle a file: imports of pickle's family, loads of numpy and torch."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in ("pickle", "cPickle", "dill", "shelve", "joblib")]
        if isinstance(node, ast.Call):
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.append("allow_pickle")
            if ast.unparse(node.func) in ("torch.load", "pd.read_pickle"):
                found.append(ast.unparse(node.func))
    return found


def test_data_is_never_unpickled() -> None:
    assert unpickling("import torch\ntorch.load('x')") == ["torch.load"]
    assert unpickling("import numpy as np\nnp.load('x', allow_pickle=True)\nimport pickle") != []
    files = [*(ROOT / "data_prep").rglob("*.py"), *(ROOT / "megdet_hpc" / "data").rglob("*.py")]
    assert len(files) > 15
    assert {str(file): names for file in files if (names := unpickling(file.read_text()))} == {}
