# shellcheck shell=bash disable=SC2154 # root is set by the job script
# Functions of all job scripts: settings, the scheduler's view of the job, the launcher. It is sourced; `root` is the
# checkout that the job script found. jobs/restart.sh handles the end of a run.
#
#   begin_job NAME NODES RANKS_PER_NODE "$@"    --help, settings, arguments; NODES and RANKS_PER_NODE count only
#                                               outside a scheduler (MEGDET_DRY_RUN)
#   set_launch RANKS RANKS_PER_NODE             the array `launch`
#   run_once COMMAND...                         run under `launch`, for what needs no restart

# The folder of these files: jobs/ below root in a checkout. An installed package has them elsewhere, and root holds its runs.
jobs_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

fail() {
    printf '%s: %s\n' "${job_name:-jobs/common.sh}" "$*" >&2
    exit 2
}

say() { printf '%s %s: %s\n' "$(date '+%F %T')" "$job_name" "$*"; }

# show_help SCRIPT: its first comment block after the directives.
show_help() { sed -n '/^set -e/q;/^# \|^#$/{s/^# \{0,1\}//;p}' "$1"; }

# option_value NAME ARGUMENTS...: the last value of --NAME VALUE or --NAME=VALUE, or nothing.
option_value() {
    local name=--$1 value=""
    shift
    while (($#)); do
        case $1 in
        "$name"=*) value=${1#*=} ;;
        "$name") value=${2:-} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# begin_job NAME NODES RANKS_PER_NODE ARGUMENTS...: sets scheduler, job_id, job_name, arguments, num_nodes,
# ranks_per_node, ranks, output and leaves the shell in the checkout.
begin_job() {
    job_script=$1
    job_name=$1
    num_nodes=$2
    ranks_per_node=$3
    shift 3
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        show_help "$0"
        exit 0
    fi
    MEGDET_ROOT=$(cd "$root" && pwd -P)
    export MEGDET_ROOT
    arguments=("$@")
    scheduler=none job_id=local
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        begin_slurm
    elif [[ -n ${PBS_JOBID:-} ]]; then
        begin_pbs
    fi
    ranks=$((num_nodes * ranks_per_node))
    # Ranks import the package from here, and relative paths in the options mean the checkout.
    cd "$MEGDET_ROOT" || exit
    restore_submission
    note_settings
    # the functions of module systems fail on unset variables and on statuses that do not matter
    set +euo pipefail
    # shellcheck source=jobs/env.sh
    source "$jobs_folder/env.sh"
    set -euo pipefail
    check_numbers
    # the mpirun of MPICH and Intel MPI refuses the words of Open MPI's
    if [[ $MEGDET_LAUNCHER == mpirun ]] && mpirun_is_hydra; then MEGDET_LAUNCHER=mpich; fi
    output=$(option_value output "${arguments[@]}")
    output=${output:-${MEGDET_OUTPUT:-$MEGDET_RUNS/$job_name-$job_id}}
    if [[ $output != /* ]]; then output=$MEGDET_ROOT/$output; fi
    # ranks write their exit status there, and rank 0 makes a file there when all ranks have met; a training has its own files
    export MEGDET_STATUS_FILE=$MEGDET_RUNS/${job_name//\//_}-$job_id-$$.status
    export MEGDET_LAUNCH_FILE=${MEGDET_STATUS_FILE%.status}.launched
    # a full path, since mpirun may put its own folder first, with another python in it
    python=("$VENV/bin/python")
    if [[ -n $MEGDET_CONTAINER ]]; then
        python=(apptainer exec --nv "$MEGDET_CONTAINER" python)
    elif [[ -n $MEGDET_ENV_ARCHIVE ]]; then
        if [[ $MEGDET_ENV_ARCHIVE != /* ]]; then MEGDET_ENV_ARCHIVE=$MEGDET_ROOT/$MEGDET_ENV_ARCHIVE; fi
        # the ranks need them
        export MEGDET_ENV_ARCHIVE MEGDET_ENV_FOLDER MEGDET_ENV_MOUNT
        python=(bash "$jobs_folder/node_env.sh" python)
    fi
}

# setting_names: the variables that are settings of a run, on all its nodes and in all its jobs. Of a container's variables
# these are only its folders and the variables passed into it, since others may hold passwords.
setting_names() {
    printf '%s\n' "${!MEGDET_@}" "${!NCCL_@}" "${!HOROVOD_@}" "${!APPTAINERENV_@}" "${!SINGULARITYENV_@}" \
        APPTAINER_BIND APPTAINER_BINDPATH SINGULARITY_BIND SINGULARITY_BINDPATH
}

# check_numbers: settings that must be numbers are numbers.
check_numbers() {
    local name
    for name in RANKS_PER_NODE CORES_PER_RANK MAX_FAILURES MARGIN_MINUTES RETRY_SECONDS LEAVE_SECONDS STOP_SECONDS LAUNCH_SECONDS \
        PREFLIGHT_SECONDS WALLTIME_MINUTES; do
        name=MEGDET_$name
        [[ -z ${!name:-} || ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name is '${!name}'; accepted: a whole number"
    done
}

begin_slurm() {
    scheduler=slurm job_id=$SLURM_JOB_ID
    # with sbatch --export=NONE, the default of some sites, srun would not pass on what is set here
    export SLURM_EXPORT_ENV=ALL
    job_name=${SLURM_JOB_NAME:-$job_name}
    num_nodes=${SLURM_JOB_NUM_NODES:-$num_nodes}
    ranks_per_node=${SLURM_NTASKS_PER_NODE:-$ranks_per_node}
}

# PBS passes no arguments to a script. They come in MEGDET_ARGS, quoted as for a shell. The node file has one line for
# each rank (mpiprocs), or one for each node and MEGDET_RANKS_PER_NODE says how many ranks it has.
begin_pbs() {
    local words
    scheduler=pbs job_id=${PBS_JOBID%%.*}
    job_name=${PBS_JOBNAME:-$job_name}
    if [[ ${MEGDET_ARGS:-} == *[![:space:]]* ]]; then
        words=$(xargs -n 1 printf '%s\n' <<<"$MEGDET_ARGS") || fail "MEGDET_ARGS has an open quote: $MEGDET_ARGS"
        mapfile -t -O "${#arguments[@]}" arguments <<<"$words"
    fi
    [[ -s ${PBS_NODEFILE:-} ]] || fail "PBS_NODEFILE '${PBS_NODEFILE:-}' is missing or empty: submit with qsub"
    num_nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
    local per_node
    per_node=$(sort "$PBS_NODEFILE" | uniq -c | awk '{print $1}' | sort -u | tr '\n' ' ')
    [[ $per_node =~ ^([0-9]+)\ $ ]] || fail "nodes with unequal numbers of ranks ($per_node) in $PBS_NODEFILE"
    ranks_per_node=${BASH_REMATCH[1]}
    # a select without mpiprocs gives a node one line
    if [[ -n ${MEGDET_RANKS_PER_NODE:-} ]]; then ranks_per_node=$MEGDET_RANKS_PER_NODE; fi
}

# dry_run COMMAND...: whether MEGDET_DRY_RUN is set; if so, print the words of the command, quoted for a shell.
dry_run() {
    [[ -n ${MEGDET_DRY_RUN:-} ]] || return 1
    printf '%q ' "$@"
    printf '\n'
}

# retry COMMAND...: try it a few times, since a scheduler's server may be away for a minute.
retry() {
    local try
    for try in 1 2 3 4 5; do
        if "$@"; then return 0; fi
        say "attempt $try of 5 failed: $*" >&2
        sleep "$MEGDET_RETRY_SECONDS"
    done
    return 1
}

# check_ready [FOLDER...]: check that the launcher and the packed data are there.
check_ready() {
    local folder
    command -v "${launch[0]}" >/dev/null || fail "${launch[0]} is not on PATH: load the site's module in jobs/env.sh"
    for folder in "$@"; do
        [[ -z $folder || $folder == null || -d $folder ]] ||
            fail "no packed data in $folder: run jobs/pack_coco first, or set MEGDET_DATA"
    done
}

# announce LOG: the first lines of a job's log. PBS keeps the output until the job ends, so there it goes to LOG.
announce() {
    if [[ $scheduler == pbs ]]; then
        mkdir -p "$(dirname "$1")"
        say "the output is in $1"
        exec >>"$1" 2>&1
    fi
    say "job $job_id ($scheduler), $ranks ranks, $ranks_per_node per node on ${SLURM_JOB_NODELIST:-$num_nodes node(s)}"
}

# run_once COMMAND...: run a command under `launch` that needs no restart; returns its status.
run_once() {
    if dry_run "${launch[@]}" "$@"; then return; fi
    check_ready
    mkdir -p "$MEGDET_RUNS"
    run_child "$job_name" "" "${launch[@]}" "$@"
    rm -f "$MEGDET_LAUNCH_FILE" "$MEGDET_STATUS_FILE"
    return "$status"
}

# shellcheck source=jobs/launchers.sh
source "$jobs_folder/launchers.sh"
# shellcheck source=jobs/pbs.sh
source "$jobs_folder/pbs.sh"
# shellcheck source=jobs/restart.sh
source "$jobs_folder/restart.sh"
# shellcheck source=jobs/tasks.sh
source "$jobs_folder/tasks.sh"
