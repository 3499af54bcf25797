# shellcheck shell=bash disable=SC2154 # job_name, output, ranks, ...: set by begin_job
# This job's properties from the PBS server, and the submission of the next job like it. Sourced by jobs/common.sh.

# read_pbs_job: sets pbs_job to the server's text about this job, with folded lines joined. If the server does not answer,
# it is the text about the run's previous job. pbs_source names the source: qstat, remembered or nothing.
pbs_job="" pbs_source=nothing
read_pbs_job() {
    if command -v qstat >/dev/null && ask_server retry; then return; fi
    if [[ -f $output/job/qstat ]]; then pbs_source=remembered pbs_job=$(<"$output/job/qstat"); fi
    say "qstat -f $PBS_JOBID does not answer; a resubmission would have select, place and walltime of $(known_from)" >&2
}

# ask_server [retry]: set pbs_job from qstat.
ask_server() {
    local text
    text=$("$@" qstat -f "$PBS_JOBID") || return 1
    # qstat folds long lines with a newline and a tab
    pbs_job=$(awk '/^\t/ { line = line substr($0, 2); next } { print line; line = $0 } END { print line }' <<<"$text")
    pbs_source="qstat"
}

# minutes_left: prints the rest of the walltime, minus the margin for start-up and a last checkpoint. It may be negative.
# Without a limit it prints nothing.
minutes_left() {
    local minutes=${MEGDET_WALLTIME_MINUTES:-}
    if [[ -z $minutes ]]; then
        [[ -n $pbs_job ]] || fail "the walltime is not known: set MEGDET_WALLTIME_MINUTES"
        minutes=$(awk '
            function minutes(text, part) { split(text, part, ":"); return part[1] * 60 + part[2] + part[3] / 60 }
            $1 == "Resource_List.walltime" { limit = minutes($3) }
            $1 == "resources_used.walltime" { used = minutes($3) }
            END { if (limit) printf "%d", limit - used }' <<<"$pbs_job")
        [[ -n $minutes ]] || return 0
    fi
    printf '%d' "$((minutes - SECONDS / 60 - MEGDET_MARGIN_MINUTES))"
}

# silent_nodes: prints the other nodes of the job that the launch agent does not reach in a few seconds. It asks all at once.
launch_agent=""
silent_nodes() {
    local host wait_seconds=$((MEGDET_LAUNCH_SECONDS < 10 ? MEGDET_LAUNCH_SECONDS : 10))
    [[ -n $launch_agent ]] || return 0
    while read -r host; do
        # shellcheck disable=SC2086 # an agent may have options, as `ssh -x`
        { timeout -k 1 "$wait_seconds" $launch_agent "$host" true </dev/null >/dev/null 2>&1 || printf ' %s' "$host"; } &
    done < <(awk '!seen[$1]++ && NR > 1' "$PBS_NODEFILE")
    wait
}

# pbs_quoted VALUE: the value quoted for qsub -v.
pbs_quoted() { if [[ $1 == *[,\ ]* ]]; then printf '"%s"' "$1"; else printf '%s' "$1"; fi; }

# asked_resources: the names of the resources requested by -l, in this script or at submission. The server lists more: sums
# over the chunks of select, which qsub refuses beside select, and resources set by a hook or a default.
asked_resources() {
    {
        sed -n 's/^#PBS .*-l *\([^ ]*\).*/\1/p' "$0"
        sed -n 's/^ *Submit_arguments = //p' <<<"$pbs_job" | sed 's/<[^>]*>/ /g' | grep -oE -e '-l *[^ ]+' | sed 's/^-l *//'
    } | tr ',' '\n' | sed -n 's/=.*//p' || true
}

# directives: the requests of this script in qstat's form, with the job's walltime if it is known.
directives() {
    local name value
    for name in select place walltime; do
        value=$(sed -n "s/^#PBS .*-l *\([^ ]*,\)*$name=\([^ ,]*\).*/\2/p" "$0" | tail -n 1)
        if [[ $name == walltime && -n ${MEGDET_WALLTIME_MINUTES:-} ]]; then
            value=$((MEGDET_WALLTIME_MINUTES / 60)):$((MEGDET_WALLTIME_MINUTES % 60)):00
        fi
        if [[ -n $value ]]; then printf 'Resource_List.%s = %s\n' "$name" "$value"; fi
    done
}

# select_ranks SELECT: the ranks of its chunks, [N:]RESOURCE=VALUE[:...][+...].
select_ranks() {
    tr '+' '\n' <<<"$1" | awk -F: '
        {
            chunks = 1; each = 1
            for (i = 1; i <= NF; i++) {
                if (i == 1 && $i ~ /^[0-9]+$/) chunks = $i
                if (sub(/^mpiprocs=/, "", $i)) each = $i
            }
            ranks += chunks * each
        }
        END { print ranks }'
}

# again_options: sets two arrays. least has the options of qsub that make another job like this one. more has options that a
# server may refuse beside them. Options with default values are left out, since default output paths hold the job's id.
least=() more=()
again_options() {
    local key value asked
    asked=$(asked_resources)
    least=(-N "$job_name") more=()
    while IFS=$'\t' read -r key value; do
        case $key in
        Resource_List.select | Resource_List.place | Resource_List.walltime) least+=(-l "${key#*.}=$value") ;;
        Resource_List.*) if grep -qxF "${key#*.}" <<<"$asked"; then more+=(-l "${key#*.}=$value"); fi ;;
        Account_Name) least+=(-A "$value") ;;
        project) if [[ $value != _pbs_project_default ]]; then least+=(-P "$value"); fi ;;
        group_list | umask) least+=(-W "$key=$value") ;;
        Mail_Points) if [[ $value != a ]]; then least+=(-m "$value"); fi ;;
        Mail_Users) least+=(-M "$value") ;;
        Priority) if [[ $value != 0 ]]; then least+=(-p "$value"); fi ;;
        Output_Path) if [[ $value != *.o"$job_id" ]]; then least+=(-o "${value%"$PBS_JOBID.OU"}"); fi ;;
        Error_Path) if [[ $value != *.e"$job_id" ]]; then least+=(-e "${value%"$PBS_JOBID.ER"}"); fi ;;
        # the first submission may have overridden the script's directives
        Join_Path) least+=(-j "$value") ;;
        Rerunable) if [[ $value == False ]]; then least+=(-r n); else least+=(-r y); fi ;;
        Keep_Files) if [[ $value != n ]]; then least+=(-k "$value"); fi ;;
        Shell_Path_List) least+=(-S "$value") ;;
        esac
    done < <(sed -n 's/^ *\([A-Za-z0-9_.-]*\) = /\1\t/p' <<<"$pbs_job")
    if [[ -n ${PBS_O_QUEUE:-} ]]; then least+=(-q "$PBS_O_QUEUE"); fi
}

