# shellcheck shell=bash disable=SC2154 # job_name, output, python, launch, ...: set by begin_job
# A training run over several jobs: preflight, start, signals, exit statuses and restarts. Sourced by jobs/common.sh.
# The file job/attempts in the run's folder holds "STEP COUNT JOB": COUNT attempts in a row, the last in job JOB, began at the
# checkpoint of step STEP. Statuses are those of megdet_hpc.train (docs/running_on_clusters.md).

STOPPED_EARLY=75 # EX_TEMPFAIL: state saved, run me again
DISPLACED=76      # another start owns the folder
BAD_INPUT=2
KILLED_BY_USR1=138 # 128 and the signal's number

# newest_checkpoint: the newest checkpoint of the run, or nothing.
newest_checkpoint() {
    [[ -d $output/checkpoints ]] || return 0
    # a user's own copies, such as step_best.pt, are none
    find "$output/checkpoints" -maxdepth 1 -regextype posix-extended -regex '.*/step_[0-9]+\.pt' | LC_ALL=C sort | tail -n 1
}

# newest_step: the updates done at the run's newest checkpoint; 0 without one.
newest_step() {
    local newest
    newest=$(newest_checkpoint)
    newest=${newest##*/step_}
    newest=${newest%.pt}
    printf '%d' "$((10#${newest:-0}))"
}

# new_claim: sets MEGDET_OWNER, which marks the folder as held by this script and its training. The files in which ranks
# report to this script are named after it, so that no other start reads them.
new_claim() {
    MEGDET_OWNER=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
    MEGDET_STATUS_FILE=$output/job/status-$MEGDET_OWNER MEGDET_LAUNCH_FILE=$output/job/launched-$MEGDET_OWNER
    export MEGDET_OWNER MEGDET_STATUS_FILE MEGDET_LAUNCH_FILE
    if [[ $scheduler == pbs && $pbs_source == qstat ]]; then
        MEGDET_RUN_COUNT=$(sed -n 's/^ *run_count = //p' <<<"$pbs_job")
        export MEGDET_RUN_COUNT
    fi
}

# take_folder: hold the run's folder until this script ends (megdet_hpc/owner.py), or end at once if a live start holds it.
take_folder() {
    local answer="" turn
    for ((turn = 1; ; turn++)); do
        coproc HOLDER { exec "${python[@]}" -m megdet_hpc.owner "$output" "$MEGDET_OWNER"; }
        answer="" holder_pid=$!
        read -r -t "$((MEGDET_LAUNCH_SECONDS ? MEGDET_LAUNCH_SECONDS : 600))" answer <&"${HOLDER[0]:-}" || true
        case $answer in
        held) break ;;
        "$BAD_INPUT" | "$DISPLACED")
            say "$output is not this job's: nothing is started there and nothing submitted again"
            exit "$answer"
            ;;
        esac
        # the file system or the node failed, which says nothing of the folder's owner
        kill -KILL "$holder_pid" 2>/dev/null || true
        wait "$holder_pid" 2>/dev/null || true
        ((turn < 3)) || break
        say "$output could not be taken (${answer:-no answer}): trying again"
        sleep "$MEGDET_RETRY_SECONDS"
    done
    if [[ $answer != held ]]; then
        say "$output could not be taken in $turn attempts (${answer:-no answer}): the file system or this node fails." \
            "Nothing is started and nothing submitted again; submit with the same options and MEGDET_OUTPUT=$output"
        exit 1
    fi
    holder_input=${HOLDER[1]}
    trap leave_folder EXIT
    # files of starts that were killed
    rm -f "$output"/job/status-* "$output"/job/launched-*
}

# leave_folder: let the folder go before this script ends, with which a scheduler may kill all of the job's processes. A file
# system that does not answer holds the script up for a few seconds only.
leave_folder() {
    local turn
    exec {holder_input}>&-
    for ((turn = 0; turn < 100; turn++)); do
        kill -0 "$holder_pid" 2>/dev/null || break
        sleep 0.05
    done
}

# owns_folder: whether no other start has taken the folder over.
owns_folder() { grep -qF "\"claim\": \"$MEGDET_OWNER\"" "$output/owner/holder.json" 2>/dev/null; }

# is_continuation JOB: whether the scheduler or this script, and not a user, started the job again. JOB is the id of the
# attempt before. A job that is requeued, or run again by the server, keeps its id.
is_continuation() { [[ -n ${MEGDET_CONTINUES:-} || ($scheduler != none && $1 == "$job_id") ]]; }

