# shellcheck shell=bash disable=SC2154 # job_name, output, python, launch, ...: set by begin_job
# The work of jobs/evaluate, jobs/follow, jobs/doctor, jobs/pack_coco and jobs/bench_scaling under either scheduler.
# Sourced by jobs/common.sh.

once_log() { printf '%s' "$MEGDET_RUNS/$job_name-$job_id.log"; }

# evaluate_newest: score --checkpoint, or the newest checkpoint of the run in MEGDET_OUTPUT.
evaluate_newest() {
    local checkpoint
    checkpoint=$(option_value checkpoint "${arguments[@]}")
    checkpoint=${checkpoint:-$(newest_checkpoint)}
    [[ -n $checkpoint ]] || fail "no checkpoint in $output: name one with --checkpoint, or its run in MEGDET_OUTPUT"
    set_launch "$ranks" "$ranks_per_node"
    announce "$(once_log)"
    run_once "${python[@]}" -m megdet_hpc.evaluate --data.val "$MEGDET_DATA/val" "${arguments[@]}" \
        --checkpoint "$checkpoint"
}

# follow_run: score the checkpoints of the run in MEGDET_OUTPUT as they appear. The follower has all that it knows on disk, so
# it is ended when the job's time is over, and the job is submitted again. The files of its jobs lie in the run's deferred/,
# since the run's own jobs have theirs in the run's folder.
follow_run() {
    local run minutes="" end="" go_on
    run=$(option_value follow "${arguments[@]}")
    if [[ -z $run ]]; then
        [[ -n ${MEGDET_OUTPUT:-} ]] || fail "no run to follow: name its folder in MEGDET_OUTPUT"
        run=${output%/deferred}
    fi
    if [[ $run != /* ]]; then run=$MEGDET_ROOT/$run; fi
    output=$run/deferred go_on="submit with the same options and MEGDET_OUTPUT=$run"
    local -a follow=("${python[@]}" -m megdet_hpc.evaluate "${arguments[@]}" --follow "$run")
    if [[ $scheduler == pbs ]]; then
        read_pbs_job
        minutes=$(minutes_left)
        [[ -z $minutes ]] || ((minutes >= 1)) ||
            fail "walltime leaves $minutes minutes after a margin of $MEGDET_MARGIN_MINUTES; accepted: 1 or more"
        end=${minutes:+$((SECONDS + 60 * minutes))}
    fi
    set_launch "$ranks" "$ranks_per_node"
    if dry_run "${launch[@]}" "${follow[@]}"; then return; fi
    check_ready
    new_claim
    mkdir -p "$output/job"
    trap on_stop USR1
    take_folder
    announce "$output/job/log"
    save_submission
    # shellcheck disable=SC2034 # read by jobs/restart.sh
    left_behind="the follower, which has all on disk,"
    run_child follow "${end:+$((end - SECONDS))}" "${launch[@]}" "${follow[@]}"
    rm -f "$MEGDET_LAUNCH_FILE" "$MEGDET_STATUS_FILE"
    if ((status == 0)); then
        say "finished; scores in $run"
    elif ((stop_requested)) || [[ -n $end && $SECONDS -ge $end ]]; then
        status=$STOPPED_EARLY
        if [[ $MEGDET_RESUBMIT == 0 ]]; then
            say "MEGDET_RESUBMIT=0: not submitted again; to go on, $go_on"
        else
            "resubmit_$scheduler"
        fi
    else
        say "status $status: not submitted again; to go on, $go_on"
    fi
    exit "$status"
}

# examine_nodes: the doctor on all nodes of the job, for GPUs unless the options say otherwise.
examine_nodes() {
    local split
    local -a look=("${python[@]}" -m megdet_hpc.doctor --device cuda --output "$output" --scratch "$TMPDIR")
    for split in train val; do
        if [[ -d $MEGDET_DATA/$split ]]; then
            look+=(--data "$MEGDET_DATA/$split")
        else
            say "no packed data in $MEGDET_DATA/$split, so it is not checked" >&2
        fi
    done
    set_launch "$ranks" "$ranks_per_node"
    announce "$(once_log)"
    run_once "${look[@]}" --json "$output/findings.json" "${arguments[@]}"
}

# pack_and_verify: pack both splits of COCO 2017 and verify them; a split that is packed already is only verified.
pack_and_verify() {
    local split
    local -a pack
    [[ -d $MEGDET_COCO/annotations || -n ${MEGDET_DRY_RUN:-} ]] || fail "no annotations in $MEGDET_COCO: set MEGDET_COCO"
    set_launch "$ranks" "$ranks_per_node"
    announce "$(once_log)"
    for split in train val; do
        pack=(-m data_prep.pack_coco --annotations "$MEGDET_COCO/annotations/instances_${split}2017.json"
            --images "$MEGDET_COCO/${split}2017" --output "$MEGDET_DATA/$split" "${arguments[@]}")
        if [[ -f $MEGDET_DATA/$split/manifest.json ]]; then
            say "$MEGDET_DATA/$split is packed already"
        else
            run_once "${python[@]}" "${pack[@]}"
        fi
        run_once "${python[@]}" -m data_prep.verify_pack "$MEGDET_DATA/$split"
    done
}

# bench_sizes: run the same short training on the first 1, 2, 4, ... nodes, then the same with the mini-batch of the largest size
# on all others (strong scaling), which make more passes for it. Then print the table, and from three sizes on make the report.
bench_sizes() {
    local size largest=1 passes failed=""
    local -a sizes config=() ran=() bench only=()
    # a later configuration overrides an earlier one, so the default is added only if the options name none
    if [[ -z $(option_value config "${arguments[@]}") ]]; then config=(--config "${MEGDET_CONFIG:-megdet_r50_fpn_16}"); fi
    read -r -a sizes <<<"${MEGDET_BENCH_NODES:-1 2 4 8 16}"
    passes=$(option_value solver.accumulate "${arguments[@]}")
    bench=("${python[@]}" -m megdet_hpc.train "${config[@]}" --data.train "$MEGDET_DATA/train" --data.val null)
    announce "$(once_log)"
    for size in "${sizes[@]}"; do
        ((size <= num_nodes)) || continue
        ran+=("$size") largest=$size
        set_launch "$((size * ranks_per_node))" "$ranks_per_node"
        run_once "${bench[@]}" --max_steps "${MEGDET_BENCH_STEPS:-60}" --log_every 5 "${arguments[@]}" \
            --output "$output/nodes_$size" || failed+=" $size"
    done
    for size in "${ran[@]}"; do
        ((size < largest && largest % size == 0)) && [[ ${MEGDET_BENCH_STRONG:-1} != 0 ]] || continue
        set_launch "$((size * ranks_per_node))" "$ranks_per_node"
        run_once "${bench[@]}" --max_steps "${MEGDET_BENCH_STRONG_STEPS:-15}" --log_every 3 "${arguments[@]}" \
            --solver.accumulate "$((${passes:-1} * largest / size))" --output "$output/strong_$size" || failed+=" strong $size"
    done
    ((${#ran[@]} >= 3)) || only=(--table)
    bench=("${python[@]}" -m megdet_hpc.scaling_report "$output" "${only[@]}")
    if dry_run "${bench[@]}"; then return; fi
    "${bench[@]}" || failed+=" report"
    [[ -z $failed ]] || fail "failed:$failed (nodes); the errors are above"
}
