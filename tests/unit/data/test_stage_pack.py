"""data_prep/stage_pack.py: one checked copy a node, whatever happens while it is made."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep import pack_coco, stage_pack
from data_prep.make_shapes import make_shapes

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = str(ROOT / "data_prep" / "stage_pack.py")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of several shards."""
    folder = tmp_path_factory.mktemp("stage")
    make_shapes(folder / "shapes", num_train=24, num_val=1, seed=5, size=96)
    annotations, images = folder / "shapes" / "annotations" / "instances_train.json", folder / "shapes" / "train"
    command = ["--annotations", str(annotations), "--images", str(images), "--output", str(folder / "pack")]
    assert pack_coco.main([*command, "--shard-mib", "0.03"]) == 0
    assert len(list((folder / "pack").glob("shard-*.h5"))) > 3
    return folder / "pack"


@pytest.fixture
def source(pack: Path, tmp_path: Path) -> Path:
    """A copy of the pack, for a test to spoil."""
    copy = tmp_path / "source"
    copy.mkdir()
    for path in pack.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(*arguments: Path | str, limit: int | None = None) -> subprocess.Popen[str]:
    """Start the script, with files limited to `limit` bytes."""

    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)


def stage(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> tuple[int, str, str]:
    """Exit status, standard output and error."""
    status = stage_pack.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_several_processes_copy_once(pack: Path, tmp_path: Path) -> None:
    target = tmp_path / "node" / "train"
    processes = [start(pack, target) for _ in range(4)]
    results = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [(out, status) for (out, _), status in results] == [(f"{target}\n", 0)] * 4
    said = "".join(err for (_, err), _ in results)
    num_shards = len(list(pack.glob("shard-*.h5")))
    assert said.count(f"{num_shards} shards copied, 0 kept") == 1
    assert said.count(f"{num_shards} shards were there already") == 3
    assert files_of(target) == files_of(pack)
    assert sorted(os.listdir(target.parent)) == [".train.lock", "train"]


def test_waits_for_the_lock(pack: Path, tmp_path: Path) -> None:
    """A second caller copies nothing while the first holds the lock, and goes on when that one is killed."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import time; from pathlib import Path; "
        f"from data_prep import stage_pack as s; lock = s._locked(Path({str(tmp_path / 'train')!r})); "
        "lock.__enter__(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiter = start(pack, tmp_path / "train")
    assert waiter.stderr is not None
    assert "waiting for another process that stages it" in waiter.stderr.readline()
    assert not (tmp_path / "train.partial").exists()
    assert waiter.poll() is None
    holder.kill()
    holder.wait()
    assert waiter.communicate(timeout=60)[0] == f"{tmp_path / 'train'}\n"
    assert files_of(tmp_path / "train") == files_of(pack)


def test_killed_copy_is_finished(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that is a pipe holds the copy in the middle, where it is killed."""
    target, shard = tmp_path / "train", sorted(source.glob("shard-*.h5"))[2]
    data = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    process = start(source, target, "--threads", "2")
    writer = os.open(shard, os.O_WRONLY)  # blocks until the copy reads it
    os.write(writer, data[:1000])
    partial, others = tmp_path / "train.partial", len(list(source.glob("shard-*.h5"))) - 1
    while len(list(partial.glob("shard-*.h5"))) < others:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    os.close(writer)
    assert not target.exists()
    shard.unlink()
    shard.write_bytes(data)
    first = sorted(partial.glob("shard-*.h5"))[0]
    first.write_bytes(bytes(first.stat().st_size))  # of the right size, and wrong
    status, out, err = stage(capsys, source, target)
    assert (status, out) == (0, f"{target}\n")
    assert f"2 shards copied, {others - 1} kept from an earlier copy" in err
    assert files_of(target) == files_of(source)


def test_full_disk(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that cannot grow beyond a limit, as on a full disk: one line, nothing half, and a second try works."""
    target = tmp_path / "train"
    process = start(pack, target, limit=10_000)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"stage_pack: error: {tmp_path}/train.partial/shard-")
    assert err.endswith(".h5: cannot be written (File too large)\n")
    assert not target.exists()
    assert list((tmp_path / "train.partial").iterdir()) == []
    assert stage(capsys, pack, target)[0] == 0
    assert files_of(target) == files_of(pack)


def test_too_little_space_is_said_before_copying(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest that promises more than any disk holds."""
    manifest = json.loads((source / "manifest.json").read_bytes())
    manifest["shards"][0]["bytes"] = 2**60
    (source / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(source / "index.bin", 2**40)  # a sparse file
    status, out, err = stage(capsys, source, tmp_path / "train")
    assert (status, out) == (1, "")
    assert f"train.partial: {2**30 + 2**10}." in err
    assert " GiB are free" in err
    assert list((tmp_path / "train.partial").iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_corrupt_source(damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = source / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        text = f"error: {shard}: SHA-256 is "
    elif damage == "truncated":
        shard.write_bytes(data[:-1])
        text = f"error: {shard}: {len(data) - 1} bytes, manifest.json says {len(data)}"
    else:
        shard.unlink()
        text = f"error: {shard}: cannot be read (No such file or directory)"
    status, out, err = stage(capsys, source, tmp_path / "train")
    assert (status, out) == (1, "")
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "train").exists()
    assert not (tmp_path / "train.partial" / "shard-00001.h5").exists()
    assert not list((tmp_path / "train.partial").glob("*.tmp"))


def test_what_is_there_is_kept_or_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "train"
    target.mkdir()  # an empty folder is nothing
    assert stage(capsys, source, target)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    status, out, err = stage(capsys, source, target)
    assert (status, out) == (0, f"{target}\n")
    assert "were there already" in err
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before

    os.truncate(target / "shard-00000.h5", 5)
    status, _, err = stage(capsys, source, target)
    assert status == 1
    assert f"{target / 'shard-00000.h5'}: missing or of another size than " in err

    manifest = target / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert f"{target}: holds another pack" in stage(capsys, source, target)[2]
    manifest.unlink()
    assert f"{target}: holds files that are no pack" in stage(capsys, source, target)[2]
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'}: is a file" in stage(capsys, source, tmp_path / "file")[2]


def test_bad_places(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (source, source / "inside", tmp_path):
        assert "is the source or inside it" in stage(capsys, source, target)[2]
    assert "none: no such folder" in stage(capsys, tmp_path / "none", tmp_path / "train")[2]
    assert "--threads 0: accepted are 1 to 64" in stage(capsys, source, tmp_path / "train", "--threads", "0")[2]
    (tmp_path / "train.partial").mkdir()
    (tmp_path / "train.partial" / "thesis.tex").write_text("x")
    assert "train.partial: holds thesis.tex, which is no part of a copy" in stage(capsys, source, tmp_path / "train")[2]
    assert (tmp_path / "train.partial" / "thesis.tex").exists()


def test_hosts_begin_at_different_shards() -> None:
    shards = [{"file": str(k)} for k in range(50)]
    orders = [stage_pack.rotated(shards, f"node{host:03d}") for host in range(64)]
    assert all(sorted(int(shard["file"]) for shard in order) == list(range(50)) for order in orders)
    assert len({order[0]["file"] for order in orders}) > 25