# is_own_stop TEXT: whether a stop file with this text is of one of these scripts, and not of a user.
is_own_stop() { [[ $1 =~ ^owner\ [0-9a-f]+$ ]]; }

# count_attempt: sets first_step and attempt, and stores them. It refuses an attempt beyond the limit, which may be started
# after a lost node.
count_attempt() {
    local step=-1 count=0 job=""
    first_step=$(newest_step)
    if [[ -f $output/job/attempts ]]; then read -r step count job <"$output/job/attempts" || true; fi
    # a node that was lost may have left it empty
    if ! [[ $step =~ ^-?[0-9]+$ && $count =~ ^[0-9]+$ ]]; then step=-1 count=0; fi
    if is_continuation "$job"; then
        if is_own_stop "$(head -c 100 "$output/stop" 2>/dev/null)"; then
            rm -f "$output/stop" # of a script that was killed before its end
        elif [[ -e $output/stop ]]; then
            say "$output/stop is there: not started. To go on, submit with the same options and MEGDET_OUTPUT=$output"
            exit "$STOPPED_EARLY"
        fi
    else
        step=-1
        # the stop file was meant for the jobs before
        if [[ -e $output/stop ]]; then
            say "$output/stop removed: it is from before this submission"
            rm -f "$output/stop"
        fi
    fi
    attempt=1
    if ((step == first_step)); then attempt=$((count + 1)); fi
    if ((attempt > MEGDET_MAX_FAILURES)); then
        say "$count attempts in a row ended at step $step: not started again. Read the log above, mend, submit with" \
            "the same options and MEGDET_OUTPUT=$output"
        exit 1
    fi
    mkdir -p "$output/job"
    printf '%d %d %s\n' "$first_step" "$attempt" "$job_id" >"$output/job/attempts.new"
    sync "$output/job/attempts.new" 2>/dev/null || true
    mv "$output/job/attempts.new" "$output/job/attempts"
}

child="" training=0 stop_requested=0 interrupted=0 left_behind="the preflight, which saves nothing,"
# whether this script made the stop file
own_stop=0
on_stop() {
    stop_requested=1 interrupted=1
    say "stop requested"
    # mpirun and srun pass USR1 to every rank and go on themselves; the preflight handles no signals and saves nothing
    if ((training)); then
        if [[ $MEGDET_LAUNCHER == torchrun ]]; then
            # USR1 would end torchrun and its ranks; a user's own stop file stays
            if [[ ! -e $output/stop ]]; then
                own_stop=1
                echo "owner $MEGDET_OWNER" >"$output/stop"
            fi
        else
            kill -USR1 "$child" 2>/dev/null || true
        fi
        if [[ $scheduler == slurm ]]; then
            end_after "$MEGDET_STOP_SECONDS" "the training has not stopped in $MEGDET_STOP_SECONDS s"
        fi
    elif [[ -n $child ]]; then
        end_after 0 "$left_behind is not waited for"
    fi
}

# end_child TEXT: print the reason and end the running command. Nothing is ended if this script has ended, since the process
# number may then belong to another process.
end_child() {
    kill -0 "$$" || exit
    say "$1: ended"
    kill -TERM "$child"
    sleep 10 &
    wait "$!"
    kill -KILL "$child"
}

# end_after SECONDS TEXT: end the command if it still runs by then. If a rank or a launcher hung, the time limit would end
# this script too, and nobody would submit the job again. Of several calls the earliest end counts.
timer="" timer_at=0 end_at=""
end_after() {
    local at=$((SECONDS + $1))
    if [[ -n $timer ]]; then
        ((at < timer_at)) || return 0
        kill "$timer" 2>/dev/null || true
    fi
    (
        # USR1 may reach the whole session
        trap '' USR1
        trap 'kill "$!" 2>/dev/null; exit' TERM
        sleep "$1" &
        wait "$!"
        end_child "$2"
    ) 2>/dev/null &
    timer=$! timer_at=$at
}

