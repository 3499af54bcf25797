# shellcheck shell=bash
# Ethernet without RDMA: MEGDET_SITE=ethernet. A value that is set already stays.
# Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# NCCL looks for InfiniBand and RoCE otherwise, and may hang on adapters without a network.
export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-1}
# All interfaces but loopback and those of containers and virtual machines.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr,veth}
