# shellcheck shell=bash
# HPE Slingshot (Cray EX): MEGDET_SITE=slingshot. None of it was tried by this project. A value that is set already stays.
# Sources: https://docs.isambard.ac.uk/user-documentation/guides/nccl (all values of NCCL_ and FI_ but NCCL_PROTO), and
# https://documentation.sigma2.no/hpc_machines/olivia/nccl.html (HPE's recommendation, and LL128). It needs the aws-ofi-nccl plugin of the site; without it NCCL takes sockets, which NCCL_DEBUG=INFO shows as NET/Socket.

# NCCL and RCCL over libfabric's cxi provider, not over sockets.
export NCCL_NET=${NCCL_NET:-AWS Libfabric}
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PHB} NCCL_CROSS_NIC=${NCCL_CROSS_NIC:-1}
# With GPUDirect the LL128 protocol can corrupt data on this network (https://github.com/NVIDIA/nccl/issues/2001).
export NCCL_PROTO=${NCCL_PROTO:-^LL128}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-hsn} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-hsn0}

export FI_CXI_DISABLE_HOST_REGISTER=${FI_CXI_DISABLE_HOST_REGISTER:-1}
export FI_CXI_DEFAULT_CQ_SIZE=${FI_CXI_DEFAULT_CQ_SIZE:-131072}
export FI_MR_CACHE_MONITOR=${FI_MR_CACHE_MONITOR:-userfaultfd}

# Cray MPICH beside NCCL: an MPI that reads GPU memory too can end in a deadlock (documentation of CSCS).
export MPICH_GPU_SUPPORT_ENABLED=${MPICH_GPU_SUPPORT_ENABLED:-0}
