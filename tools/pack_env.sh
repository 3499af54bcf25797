#!/usr/bin/env bash
# Pack the environment into one file, from which a job reads it instead of from thousands of files on a shared file system.
#
#   tools/pack_env.sh [--help | FILE]
#
# FILE ends in .sqfs (squashfs; needs mksquashfs, and on the nodes unsquashfs or squashfuse), .tar.zst (needs zstd) or .tar.
# Without FILE the first of these that this machine can make is written: megdet_env.* beside the environment. FILE.sha256
# gets its checksum, and the disk that it needs when unpacked; jobs need both files.
#
# A job takes it by MEGDET_ENV_ARCHIVE=FILE (jobs/env.sh). Each node then unpacks it once to its own disk. By hand:
#
#   MEGDET_ENV_ARCHIVE=FILE jobs/node_env.sh python -m megdet_hpc.train ...
#
# The packed environment runs from any folder. It holds the Python too, unless that is the system's (/usr), or the environment
# was made over a site's packages (tools/setup_env.sh --site); these stay where they are. The checkout does as well.
#
# Environment variables:
#   VENV           the environment                        (.venv in the checkout)
#   MAKE_JOBS      cores for the compression               (all)
set -euo pipefail

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly TOOLS

fail() {
    printf 'pack_env.sh: %s\n' "$*" >&2
    exit 2
}

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

# archive FOLDER FILE: write the folder's content, owned by nobody in particular.
archive() {
    local -a compression=(-comp gzip)
    case $2 in
    *.sqfs)
        # zstd packs and unpacks many times faster than gzip; squashfs-tools before 4.4 do not have it
        if [[ $(mksquashfs -help 2>&1 || true) == *zstd* ]]; then compression=(-comp zstd -Xcompression-level 3); fi
        mksquashfs "$1" "$2" -noappend -all-root -no-progress -quiet -processors "$MAKE_JOBS" "${compression[@]}" >/dev/null
        ;;
    *.tar.zst) tar -C "$1" --owner=0 --group=0 --sort=name -cf - . | zstd -q -3 -T"$MAKE_JOBS" -o "$2" ;;
    *.tar) tar -C "$1" --owner=0 --group=0 --sort=name -cf "$2" . ;;
    esac
}

main() {
    local file=${1:-} size entries suffix place
    case $file in
    -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    (($# <= 1)) || fail "accepted: one FILE; got $#: $*"
    VENV=${VENV:-$(dirname "$TOOLS")/.venv}
    [[ -x $VENV/bin/python ]] || fail "no environment in $VENV: run tools/setup_env.sh first, or set VENV"
    VENV=$(cd "$VENV" && pwd -P)
    MAKE_JOBS=${MAKE_JOBS:-$(nproc)}
    if [[ -z $file ]]; then
        file=$(dirname "$VENV")/megdet_env
        if command -v mksquashfs >/dev/null; then file+=.sqfs; elif command -v zstd >/dev/null; then file+=.tar.zst; else file+=.tar; fi
    fi
    case $file in
    *.sqfs) command -v mksquashfs >/dev/null || fail "$file needs mksquashfs (squashfs-tools), which is not here: name a .tar.zst or .tar" ;;
    *.tar.zst) command -v zstd >/dev/null || fail "$file needs zstd, which is not here: name a .tar" ;;
    *.tar) ;;
    *) fail "$file; accepted: a name that ends in .sqfs, .tar.zst or .tar" ;;
    esac
    [[ -d $(dirname "$file") ]] || fail "no folder $(dirname "$file")"
    # hard links do not reach another file system
    place=$(dirname "$file")
    [[ $(stat -c %d "$place") == $(stat -c %d "$VENV") ]] || place=$(dirname "$VENV")
    work=$(cd "$place" && mktemp -d "$(pwd -P)/.pack_env.XXXXXX") || fail "cannot write in $place"
    part=$file.$$
    trap 'rm -rf "$work" "$part"*' EXIT
    say "copying $VENV as hard links"
    mkdir "$work/env"
    cp -al "$VENV/." "$work/env" 2>/dev/null || { rm -rf "$work/env" && mkdir "$work/env" && cp -a "$VENV/." "$work/env"; }
    rm -f "$work/env/.megdet_lock"
    say "$(PYTHONNOUSERSITE=1 "$VENV/bin/python" -I "$TOOLS/relocate_env.py" "$work/env" --origin "$VENV")"
    size=$(du -sk "$work/env" | cut -f1) entries=$(find "$work/env" ! -path '*/__pycache__/*' | wc -l)
    say "packing $(find "$work/env" | wc -l) files and folders, $((size / 1024)) MiB"
    case $file in *.tar.zst) suffix=.tar.zst ;; *) suffix=.${file##*.} ;; esac
    archive "$work/env" "$part$suffix"
    {
        echo "# unpacked $size KiB $entries entries"
        printf '%s  %s\n' "$(sha256sum <"$part$suffix" | cut -d' ' -f1)" "${file##*/}"
    } >"$part.sha256"
    mv "$part$suffix" "$file"
    mv "$part.sha256" "$file.sha256"
    say "$file: $(($(stat -c %s "$file") / 1048576)) MiB; a job takes it by MEGDET_ENV_ARCHIVE=$(cd "$(dirname "$file")" && pwd -P)/${file##*/}"
}

main "$@"; exit
