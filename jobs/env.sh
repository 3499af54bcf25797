# shellcheck shell=bash
# Site settings of all job scripts. Copy the checkout to the cluster and edit this file once; the job scripts need no
# changes. Each value can also be given at submission: MEGDET_DATA=/data/coco sbatch jobs/...
#
# jobs/common.sh sources this file after it has set MEGDET_ROOT to the checkout, and without `set -eu`, on which modules may
# fail.

# --- the site's software -----------------------------------------------------------------------------
# Load the modules that were loaded when tools/setup_env.sh ran, and no others: Horovod runs only with the MPI with which
# it was built.
# module purge
# module load gcc/12 cuda/13.0 openmpi/4.1 || exit 2

# An Apptainer image made from jobs/megdet.def, for sites without modules; empty: the environment below. With an image
# mpirun is the host's, which must have the Open MPI version of the image. APPTAINER_BIND names the folders of the data.
MEGDET_CONTAINER=${MEGDET_CONTAINER:-}

# An archive of the environment, written by tools/pack_env.sh. Each node unpacks it once to MEGDET_ENV_FOLDER (empty: TMPDIR) and
# takes all of the ranks' Python from there, instead of thousands of small files from the shared file system. MEGDET_ENV_MOUNT=1
# mounts a .sqfs archive by squashfuse instead. mpirun is still that of PATH or of the environment below. Empty: no archive.
MEGDET_ENV_ARCHIVE=${MEGDET_ENV_ARCHIVE:-}
MEGDET_ENV_FOLDER=${MEGDET_ENV_FOLDER:-}
MEGDET_ENV_MOUNT=${MEGDET_ENV_MOUNT:-0}

# The environment that tools/setup_env.sh made.
VENV=${VENV:-$MEGDET_ROOT/.venv}
if [[ -z $MEGDET_CONTAINER ]]; then
    if [[ -n $MEGDET_ENV_ARCHIVE && ! -r $MEGDET_ENV_ARCHIVE.sha256 ]]; then
        echo "jobs/env.sh: no $MEGDET_ENV_ARCHIVE with its .sha256: run tools/pack_env.sh, or leave MEGDET_ENV_ARCHIVE empty" >&2
        exit 2
    fi
    if [[ -z $MEGDET_ENV_ARCHIVE && ! -x $VENV/bin/python ]]; then
        echo "jobs/env.sh: no environment in $VENV: run tools/setup_env.sh on a login node first, or set VENV" >&2
        exit 2
    fi
    export VENV PATH="$VENV/bin:$PATH"
fi

# --- folders -----------------------------------------------------------------------------------------
# Packed images that data_prep/pack_coco.py wrote: MEGDET_DATA/train and MEGDET_DATA/val, where every node can read them.
MEGDET_DATA=${MEGDET_DATA:-$MEGDET_ROOT/packed}

# ImageNet weights of the backbone, fetched on a login node since compute nodes often have no internet: the file that
# `model.backbone_weights: auto` means. Empty: weights/BACKBONE.pth in the checkout, which megdet_hpc.fetch_backbone writes.
# Configurations that train from scratch (null) or name a file of their own stay as they are.
MEGDET_BACKBONE=${MEGDET_BACKBONE:-}

# The downloaded COCO set, for jobs/pack_coco: annotations/, train2017/ and val2017/.
MEGDET_COCO=${MEGDET_COCO:-$MEGDET_ROOT/coco}

# Folder of the runs (checkpoints, metrics, pictures), on a file system that all nodes share.
MEGDET_RUNS=${MEGDET_RUNS:-$MEGDET_ROOT/runs}

# Node-local scratch, for temporary files of the loader and of MPI. A slow or shared one makes the start slow, since Open
# MPI keeps its shared memory files there.
export TMPDIR=${MEGDET_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}

# --- launcher ----------------------------------------------------------------------------------------
# mpirun:   that of Open MPI, 4.1 or 5.0, the PyPI wheels included. An mpirun of MPICH or Intel MPI is taken for mpich.
# mpich:    Hydra's mpiexec, that of MPICH and Intel MPI.
# srun:     for sites that forbid mpirun; with --mpi=pmix (MPICH, Intel MPI: pmi2) where srun offers it, else the site's default.
# torchrun: torch's own, which needs no MPI; on several nodes once on each, by srun or PALS.
# pals:     mpiexec of HPE's PALS (Cray EX with PBS).
# flux, jsrun: flux run; LSF's jsrun.
MEGDET_LAUNCHER=${MEGDET_LAUNCHER:-mpirun}

# More options for the launcher, separated by blanks: MEGDET_LAUNCH_OPTIONS="--cpu-bind list:0-7:8-15" for PALS. Those of
# MEGDET_SRUN_OPTIONS replace options of the same name: MEGDET_SRUN_OPTIONS="--mpi=cray_shasta --gpu-bind=closest -c7".
MEGDET_LAUNCH_OPTIONS=${MEGDET_LAUNCH_OPTIONS:-}
MEGDET_SRUN_OPTIONS=${MEGDET_SRUN_OPTIONS:-}

# Ranks of a node on PBS where the select has no mpiprocs, so that the node file has one line for each node. Empty: its lines.
MEGDET_RANKS_PER_NODE=${MEGDET_RANKS_PER_NODE:-}

