# shellcheck shell=bash disable=SC2154 # job_name, output, python, launch, ...: set by begin_job
# The short jobs: the work of jobs/evaluate, jobs/doctor, jobs/pack_coco and jobs/bench_scaling under either scheduler.
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

# examine_nodes: the doctor on all nodes of the job, for GPUs unless the options say otherwise.
examine_nodes() {
    local split
    local -a look=("${python[@]}" -m megdet_hpc.doctor --device cuda --output "$output" --scratch "$TMPDIR")
    for split in train val; do
        if [[ -d $MEGDET_DATA/$split ]]; then
            look+=(--data "$MEGDET_DATA/$split")
        else
            say "no packed data in $MEGDET_DATA/$split, which is not looked at" >&2
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

# bench_sizes: run the same short training on the first 1, 2, 4, ... nodes, then print the table.
bench_sizes() {
    local size failed=""
    local -a sizes config=()
    # a later configuration overrides an earlier one, so one that the options name must stand alone
    if [[ -z $(option_value config "${arguments[@]}") ]]; then config=(--config "${MEGDET_CONFIG:-megdet_r50_fpn_16}"); fi
    read -r -a sizes <<<"${MEGDET_BENCH_NODES:-1 2 4 8 16}"
    announce "$(once_log)"
    for size in "${sizes[@]}"; do
        ((size <= num_nodes)) || continue
        set_launch "$((size * ranks_per_node))" "$ranks_per_node"
        run_once "${python[@]}" -m megdet_hpc.train "${config[@]}" --data.train "$MEGDET_DATA/train" --data.val null \
            --max_steps "${MEGDET_BENCH_STEPS:-60}" --log_every 5 "${arguments[@]}" --output "$output/nodes_$size" ||
            failed+=" $size"
    done
    if dry_run "${python[@]}" jobs/scaling_table.py "$output"; then return; fi
    "${python[@]}" jobs/scaling_table.py "$output" || failed+=" table"
    [[ -z $failed ]] || fail "failed:$failed (nodes); the errors are above"
}
