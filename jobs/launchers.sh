# shellcheck shell=bash disable=SC2154,SC2034 # scheduler, num_nodes, python, ...: set by begin_job
# The words of each launcher. Sourced by jobs/common.sh.
#
#   set_launch RANKS RANKS_PER_NODE     the array `launch`, for all of the job's nodes or the first ones
#
# MEGDET_LAUNCHER names the launcher, MEGDET_LAUNCH_OPTIONS (srun: MEGDET_SRUN_OPTIONS) more options for it, which come last and
# so count. megdet_hpc/parallel/launchers.py has the variables by which each launcher's ranks know their places.

readonly LAUNCHER_NAMES="mpirun, mpich, srun, torchrun, pals, flux, jsrun"
readonly PLAIN_PATH='^[A-Za-z0-9_./+:@%,=-]*$'

# mpirun_is_hydra: whether the mpirun on PATH is that of MPICH or Intel MPI.
mpirun_is_hydra() { [[ $(timeout 20 mpirun --version 2>/dev/null) =~ HYDRA|Intel ]]; }

set_launch() {
    local -a more=()
    read -r -a more <<<"${MEGDET_LAUNCH_OPTIONS:-}"
    case $MEGDET_LAUNCHER in
    mpirun) set_mpirun "$@" ;;
    mpich) set_mpich "$@" ;;
    srun) set_srun "$@" ;;
    torchrun) set_torchrun "$@" ;;
    pals) set_pals "$@" ;;
    flux) launch=(flux run --nodes="$(($1 / $2))" --ntasks="$1" --exclusive) ;;
    # a resource set is a whole node, so that each rank sees its node's GPUs and takes its own
    jsrun) launch=(jsrun --nrs "$(($1 / $2))" --tasks_per_rs "$2" --cpu_per_rs ALL_CPUS --gpu_per_rs ALL_GPUS --bind none) ;;
    *) fail "MEGDET_LAUNCHER is '$MEGDET_LAUNCHER'; accepted: $LAUNCHER_NAMES" ;;
    esac
    launch+=("${more[@]}")
}

# whole_node: let a step of one task a node, a launcher's daemon, have all cores and GPUs of its node: the shares of a task
# that the job's options asked for would narrow it.
whole_node() {
    unset SLURM_EXACT SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU \
        SLURM_GPU_BIND
}

# set_srun RANKS RANKS_PER_NODE: options of MEGDET_SRUN_OPTIONS take the place of those here.
set_srun() {
    local word pmi
    local -a own=() options=()
    [[ $scheduler != pbs ]] || fail "MEGDET_LAUNCHER is srun, which PBS does not have; accepted there: mpirun, mpich, pals, torchrun"
    read -r -a own <<<"${MEGDET_SRUN_OPTIONS:-}"
    # Since SLURM 22.05 srun no longer takes --cpus-per-task from the job; newer ones refuse it beside the same in
    # SLURM_TRES_PER_TASK. Each rank is bound to its share of the cores. It sees
    # all of the job's GPUs of its node and picks its own by local rank; --gpu-bind=none would leave
    # CUDA_VISIBLE_DEVICES unset, and with it other jobs' GPUs in sight.
    unset SLURM_TRES_PER_TASK
    pmi=$(srun_pmi)
    options=(${pmi:+"--mpi=$pmi"} --nodes="$(($1 / $2))" --ntasks="$1" --ntasks-per-node="$2"
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 --cpu-bind=cores)
    launch=(srun)
    for word in "${options[@]}"; do
        # an option of the user's, --NAME=VALUE or --NAME VALUE, replaces this one
        if [[ " ${own[*]} " != *" ${word%%=*}="* && " ${own[*]} " != *" ${word%%=*} "* ]]; then launch+=("$word"); fi
    done
    launch+=("${own[@]}")
}

# srun_pmi: prints the interface by which the ranks of srun find each other, if srun offers it: PMIx for Open MPI, PMI-2 for MPICH
# and Intel MPI. Cray's sites have one of their own as default. Where srun does not answer, as outside a cluster, it counts as
# offering it.
srun_pmi() {
    local offered pmi=pmix
    if mpirun_is_hydra; then pmi=pmi2; fi
    offered=$(srun --mpi=list 2>&1) || offered=$pmi
    if [[ $offered == *"$pmi"* ]]; then printf '%s' "$pmi"; fi
}

# set_mpich RANKS RANKS_PER_NODE: Hydra, the launcher of MPICH and Intel MPI. Intel's mpirun is a script that a signal ends while
# its ranks go on, so mpiexec.hydra is taken where it is there. It passes the environment on, and knows SLURM's nodes by itself.
set_mpich() {
    local hydra=mpiexec
    if command -v mpiexec.hydra >/dev/null; then hydra=mpiexec.hydra; fi
    whole_node
    launch=("$hydra" -n "$1" -ppn "$2" -genvall)
    if [[ $MEGDET_CORES_PER_RANK != 0 ]]; then
        export I_MPI_PIN_DOMAIN=$MEGDET_CORES_PER_RANK
        if [[ $("$hydra" --version 2>/dev/null) != *Intel* ]]; then launch+=(-bind-to "core:$MEGDET_CORES_PER_RANK"); fi
    fi
    if [[ $scheduler == pbs ]]; then
        launch+=(-f "$PBS_NODEFILE")
        # as its "ssh" it would give the agent an option before the host
        if ((num_nodes > 1)); then
            set_launch_agent
            launch+=(-launcher rsh -launcher-exec "$launch_agent")
        fi
    fi
}

