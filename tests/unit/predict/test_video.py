"""Videos in and out: frames are numbered, drawn as a video, and kept where the file ends early."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.predict.video import Video, video_writer
from tests.cases.sets import scene
from tests.conftest import run
from tests.unit.predict.test_predict import predict
from tests.unit.test_files import full_disk

av = pytest.importorskip("av", reason="no PyAV: pip install av")
NUM_FRAMES = 7


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Seven frames of 120 x 90 pixels at 5 a second, each a little brighter."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 120, 90, "yuv420p"
        for number in range(NUM_FRAMES):
            pixels = np.clip(scene().astype(int) + 10 * number, 0, 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize(("every", "numbers"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_frames(every: int, numbers: list[int], clip: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "found"
    words = ["--checkpoint", trained, clip, "--output", output, "--score", "0.05", "--max-detections", "3"]
    assert predict(*words, "--every", str(every), "--batch", "2") == 0
    images = json.loads((output / "images.json").read_bytes())["images"]
    assert [image["file_name"] for image in images] == [f"{clip}#{number}" for number in numbers]
    assert {(image["width"], image["height"]) for image in images} == {(120, 90)}
    rows = json.loads((output / "detections.json").read_bytes())
    assert {row["image_id"] for row in rows} == set(range(1, len(numbers) + 1))
    drawn, own = frames(output / "pictures" / "clip.mp4"), frames(clip)
    assert len(drawn) == len(numbers)
    for frame, number in zip(drawn, numbers, strict=True):
        assert frame.shape == (90, 120, 3)
        difference = np.abs(frame.astype(int) - own[number])
        assert np.median(difference) < 12 and (difference > 60).any()


def test_a_damaged_video_is_named(
    clip: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file that is none nothing is left, and the clip beside it is looked at."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    output = tmp_path / "found"
    words = ["--checkpoint", trained, broken, tmp_path / "missing.avi", clip, "--output", output, "--no-pictures"]
    assert predict(*words) == 2
    shown = capsys.readouterr()
    assert f"{broken}: Invalid data" in shown.err and "missing.avi: No such file" in shown.err
    assert f"pictures={NUM_FRAMES} " in shown.out and "failed=2" in shown.out


def test_a_video_that_was_cut_keeps_its_frames(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "cut.mp4", tmp_path / "found"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 120, 90, "yuv420p"
        generator = np.random.default_rng(0)
        for _ in range(20):
            noise = generator.integers(0, 255, (90, 120, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        file.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert predict("--checkpoint", trained, path, "--output", output) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "cut.mp4: damaged: " in line]
    kept = json.loads((output / "images.json").read_bytes())["images"]
    assert 3 < len(kept) < 15, said
    assert len(frames(output / "pictures" / "cut.mp4")) == len(kept)


def test_a_full_disk_ends_the_command_and_is_no_fault_of_the_video(
    clip: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    with full_disk():
        assert predict("--checkpoint", trained, clip, "--output", output) == 2
    shown = capsys.readouterr()
    assert f"{output}/pictures/clip.mp4: cannot be written (File too large" in shown.err
    assert "failed=" not in shown.out and not list((output / "pictures").iterdir())


def test_a_video_without_a_frame_leaves_no_file(tmp_path: Path) -> None:
    with video_writer(tmp_path / "none.mp4", Fraction(25)):
        pass
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_message_says_what_to_install(clip: Path, trained: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['av'] = None; from megdet_hpc.predict.__main__ import main; main()"
    words = ["--checkpoint", str(trained), str(clip), "--output", str(tmp_path / "found")]
    done = run([sys.executable, "-c", code, *words])
    assert done.returncode == 2
    assert f"{clip}: a video needs PyAV: pip install av" in done.stderr
    assert not (tmp_path / "found").exists()


def test_a_file_of_sound_alone_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(UserError, match=r"^holds no video"):
        Video(path, 1)
