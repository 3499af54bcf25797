"""Make a copy of the environment run from any folder: python relocate_env.py COPY --origin VENV, for tools/pack_env.sh.

COPY is a copy of VENV whose files may be hard links to the original's, so each change writes a new file.

1. The base Python, of which a virtual environment is only the outer part, comes along, so that its many small files are
   read from the node's disk too. A base that belongs to the node's system (/usr) stays where it is; so does that of an
   environment which sees a site's packages.
2. Scripts find the interpreter beside them instead of at a fixed path, and the activate scripts their own folder.
3. Modules that have no bytecode yet are compiled, since a mounted archive cannot be written to.

Standard library only.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

# A shell script to sh, a string to Python: the form that pip and uv use for relocatable environments.
SHEBANG = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")"/python "$0" "$@"
' '''
"""

# Of the base's library: packages that a virtual environment does not see, and what nobody imports in a job.
LEFT_OUT = ("site-packages", "dist-packages", "idlelib", "turtledemo", "ensurepip")
TESTS = ("test", "tests")


def replace(path: Path, content: bytes) -> None:
    """Write a file anew, with its old mode; other hard links keep the old content."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.chmod(path.stat().st_mode)
    os.replace(new, path)


def settings_of(venv: Path) -> dict[str, str]:
    """The keys of pyvenv.cfg; none for a conda environment, which is a whole Python itself."""
    path = venv / "pyvenv.cfg"
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def link_or_copy(source: str, target: str) -> None:
    """A hard link where both are on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def bring_python(copy: Path, interpreter: Path) -> None:
    """Turn the copy of a virtual environment into a whole Python, which finds its library beside its own file.

    Args:
        interpreter: the base's real file, PREFIX/bin/python3.11.
    """
    prefix, name = interpreter.parent.parent, f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = prefix / "lib" / name

    def unwanted(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == library
        left_out = {entry for entry in names if top and (entry in LEFT_OUT or entry.startswith("config-"))}
        return left_out | {entry for entry in names if entry in TESTS}

    shutil.copytree(
        library, copy / "lib" / name, symlinks=True, ignore=unwanted, copy_function=link_or_copy, dirs_exist_ok=True
    )
    for shared in prefix.glob(f"lib/libpython{sys.version_info.major}*.so*"):
        target = copy / "lib" / shared.name
        target.unlink(missing_ok=True)
        shutil.copy2(shared, target, follow_symlinks=False)
    for link in (copy / "bin").glob("python*"):
        if link.is_symlink():
            link.unlink()
    # Its search path for libpython is a string in the file, which a shorter one may replace.
    content, old, new = interpreter.read_bytes(), os.fsencode(prefix / "lib"), b"$ORIGIN/../lib"
    if len(new) <= len(old):
        content = content.replace(b"\0" + old + b"\0", b"\0" + new.ljust(len(old), b"\0") + b"\0")
    target = copy / "bin" / name
    target.write_bytes(content)
    target.chmod(0o755)
    for alias in ("python", "python3"):
        (copy / "bin" / alias).symlink_to(name)
    (copy / "pyvenv.cfg").unlink()


def rewrite_scripts(copy: Path, origin: Path) -> None:
    """Let the scripts of bin/ find the interpreter and the environment by their own place."""
    python = re.escape(os.fsencode(origin / "bin")) + rb"/python[0-9.]*"
    # the second form is that of pip and uv where the path has a blank or is longer than a kernel's first line may be
    long_form = rb"""#!/bin/sh\n'''exec' (["']?)""" + python + rb"\1 [^\n]*\n' '''\n"
    first_lines = re.compile(rb"#!" + python + rb"[^\n]*\n|" + long_form)
    for path in sorted((copy / "bin").iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        found = first_lines.match(content)
        if found:
            replace(path, SHEBANG + content[found.end() :])
        elif path.name == "activate":
            place = b'VIRTUAL_ENV=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd -P)'
            replace(path, re.sub(rb"(?m)^( *(?:export )?)VIRTUAL_ENV=(?!\$\().*$", rb"\1" + place, content, count=1))
        elif path.name in ("activate.csh", "activate.fish"):
            path.unlink()  # they would put the original's folder on PATH


def main() -> None:
    """Change the copy; print one line that says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--origin", type=Path, required=True)
    options = parser.parse_args()
    settings = settings_of(options.origin)
    # of this process, which runs the original's interpreter
    interpreter = Path(os.path.realpath(sys.executable))
    said = f"Python stays at {interpreter}"
    if settings.get("include-system-site-packages") == "true":
        said += ", and with it the site's own packages"
    elif not settings:
        said = "a whole Python, as conda's are"
    elif not str(interpreter).startswith(("/usr/bin/", "/bin/")):
        bring_python(options.copy, interpreter)
        said = f"with the Python of {interpreter.parent.parent}"
    rewrite_scripts(options.copy, options.origin)
    warnings.simplefilter("ignore")  # those of other people's modules
    compileall.compile_dir(str(options.copy / "lib"), quiet=2, stripdir=str(options.copy), maxlevels=30)
    run = [str(options.copy / "bin" / "python"), "-I", "-c", "import sys, ssl, zlib; print(sys.prefix)"]
    shown = subprocess.run(run, capture_output=True, text=True)
    if shown.stdout.strip() != str(options.copy):
        sys.exit(f"the copy does not run from another folder: {shown.stdout.strip()} {shown.stderr.strip()}")
    print(said)


if __name__ == "__main__":
    main()
