# shellcheck shell=bash
# Site settings of all job scripts. Copy the checkout to the cluster, edit this file once, leave the job
# scripts alone. Each value can also be given at submission: MEGDET_DATA=/data/coco sbatch jobs/...
#
# Sourced by jobs/common.sh, which has set MEGDET_ROOT to the checkout, without `set -eu`, which modules may not bear.

# --- the site's software -----------------------------------------------------------------------------
# The modules that were loaded when tools/setup_env.sh ran, and no others: Horovod runs only with the MPI
# it was built against.
# module purge
# module load gcc/12 cuda/13.0 openmpi/4.1 || exit 2

# An Apptainer image made from jobs/megdet.def, for sites without modules; empty: the environment below. mpirun is
# then the host's, and must be the Open MPI version inside the image. APPTAINER_BIND names the data's folders.
MEGDET_CONTAINER=${MEGDET_CONTAINER:-}

# The environment that tools/setup_env.sh made.
VENV=${VENV:-$MEGDET_ROOT/.venv}
if [[ -z $MEGDET_CONTAINER ]]; then
    if [[ ! -x $VENV/bin/python ]]; then
        echo "jobs/env.sh: no environment in $VENV: run tools/setup_env.sh on a login node first, or set VENV" >&2
        exit 2
    fi
    export VENV PATH="$VENV/bin:$PATH"
fi

# --- folders -----------------------------------------------------------------------------------------
# Packed images, as data_prep/pack_coco.py writes them: MEGDET_DATA/train and MEGDET_DATA/val, where every
# node can read them.
MEGDET_DATA=${MEGDET_DATA:-$MEGDET_ROOT/packed}

# ImageNet weights of the backbone, fetched on a login node: compute nodes often have no internet. Empty: what the
# configuration says, by default weights/BACKBONE.pth in the checkout where megdet_hpc.fetch_backbone has written it.
MEGDET_BACKBONE=${MEGDET_BACKBONE:-}

# COCO as it was downloaded, for jobs/pack_coco: annotations/, train2017/ and val2017/.
MEGDET_COCO=${MEGDET_COCO:-$MEGDET_ROOT/coco}

# Runs: checkpoints, metrics, pictures. On a file system that all nodes share.
MEGDET_RUNS=${MEGDET_RUNS:-$MEGDET_ROOT/runs}

# Node-local scratch, for temporary files of the loader and of MPI. Slow or shared scratch costs start-up
# time: Open MPI keeps its shared memory files there.
export TMPDIR=${MEGDET_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}

# --- launcher ----------------------------------------------------------------------------------------
# mpirun: Open MPI's, 4.1 or 5.0, the PyPI wheels included.
# srun:   srun --mpi=pmix, for sites that forbid mpirun; the MPI must have been built for the site's PMIx.
MEGDET_LAUNCHER=${MEGDET_LAUNCHER:-mpirun}

# Cores to which mpirun binds each rank and its loader processes; 0: none, the kernel places them. Set it to the
# cores of a node / its ranks where nothing else runs on the node. srun takes --cpus-per-task of the job.
MEGDET_CORES_PER_RANK=${MEGDET_CORES_PER_RANK:-0}

# How mpirun reaches other nodes on PBS: empty chooses PBS's own way where the Open MPI has it, then pbs_tmrsh, then
# ssh. Any command that takes HOST COMMAND does.
MEGDET_PBS_AGENT=${MEGDET_PBS_AGENT:-}

# --- restarts ----------------------------------------------------------------------------------------
# Attempts in a row that may end without a newer checkpoint before the run is left alone: a lost node gets another
# chance, a fault that comes back does not burn the account.
MEGDET_MAX_FAILURES=${MEGDET_MAX_FAILURES:-3}

# 0: a run that is cut is not submitted again.
MEGDET_RESUBMIT=${MEGDET_RESUBMIT:-1}

# Minutes before a PBS job's walltime at which the training stops itself: start-up before its clock starts, the
# step or evaluation under way, a checkpoint. SLURM jobs get a signal instead (--signal in the script).
MEGDET_MARGIN_MINUTES=${MEGDET_MARGIN_MINUTES:-10}

# Seconds between five attempts to reach the scheduler's server.
MEGDET_RETRY_SECONDS=${MEGDET_RETRY_SECONDS:-10}

# Seconds for which a launcher may stay once a rank has failed or stopped and said so: a node that is frozen, or gone
# without a word, answers no launcher.
MEGDET_LEAVE_SECONDS=${MEGDET_LEAVE_SECONDS:-60}

# Seconds from SLURM's signal after which a training that has not stopped is ended, so that the job can still be
# requeued: less than --signal gives before the time limit. On PBS it is ended when a third of the margin is left.
MEGDET_STOP_SECONDS=${MEGDET_STOP_SECONDS:-200}

# Seconds from a launch within which the first rank must report that all ranks have met; later the launcher hangs, and
# the attempt is ended. Loading torch on every rank from a shared file system may take minutes. 0: no limit.
MEGDET_LAUNCH_SECONDS=${MEGDET_LAUNCH_SECONDS:-600}

# 0: no check of every node in the seconds before the training.
MEGDET_PREFLIGHT=${MEGDET_PREFLIGHT:-1}

# Seconds that one stage of it may take: a first import of torch by every rank from a shared file system is slow. All
# of it, the launch included, is ended after three times that. 0: no limit.
MEGDET_PREFLIGHT_SECONDS=${MEGDET_PREFLIGHT_SECONDS:-300}

# --- network -----------------------------------------------------------------------------------------
# The fast interface, such as ib0, where nodes have several networks: MPI and NCCL otherwise may pick a
# management network or a container bridge, and hang or crawl. Empty: they choose.
MEGDET_INTERFACE=${MEGDET_INTERFACE:-}
if [[ -n $MEGDET_INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$MEGDET_INTERFACE
    export HOROVOD_GLOO_IFACE=$MEGDET_INTERFACE
    export OMPI_MCA_btl_tcp_if_include=$MEGDET_INTERFACE
    export OMPI_MCA_oob_tcp_if_include=$MEGDET_INTERFACE PRTE_MCA_oob_tcp_if_include=$MEGDET_INTERFACE
fi

# --- behaviour ---------------------------------------------------------------------------------------
# NCCL says which transport failed instead of only that something did.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Images of many sizes leave holes in the GPU's memory. With this PyTorch's allocator moves pages instead; not with an
# MPI that reads GPU memory itself, which may not know such pages. Untested on a GPU.
# export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# One thread per rank: the loader's processes are what keeps the cores busy, and the ranks' own thread
# pools would fight them. Set over what is there, since PBS sets it to the node's cores.
export OMP_NUM_THREADS=${MEGDET_OMP_NUM_THREADS:-1}

# The packed files are only read. Lustre and NFS mounts without locks refuse HDF5's lock on opening.
export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}

# Messages reach the log as they are printed.
export PYTHONUNBUFFERED=1
