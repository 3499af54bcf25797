# Environment of megdet_hpc as a Docker or OCI image, with Horovod for NCCL; the same steps as jobs/megdet.def:
#
#   docker build -t megdet_hpc .            (or podman build, buildah bud)
#   docker run --rm --gpus all --shm-size 8g -v /data:/data megdet_hpc megdet train --config megdet_r50_fpn_16 ...
#
# CUDA comes with PyTorch's packages. The compiler that Horovod's build needs is fetched for the build alone, so the base needs
# no CUDA. --build-arg HOROVOD_BUILD=cpu leaves it out, and --build-arg BASE=... takes another Debian or Ubuntu of Python 3.10
# or newer. Built and run with HOROVOD_BUILD=cpu by buildah; the build for NCCL is untried (docs/packaging.md).
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG HOROVOD_BUILD=nccl
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ make ca-certificates \
        openmpi-bin libopenmpi-dev openssh-client \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt setup.cfg setup.py pyproject.toml README.md LICENSE /opt/megdet/
COPY tools /opt/megdet/tools
COPY megdet_hpc /opt/megdet/megdet_hpc
COPY data_prep /opt/megdet/data_prep
COPY jobs /opt/megdet/jobs
# one step, so that caches and the fetched compiler are in no layer
RUN cd /opt/megdet \
    && PYTHON=python3 VENV=/opt/megdet/env MEGDET_CACHE=/tmp/megdet PIP_NO_CACHE_DIR=1 \
        MEGDET_MPI=path HOROVOD_BUILD=${HOROVOD_BUILD} tools/setup_env.sh \
    && rm -rf /tmp/megdet
ENV PATH=/opt/megdet/env/bin:$PATH LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
RUN python -c 'import horovod.torch as hvd, megdet_hpc; assert hvd.mpi_built()'
CMD ["megdet"]