# A PBS job cannot requeue itself. So a new job is submitted with the same options, and waits for the end of this one.
# Arguments and settings are stored in the run's folder, since qsub's -v splits at commas. The printed command waits for no
# job: by then a server without a history has forgotten this job, and silently drops jobs that wait for it.
resubmit_pbs() {
    local variables selected by_hand
    # PBS takes the directives from the file and its name from -N
    local script=$jobs_folder/$job_script.pbs
    local -a wait_for=(-W "depend=afterany:$PBS_JOBID")
    if [[ $pbs_source != qstat ]]; then ask_server 2>/dev/null || true; fi
    if [[ $pbs_source == nothing ]]; then pbs_job=$(directives); fi
    again_options
    variables="MEGDET_CONTINUES=$MEGDET_OWNER,MEGDET_ROOT=$(pbs_quoted "$MEGDET_ROOT"),MEGDET_OUTPUT=$(pbs_quoted "$output")"
    least+=(-v "$variables")
    by_hand="$go_on, or from a login node: $(printf '%q ' qsub "${least[@]}" "${more[@]}" "$script")"
    cd "${PBS_O_WORKDIR:-.}" || true
    if [[ $pbs_source != qstat ]]; then
        selected=$(sed -n 's/^ *Resource_List.select = //p' <<<"$pbs_job")
        if [[ $(select_ranks "$selected") != "$ranks" ]]; then
            say "qstat does not answer, and select=$selected, the last one known, has other than this job's $ranks ranks on" \
                "$num_nodes node(s): not submitted again. To go on, mend select, place and walltime: $by_hand"
            return
        fi
        say "qstat does not answer: the next job has select, place and walltime of $(known_from)"
    fi
    if retry qsub "${least[@]}" "${wait_for[@]}" "${more[@]}" "$script"; then
        say "submitted again"
    elif ((${#more[@]})) && qsub "${least[@]}" "${wait_for[@]}" "$script"; then
        say "submitted again, without ${more[*]}, which qsub refuses"
    else
        say "qsub failed; to go on, $by_hand"
    fi
}

# known_from: the source of a job's options, and what is missing.
known_from() {
    if [[ $pbs_source == remembered ]]; then
        printf "the run's job before"
    else
        printf "the script's directives; account, project, mail and other options of the first qsub are not known"
    fi
}