# Number of cores to which mpirun binds each rank and its loader processes; 0: no binding, the kernel places them. If nothing
# else runs on the node, set it to the cores of the node / its ranks. srun takes --cpus-per-task of the job.
MEGDET_CORES_PER_RANK=${MEGDET_CORES_PER_RANK:-0}

# Command by which mpirun reaches other nodes on PBS. Empty: PBS's own way if the Open MPI has it, else pbs_tmrsh, else ssh.
# Any command that takes HOST COMMAND will do.
MEGDET_PBS_AGENT=${MEGDET_PBS_AGENT:-}

# --- restarts ----------------------------------------------------------------------------------------
# Number of attempts in a row that may end without a newer checkpoint; then the run is left alone. So a lost node gets another
# chance, and a fault that comes back does not use up the account.
MEGDET_MAX_FAILURES=${MEGDET_MAX_FAILURES:-3}

# 0: a run that is cut is not submitted again.
MEGDET_RESUBMIT=${MEGDET_RESUBMIT:-1}

# Minutes before the walltime of a PBS job at which the training stops itself. They cover the start-up before its clock
# starts, the running step or evaluation, and a checkpoint. SLURM jobs get a signal instead (--signal in the script).
MEGDET_MARGIN_MINUTES=${MEGDET_MARGIN_MINUTES:-10}

# Seconds between five attempts to reach the scheduler's server.
MEGDET_RETRY_SECONDS=${MEGDET_RETRY_SECONDS:-10}

# Seconds for which a launcher may go on once a rank has failed or stopped and reported it. A node that is frozen or has
# vanished answers no launcher.
MEGDET_LEAVE_SECONDS=${MEGDET_LEAVE_SECONDS:-60}

# Seconds after SLURM's signal at which a training that has not stopped is ended, so that the job can still be requeued. It
# must be less than --signal gives before the time limit. On PBS it is ended when a third of the margin is left.
MEGDET_STOP_SECONDS=${MEGDET_STOP_SECONDS:-200}

# Seconds within which, after a launch, the first rank must report that all ranks have met. After that the launcher counts as
# hanging, and the attempt is ended. To load torch on every rank from a shared file system may take minutes. 0: no limit.
MEGDET_LAUNCH_SECONDS=${MEGDET_LAUNCH_SECONDS:-600}

# Check of every node in the seconds before the training. 0: no check.
MEGDET_PREFLIGHT=${MEGDET_PREFLIGHT:-1}

# Seconds that one stage of the check may take. The first import of torch by every rank from a shared file system is slow. The
# whole check, launch included, is ended after three times that. 0: no limit.
MEGDET_PREFLIGHT_SECONDS=${MEGDET_PREFLIGHT_SECONDS:-300}

# --- network -----------------------------------------------------------------------------------------
# The fast interface, such as ib0, where nodes have several networks. Otherwise MPI and NCCL may pick a management network or
# a container bridge, and hang or be very slow. Empty: they choose.
MEGDET_INTERFACE=${MEGDET_INTERFACE:-}
if [[ -n $MEGDET_INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$MEGDET_INTERFACE
    export HOROVOD_GLOO_IFACE=$MEGDET_INTERFACE GLOO_SOCKET_IFNAME=$MEGDET_INTERFACE
    export OMPI_MCA_btl_tcp_if_include=$MEGDET_INTERFACE
    export OMPI_MCA_oob_tcp_if_include=$MEGDET_INTERFACE PRTE_MCA_oob_tcp_if_include=$MEGDET_INTERFACE
    export HYDRA_IFACE=$MEGDET_INTERFACE I_MPI_HYDRA_IFACE=$MEGDET_INTERFACE
fi

# --- behaviour ---------------------------------------------------------------------------------------
# NCCL then names the transport that failed, not only that something failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Images of many sizes leave holes in the GPU's memory. With this setting PyTorch's allocator moves pages instead. Do not use it
# with an MPI that reads GPU memory itself, which may not know such pages. Untested on a GPU.
# export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# One thread per rank: the loader's processes keep the cores busy, and thread pools of the ranks would compete with them. It
# replaces the value of PBS, which is the number of the node's cores.
export OMP_NUM_THREADS=${MEGDET_OMP_NUM_THREADS:-1}

# The packed files are only read. Lustre and NFS mounts without locks refuse the lock that HDF5 takes when it opens a file.
export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}

# Messages reach the log as they are printed.
export PYTHONUNBUFFERED=1

# What a site's network and GPUs want: jobs/sites/{slingshot,infiniband,ethernet}.sh, or a file of the site's own. Empty: nothing.
MEGDET_SITE=${MEGDET_SITE:-}
if [[ -n $MEGDET_SITE ]]; then
    if [[ $MEGDET_SITE != */* ]]; then
        site_file=${jobs_folder:-$MEGDET_ROOT/jobs}/sites/$MEGDET_SITE.sh
        if [[ ! -r $site_file ]]; then
            echo "jobs/env.sh: MEGDET_SITE is '$MEGDET_SITE'; accepted:" \
                "$(basename -s .sh "${site_file%/*}"/*.sh | sed -z 's/\n/, /g')or a path" >&2
            exit 2
        fi
        MEGDET_SITE=$site_file
    fi
    # shellcheck source=/dev/null
    source "$MEGDET_SITE" || exit 2
fi
