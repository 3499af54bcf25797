"""Make the source of Horovod 0.28.1 build against a current PyTorch, and its extension relocatable.

Usage: python patch_horovod.py SOURCE_DIR --cuda {on,off} [--rpath DIR ...]

Four changes, each to text that must be there exactly once:

1. C++20 instead of C++14: the headers of PyTorch 2.14 need it.
2. An RPATH relative to the extension. ``horovod/torch/mpi_lib_v2*.so`` then finds the MPI of the
   environment it is installed in, wherever that lies; ``--rpath`` adds the library folders of an MPI
   outside the environment. CMake's own way, the path of every linked library, would also record the build
   folder below /tmp, where anybody could later put a library.
3. The environment variables ``MPICC`` (for Gloo) and ``MPICXX`` name the MPI: CMake's own search would take
   one in the system's folders first.
4. ``--cuda off``: a CUDA build of PyTorch beside a CUDA toolkit no longer turns Horovod's CUDA code on.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

CXX_STANDARD = 20

# From site-packages/horovod/torch: the environment's lib, and the libraries of the PyTorch and NCCL wheels.
RPATH = ("$ORIGIN/../../../..", "$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib")

_PROJECT_LINES = """project(horovod CXX)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH "{rpath}")
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH OFF)
set(MPI_C_COMPILER "$ENV{{MPICC}}" CACHE FILEPATH "")
set(MPI_CXX_COMPILER "$ENV{{MPICXX}}" CACHE FILEPATH "")
set(CMAKE_SHARED_LINKER_FLAGS "${{CMAKE_SHARED_LINKER_FLAGS}} -Wl,--disable-new-dtags")
"""

Change = tuple[str, str, str]


def changes(*, cuda: bool, rpath: tuple[str, ...] = ()) -> list[Change]:
    """List the changes as (file below the source folder, text to replace, new text).

    Args:
        cuda: keep Horovod's CUDA code.
        rpath: absolute library folders to search after those of the environment.
    """
    new_standard = f"set(CMAKE_CXX_STANDARD {CXX_STANDARD})\n"
    project_lines = _PROJECT_LINES.format(rpath=";".join(RPATH + rpath))
    listed: list[Change] = [
        ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)\n", new_standard),
        ("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)\n", new_standard),
        ("CMakeLists.txt", "project(horovod CXX)\n", project_lines),
    ]
    if not cuda:
        listed += [
            (
                "cmake/Modules/FindPytorch.cmake",
                "print(True if ((torch.version.cuda is not None) and (CUDA_HOME is not None)) else False)",
                "print(False)",
            ),
            # Without this, an nvcc on PATH that dislikes the host compiler stops the configure step.
            (
                "CMakeLists.txt",
                "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\n",
                "set(CMAKE_CUDA_COMPILER OFF)\nif(FALSE)\n",
            ),
        ]
    return listed


def apply(source_dir: Path, listed: list[Change]) -> None:
    """Apply the changes below ``source_dir``.

    Raises:
        ValueError: a file lacks the text to replace, or has it more than once; nothing is written then.
    """
    texts: dict[Path, str] = {}
    for name, old, new in listed:
        path = source_dir / name
        text = texts.get(path) or path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(
                f"{path}: expected the text {old!r} once, found it {text.count(old)} times; "
                "this is not the source of Horovod 0.28.1"
            )
        texts[path] = text.replace(old, new)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line and patch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source_dir", type=Path)
    parser.add_argument("--cuda", choices=("on", "off"), required=True)
    parser.add_argument("--rpath", action="append", default=[], metavar="DIR")
    args = parser.parse_args()
    apply(args.source_dir, changes(cuda=args.cuda == "on", rpath=tuple(args.rpath)))


if __name__ == "__main__":
    main()