# guard_launcher NAME: end the launcher if it hangs: no rank has reported within MEGDET_LAUNCH_SECONDS, or a rank has left
# its status and the launcher waits for the answer of another node. Time is counted in sleeps, so that a suspension does
# not count.
guard=""
guard_launcher() {
    local silent causes="${launch[0]} does not reach a node, the ranks do not reach each other (MEGDET_INTERFACE), or"
    causes+=" they load from a slow file system (MEGDET_LAUNCH_SECONDS)"
    (
        trap '' USR1
        trap 'kill "$!" 2>/dev/null; exit' TERM
        naps=0
        until [[ -e $MEGDET_LAUNCH_FILE || -s $MEGDET_STATUS_FILE ]]; do
            if ((MEGDET_LAUNCH_SECONDS && naps++ >= MEGDET_LAUNCH_SECONDS)); then
                echo 1 >"$MEGDET_STATUS_FILE"
                silent=$(silent_nodes)
                if [[ -n $silent ]]; then causes="${launch_agent##*/} gets no answer from$silent"; fi
                end_child "no rank reported within $MEGDET_LAUNCH_SECONDS s of the $1's launch: $causes"
                exit
            fi
            kill -0 "$$" || exit
            sleep 1 &
            wait "$!"
        done
        until [[ -s $MEGDET_STATUS_FILE ]]; do
            kill -0 "$$" || exit
            sleep 2 &
            wait "$!"
        done
        sleep "$MEGDET_LEAVE_SECONDS" &
        wait "$!"
        end_child "a rank left with status $(<"$MEGDET_STATUS_FILE"), and the launcher has not ended in $MEGDET_LEAVE_SECONDS s"
    ) 2>/dev/null &
    guard=$!
}

# run_child NAME SECONDS COMMAND...: run a command to its end, even if signals arrive; sets status. NAME is training if the
# command handles USR1. The command is ended after SECONDS, if that is given.
#
# A node that was lost keeps the sockets of PMIx under the numbers of job and step. A requeued job counts its steps from 0
# again, so there srun's launch fails, until a step has a number that is not used. srun may return 0 all the same.
run_child() {
    local begin failed=0
    while true; do
        begin=$SECONDS
        run_child_once "$@"
        # NFS remembers for up to a minute that a file of another node was missing or empty, until its folder or it is opened
        ls "$(dirname "$MEGDET_LAUNCH_FILE")" >/dev/null 2>&1 || true
        if ((status == 0)) && [[ ! -e $MEGDET_LAUNCH_FILE ]]; then
            say "${launch[0]} returned 0, but no rank of the $1 has reported"
            status=1
        elif [[ $status == 0 && $1 == training && $(<"$MEGDET_LAUNCH_FILE") != finished ]]; then
            say "${launch[0]} returned 0, but the $1 has not come to its end"
            status=1
        fi
        if [[ -e $MEGDET_LAUNCH_FILE || -s $MEGDET_STATUS_FILE ]]; then return; fi
        if [[ ${launch[0]} != srun ]] || ((stop_requested || SECONDS - begin >= 60)); then return; fi
        failed=$((failed + 1))
        if ((failed > 5 || failed > ${SLURM_RESTART_COUNT:-0})); then return; fi
        say "srun started no rank of the $1 (status $status) in a job that was requeued: launched again, as another step"
    done
}

run_child_once() {
    local code
    rm -f "$MEGDET_STATUS_FILE" "$MEGDET_LAUNCH_FILE"
    "${@:3}" &
    child=$! training=0
    if [[ $1 == training ]]; then training=1; fi
    guard_launcher "$1"
    if [[ -n $2 ]]; then end_after "$2" "the $1 has not ended in $2 s"; fi
    # a signal that came while the command was started
    if ((stop_requested)); then on_stop; fi
    status=127
    while true; do
        interrupted=0 code=0
        wait "$child" || code=$?
        # 127: an earlier wait has returned the child's status, so the status of the round before counts
        if ((code != 127)); then status=$code; fi
        if ((!interrupted)); then break; fi
    done
    training=0 child=""
    # shellcheck disable=SC2086 # two numbers, of which one may be missing
    kill $timer $guard 2>/dev/null || true
    timer="" guard=""
    if [[ -s $MEGDET_STATUS_FILE ]]; then status=$(<"$MEGDET_STATUS_FILE"); fi
}

preflight() {
    local -a check=("${python[@]}" -m megdet_hpc.doctor --preflight --output "$output" --scratch "$TMPDIR")
    local folder device transport
    for folder in "$train_data" "$val_data"; do
        [[ -z $folder || $folder == null ]] || check+=(--data "$folder")
    done
    # auto would use the CPU on a node that has lost its GPUs
    device=$(option_value device "${arguments[@]}")
    if [[ -z $device && -f $config ]]; then device=$(sed -n "s/^device: *[\"']\{0,1\}\([a-z_]*\).*/\1/p" "$config"); fi
    transport=$(option_value norm.transport "${arguments[@]}")
    check+=(--device "${device:-cuda}" --transports "${transport:-auto}" --timeout "$MEGDET_PREFLIGHT_SECONDS")
    # after --: the options that the training will get
    check+=(-- "${train[@]:${#python[@]}+2}")
    # exec replaces this shell, so that a signal reaches the launcher
    exec "${launch[@]}" "${check[@]}"
}

