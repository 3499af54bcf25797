# shellcheck shell=bash
# Commands whose output goes to the log, and the search in it for the reason of a failure. Sourced by setup_env.sh; uses
# its fail and LOG.

# logged WHAT COMMAND...: run a command with its output in the log. On failure show the first errors, or the end of the log.
logged() {
    local what=$1 before errors
    shift
    before=$(wc -l <"$LOG")
    printf '\n== %s: %s\n' "$what" "$*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        errors=$(first_errors "$before")
        if [[ -n $errors ]]; then
            printf -- '--- the first errors in %s, with its line numbers ---\n%s\n' "$LOG" "$errors" >&2
        else
            printf -- '--- end of %s ---\n' "$LOG" >&2
            tail -n 30 "$LOG" >&2
        fi
        fail "could not $what; the whole output is in $LOG"
    fi
}

# first_errors LINE: the errors of compilers, CMake and the linker in the log after that line, each with the lines that
# follow it. pip's own report, which only says that they failed, is far below.
first_errors() {
    awk -v begin="$1" '
        NR <= begin { next }
        /error: (subprocess-exited|failed-wheel-build|legacy-install|metadata-generation)/ { next }
        /CMake Error|(^|[^[:alnum:]_])error( [A-Z]+[0-9]+)?: |nvcc fatal|undefined reference to|cannot find -l/ { left = 5 }
        left > 0 && shown < 40 { print NR ": " $0; left--; shown++ }' "$LOG"
}
