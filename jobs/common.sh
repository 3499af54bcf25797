# shellcheck shell=bash disable=SC2154 # root is set by the job script
# Functions of all job scripts: settings, the scheduler's view of the job, the launcher. It is sourced; `root` is the
# checkout that the job script found. jobs/restart.sh has what happens when a run ends.
#
#   begin_job NAME NODES RANKS_PER_NODE "$@"    --help, settings, arguments; NODES and RANKS_PER_NODE count only
#                                               outside a scheduler (MEGDET_DRY_RUN)
#   set_launch RANKS RANKS_PER_NODE             the array `launch`
#   run_once COMMAND...                         run under `launch`, for what needs no restart

# In a checkout jobs/ below root; an installed package has these files elsewhere, and root is the folder of its runs.
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
    output=$(option_value output "${arguments[@]}")
    output=${output:-${MEGDET_OUTPUT:-$MEGDET_RUNS/$job_name-$job_id}}
    if [[ $output != /* ]]; then output=$MEGDET_ROOT/$output; fi
    # a rank that ends writes its status there, and rank 0 a sign that all ranks have met; a run has its own in its folder
    export MEGDET_STATUS_FILE=$MEGDET_RUNS/$job_name-$job_id-$$.status
    export MEGDET_LAUNCH_FILE=${MEGDET_STATUS_FILE%.status}.launched
    # a full path, since mpirun may put its own folder first, with another python in it
    python=("$VENV/bin/python")
    if [[ -n $MEGDET_CONTAINER ]]; then
        python=(apptainer exec --nv "$MEGDET_CONTAINER" python)
    fi
}

# setting_names: the variables that are settings of a run, on each of its nodes and in each of its jobs. Of a container's
# variables only its folders and those that it is given, since others hold passwords.
setting_names() {
    printf '%s\n' "${!MEGDET_@}" "${!NCCL_@}" "${!HOROVOD_@}" "${!APPTAINERENV_@}" "${!SINGULARITYENV_@}" \
        APPTAINER_BIND APPTAINER_BINDPATH SINGULARITY_BIND SINGULARITY_BINDPATH
}

# check_numbers: settings that must be numbers are numbers.
check_numbers() {
    local name
    for name in CORES_PER_RANK MAX_FAILURES MARGIN_MINUTES RETRY_SECONDS LEAVE_SECONDS STOP_SECONDS LAUNCH_SECONDS \
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
# each rank (mpiprocs).
begin_pbs() {
    local words
    scheduler=pbs job_id=${PBS_JOBID%%.*}
    job_name=${PBS_JOBNAME:-$job_name}
    if [[ ${MEGDET_ARGS:-} == *[![:space:]]* ]]; then
        words=$(xargs -n 1 printf '%s\n' <<<"$MEGDET_ARGS") || fail "MEGDET_ARGS has an open quote: $MEGDET_ARGS"
        mapfile -t -O "${#arguments[@]}" arguments <<<"$words"
    fi
    [[ -s ${PBS_NODEFILE:-} ]] || fail "PBS_NODEFILE '${PBS_NODEFILE:-}' is not there: submit with qsub"
    num_nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
    local per_node
    per_node=$(sort "$PBS_NODEFILE" | uniq -c | awk '{print $1}' | sort -u | tr '\n' ' ')
    [[ $per_node =~ ^([0-9]+)\ $ ]] || fail "nodes with unequal numbers of ranks ($per_node) in $PBS_NODEFILE"
    ranks_per_node=${BASH_REMATCH[1]}
}

# set_launch RANKS RANKS_PER_NODE: the launcher's words, for all of the job's nodes or the first ones.
set_launch() {
    case $MEGDET_LAUNCHER in
    mpirun) set_mpirun "$@" ;;
    srun)
        [[ $scheduler != pbs ]] || fail "MEGDET_LAUNCHER is srun, which PBS does not have; accepted there: mpirun"
        # Since SLURM 22.05 srun no longer takes --cpus-per-task from the job; newer ones refuse it beside the same in
        # SLURM_TRES_PER_TASK. Each rank is bound to its share of the cores. It sees
        # all of the job's GPUs of its node and picks its own by local rank; --gpu-bind=none would leave
        # CUDA_VISIBLE_DEVICES unset, and with it other jobs' GPUs in sight.
        unset SLURM_TRES_PER_TASK
        launch=(srun --mpi=pmix --nodes="$(($1 / $2))" --ntasks="$1" --ntasks-per-node="$2"
            --cpus-per-task="${SLURM_CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 --cpu-bind=cores)
        ;;
    *) fail "MEGDET_LAUNCHER is '$MEGDET_LAUNCHER'; accepted: mpirun, srun" ;;
    esac
}

set_mpirun() {
    local name
    # Under SLURM mpirun starts one daemon per node through srun, and the ranks inherit its cores. That step has
    # all cores of the node unless one of these narrows it to a task's share.
    unset SLURM_EXACT SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK
    launch=(mpirun -np "$1")
    if [[ $MEGDET_CORES_PER_RANK == 0 ]]; then
        launch+=(--map-by "ppr:$2:node" --bind-to none)
    else
        launch+=(--map-by "ppr:$2:node:pe=$MEGDET_CORES_PER_RANK" --bind-to core)
    fi
    if [[ $scheduler == pbs ]]; then add_pbs_launch; fi
    # SLURM passes the job's variables on by itself; ssh does not.
    for name in PATH LD_LIBRARY_PATH TMPDIR $(setting_names) "${!UCX_@}" "${!FI_@}" "${!GLOO_@}" \
        "${!TORCH_@}" "${!PYTORCH_@}" \
        OMP_NUM_THREADS HDF5_USE_FILE_LOCKING PYTHONUNBUFFERED; do
        if [[ $(declare -p "$name" 2>/dev/null) == "declare -x"* ]]; then launch+=(-x "$name"); fi
    done
}

# An Open MPI with PBS support (tm) finds nodes and starts its daemons by itself. Any other, such as Debian's and the PyPI
# wheel, needs the node file and an agent. It starts daemons from the first node only, since other nodes may not be allowed
# or able to.
add_pbs_launch() {
    local agent=$MEGDET_PBS_AGENT plm=rsh info=ompi_info plain='^[A-Za-z0-9_./+:@%,=-]*$'
    # from 5.0 on mpirun belongs to PRRTE, where the component has another name
    if [[ $(mpirun --version 2>/dev/null) =~ \(Open\ MPI\)\ ([5-9]|[1-9][0-9])\. ]]; then plm=ssh info=prte_info; fi
    if [[ -z $agent && $("$info" 2>/dev/null) == *"MCA plm: tm "* ]]; then return; fi
    launch+=(--hostfile "$PBS_NODEFILE")
    if ((num_nodes == 1)); then return; fi
    # --prefix: the daemons are found there on the other nodes too, where nobody has set PATH
    MEGDET_MPI_PREFIX=$(dirname "$(dirname "$(command -v mpirun || echo /usr/bin/mpirun)")")
    if [[ -n $agent ]]; then
        [[ $MEGDET_MPI_PREFIX =~ $plain ]] || fail "mpirun hands its folder '$MEGDET_MPI_PREFIX' on without quotes:" \
            "make the environment in a path without blanks, or leave MEGDET_PBS_AGENT empty"
    else
        export MEGDET_MPI_PREFIX
        agent=$jobs_folder/pbs_rsh.sh
        # mpirun splits its agent at blanks
        if ! [[ $agent =~ $plain ]]; then agent=pbs_rsh.sh PATH=$PATH:$jobs_folder; fi
    fi
    launch_agent=$agent
    # A daemon that leaves its session is either killed by PBS as soon as the agent's command has ended, or escapes the
    # job and is not suspended, accounted or ended with it. Attached daemons are all started at once.
    launch+=(--leave-session-attached --mca "plm_${plm}_num_concurrent" "$num_nodes" --prefix "$MEGDET_MPI_PREFIX"
        --mca plm "$plm" --mca "plm_${plm}_agent" "$agent" --mca "plm_${plm}_no_tree_spawn" 1)
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

# shellcheck source=jobs/pbs.sh
source "$jobs_folder/pbs.sh"
# shellcheck source=jobs/restart.sh
source "$jobs_folder/restart.sh"
# shellcheck source=jobs/tasks.sh
source "$jobs_folder/tasks.sh"