# limit_time: sets minutes. If there is a limit, it also sets time_limit, options of the trainer, and end_at.
minutes="" time_limit=()
limit_time() {
    [[ $scheduler == pbs ]] || return 0
    minutes=$(minutes_left)
    [[ -n $minutes ]] || return 0
    end_at=$((SECONDS + 60 * minutes + 40 * MEGDET_MARGIN_MINUTES)) time_limit=()
    if ! is_shorter "$(option_value max_minutes "${arguments[@]}")" "$minutes"; then
        time_limit=(--max_minutes "$minutes")
    fi
}

# is_shorter NUMBER OTHER: whether NUMBER is a number smaller than OTHER.
is_shorter() { awk -v one="$1" -v other="$2" 'BEGIN { exit !(one ~ /^[0-9.]+$/ && one + 0 < other + 0) }'; }

# train_until_done CONFIG: train, and submit the job again until the run is finished. Does not return.
train_until_done() {
    local config
    # a later configuration overrides an earlier one, so the default is added only if the options name none
    config=$(option_value config "${arguments[@]}")
    train_data=$(option_value data.train "${arguments[@]}") val_data=$(option_value data.val "${arguments[@]}")
    train_data=${train_data:-$MEGDET_DATA/train} val_data=${val_data:-$MEGDET_DATA/val}
    # given before the configuration, whose file may hold other values
    local -a train=("${python[@]}" -m megdet_hpc.train --data.train "$train_data" --data.val "$val_data")
    # the file that the configuration's `auto` means on the ranks; as an option here the configuration would replace it
    export MEGDET_BACKBONE
    if [[ -z $config ]]; then
        config=${MEGDET_CONFIG:-$1}
        train+=(--config "$config")
    fi
    if [[ $scheduler == pbs ]]; then read_pbs_job; fi
    limit_time
    [[ -z $minutes ]] || ((minutes >= 1)) ||
        fail "walltime leaves $minutes minutes after a margin of $MEGDET_MARGIN_MINUTES; accepted: 1 or more"
    # A file may name other data; the training itself reports what is missing.
    if [[ -f $config || -n $(option_value config "${arguments[@]}") ]]; then
        [[ -d $train_data ]] || train_data=""
        [[ -d $val_data ]] || val_data=""
    fi
    # The job itself decides three values, so they come after the options, whose file may hold others: the folder, whose steps
    # are counted here; the checkpoint from which the run continues; the time at which it stops.
    train+=("${arguments[@]}" --output "$output")
    if [[ -z $(option_value resume "${arguments[@]}") ]] || (($(newest_step) > 0)); then train+=(--resume auto); fi
    # A launcher may return another status than its ranks, such as that of a signal to the others.
    new_claim

    set_launch "$ranks" "$ranks_per_node"
    if dry_run "${launch[@]}" "${train[@]}" "${time_limit[@]}"; then exit 0; fi
    # For an earlier attempt of this job it was there: then the preflight says what is missing, and the job is submitted again.
    local before=""
    if [[ -f $output/job/attempts ]]; then read -r _ _ before <"$output/job/attempts" || true; fi
    if is_continuation "$before"; then check_ready; else check_ready "$train_data" "$val_data"; fi
    trap on_stop USR1
    take_folder
    announce "$output/job/log"
    count_attempt
    save_submission
    say "attempt $attempt of $MEGDET_MAX_FAILURES from step $first_step; results in $output"
    local limit=$((3 * MEGDET_PREFLIGHT_SECONDS)) # 0: none, as for the doctor
    status=0
    if [[ $MEGDET_PREFLIGHT != 0 ]]; then run_child preflight "${limit#0}" preflight; fi
    limit_time # again, since the preflight took some of it
    if ((stop_requested)); then
        status=$STOPPED_EARLY
    elif ((status != 0)) && [[ ! -e $MEGDET_LAUNCH_FILE ]]; then
        say "preflight failed with status $status before the ranks had met, which they must for the training too"
    elif ((status != 0)); then
        say "preflight failed with status $status$( ((status > 128)) || printf '; MEGDET_PREFLIGHT=0 skips it')"
    elif [[ -n $minutes ]] && ((minutes < 1)); then
        say "the preflight took what the walltime leaves"
        status=1
    else
        run_child training "${end_at:+$((end_at - SECONDS))}" "${launch[@]}" "${train[@]}" "${time_limit[@]}"
        # Hydra returns the signal's own number
        if [[ $MEGDET_LAUNCHER == mpich && $status == 10 ]]; then status=$KILLED_BY_USR1; fi
        if ((status == KILLED_BY_USR1 && stop_requested)); then
            status=$STOPPED_EARLY # it came before the ranks listened
        fi
    fi
    conclude
}