# set_pals RANKS RANKS_PER_NODE: mpiexec of HPE's PALS, on Cray EX sites with PBS.
set_pals() {
    launch=(mpiexec -n "$1" --ppn "$2")
    if [[ $MEGDET_CORES_PER_RANK == 0 ]]; then
        launch+=(--cpu-bind none)
    else
        launch+=(--depth "$MEGDET_CORES_PER_RANK" --cpu-bind depth)
    fi
}

# set_torchrun RANKS RANKS_PER_NODE: torch's own launcher, once on each node, started there by srun or PALS. Its ranks meet at
# the first node. It needs no MPI.
set_torchrun() {
    local nodes=$(($1 / $2)) first="" port=$((20000 + $(cksum <<<"$job_id" | cut -d' ' -f1) % 10000))
    local -a torchrun=("${python[@]}" -m torch.distributed.run --no-python --nproc-per-node "$2")
    if ((nodes == 1)); then
        launch=("${torchrun[@]}" --standalone)
        return
    fi
    case $scheduler in
    slurm)
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
        # one task a node with all of the node's cores, which its ranks share
        whole_node
        launch=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1
            --cpus-per-task="$((${SLURM_CPUS_PER_TASK:-5} * $2))" --kill-on-bad-exit=1 --cpu-bind=none)
        local -a own=()
        read -r -a own <<<"${MEGDET_SRUN_OPTIONS:-}"
        launch+=("${own[@]}")
        ;;
    pbs)
        first=$(sed -n 1p "$PBS_NODEFILE")
        launch=(mpiexec -n "$nodes" --ppn 1 --cpu-bind none)
        ;;
    *) fail "MEGDET_LAUNCHER is torchrun, which needs SLURM or PBS (PALS) for $nodes nodes" ;;
    esac
    launch+=("${torchrun[@]}" --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$job_id")
}

set_mpirun() {
    local name
    # Under SLURM mpirun starts one daemon per node through srun, and the ranks inherit its cores.
    whole_node
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
        MASTER_ADDR MASTER_PORT PBS_JOBID OMP_NUM_THREADS HDF5_USE_FILE_LOCKING PYTHONUNBUFFERED; do
        if [[ $(declare -p "$name" 2>/dev/null) == "declare -x"* ]]; then launch+=(-x "$name"); fi
    done
}

# set_launch_agent: sets launch_agent to the program by which a launcher starts its daemons on the other nodes of a PBS job.
set_launch_agent() {
    launch_agent=${MEGDET_PBS_AGENT:-$jobs_folder/pbs_rsh.sh}
    # mpirun splits its agent at blanks
    if [[ -z $MEGDET_PBS_AGENT && ! $launch_agent =~ $PLAIN_PATH ]]; then launch_agent=pbs_rsh.sh PATH=$PATH:$jobs_folder; fi
}

# An Open MPI with PBS support (tm) finds nodes and starts its daemons by itself. Any other, such as Debian's and the PyPI
# wheel, needs the node file and an agent. It starts daemons from the first node only, since other nodes may not be allowed
# or able to.
add_pbs_launch() {
    local plm=rsh info=ompi_info
    # since 5.0 mpirun is part of PRRTE, where the component has another name
    if [[ $(mpirun --version 2>/dev/null) =~ \(Open\ MPI\)\ ([5-9]|[1-9][0-9])\. ]]; then plm=ssh info=prte_info; fi
    if [[ -z $MEGDET_PBS_AGENT && $("$info" 2>/dev/null) == *"MCA plm: tm "* ]]; then return; fi
    launch+=(--hostfile "$PBS_NODEFILE")
    if ((num_nodes == 1)); then return; fi
    # --prefix names the folder of the daemons on the other nodes, where PATH is not set
    MEGDET_MPI_PREFIX=$(dirname "$(dirname "$(command -v mpirun || echo /usr/bin/mpirun)")")
    [[ -z $MEGDET_PBS_AGENT || $MEGDET_MPI_PREFIX =~ $PLAIN_PATH ]] ||
        fail "mpirun hands its folder '$MEGDET_MPI_PREFIX' on without quotes: make the environment in a path without blanks," \
            "or leave MEGDET_PBS_AGENT empty"
    if [[ -z $MEGDET_PBS_AGENT ]]; then export MEGDET_MPI_PREFIX; fi
    set_launch_agent
    # A daemon that leaves its session is either killed by PBS as soon as the agent's command has ended, or escapes the
    # job and is not suspended, accounted or ended with it. Attached daemons are all started at once.
    launch+=(--leave-session-attached --mca "plm_${plm}_num_concurrent" "$num_nodes" --prefix "$MEGDET_MPI_PREFIX"
        --mca plm "$plm" --mca "plm_${plm}_agent" "$launch_agent" --mca "plm_${plm}_no_tree_spawn" 1)
}