# conclude: print what the status means, submit the job again or not, and exit with the status.
conclude() {
    local last_step go_on="submit with the same options and MEGDET_OUTPUT=$output"
    last_step=$(newest_step)
    rm -f "$MEGDET_STATUS_FILE" "$MEGDET_LAUNCH_FILE"
    if ((own_stop)); then rm -f "$output/stop"; fi
    if ((status == DISPLACED)) || { ((status != 0)) && ! owns_folder; }; then
        say "status $DISPLACED: another start owns $output now ($output/owner/holder.json); not submitted again"
        exit "$DISPLACED"
    fi
    case $status in
    0)
        say "finished; results in $output"
        exit 0
        ;;
    "$BAD_INPUT")
        say "status 2: refused, since the configuration or the data are wrong, see the error above; not submitted again"
        exit 2
        ;;
    "$STOPPED_EARLY") say "status 75: stopped early, state saved at step $last_step" ;;
    *) say "status $status: failed; newest checkpoint is of step $last_step" ;;
    esac
    if [[ -e $output/stop ]]; then
        say "$output/stop is there: not submitted again; to go on, $go_on, which removes it"
    elif ((last_step == first_step && attempt >= MEGDET_MAX_FAILURES)); then
        say "$attempt attempts in a row ended at step $last_step: not submitted again. Mend, then $go_on"
    elif [[ $MEGDET_RESUBMIT == 0 ]]; then
        say "MEGDET_RESUBMIT=0: not submitted again; to go on, $go_on"
    else
        "resubmit_$scheduler"
    fi
    exit "$status"
}

resubmit_none() { say "no scheduler: run it again with MEGDET_OUTPUT=$output to go on"; }

# The job keeps its id, and with it its folder. A job that is being cancelled must not come back.
resubmit_slurm() {
    local state job=$SLURM_JOB_ID
    # the id of an array's last task is the array's too, for which scontrol names and requeues all tasks
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    state=$(retry scontrol -o show job "$job" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p') || state=""
    if [[ -n $state && $state != RUNNING ]]; then
        say "job is $state, not requeued"
    else
        # printed before, since SLURM ends this script as soon as it has requeued the job
        say "requeuing"
        retry scontrol requeue "$job" || say "cannot be requeued; to go on, $go_on"
    fi
}

# note_settings: sets settings to those of the user or the submission, as shell text, before jobs/env.sh adds its own.
note_settings() {
    local name
    settings=""
    for name in $(setting_names) VENV; do
        case $name in
        MEGDET_ROOT | MEGDET_OUTPUT | MEGDET_CONTINUES | MEGDET_ARGS) ;;
        *) if [[ -v $name ]]; then printf -v settings '%sexport %s=%q\n' "$settings" "$name" "${!name}"; fi ;;
        esac
    done
}

# save_submission, restore_submission: arguments and settings over PBS jobs of one run.
save_submission() {
    # a later job runs this file, so no other user may write it; settings may hold keys, so none may read it
    chmod go-w "$output/job"
    (umask 077 && : >"$output/job/submission.sh.new")
    {
        printf '%s' "$settings"
        printf 'arguments=('
        if ((${#arguments[@]})); then printf ' %q' "${arguments[@]}"; fi
        printf ' )\n'
    } >"$output/job/submission.sh.new"
    chmod go-rwx "$output/job/submission.sh.new"
    mv "$output/job/submission.sh.new" "$output/job/submission.sh"
    if [[ -n $pbs_job ]]; then printf '%s\n' "$pbs_job" >"$output/job/qstat"; fi
}

restore_submission() {
    local saved=${MEGDET_OUTPUT:-}/job/submission.sh others
    if [[ $scheduler == pbs && -n ${MEGDET_CONTINUES:-} ]]; then
        [[ -f $saved ]] || fail "$saved is missing: it holds the run's arguments"
        others=$(find -L "${saved%/*}" "$saved" -maxdepth 0 \( ! -user "$(id -u)" -o -perm /022 \) | tr '\n' ' ')
        [[ -z $others ]] || fail "${others% } is another user's, or others may write there: its commands are not run." \
            "Look at it, then submit with the run's options and MEGDET_OUTPUT=$MEGDET_OUTPUT"
        # shellcheck source=/dev/null
        source "$saved"
    fi
}
