# shellcheck shell=bash
# InfiniBand: MEGDET_SITE=infiniband. None of it was tried by this project. A value that is set already stays.
# Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# The names of the adapters as `ibstat -l` prints them; NCCL takes all that begin with mlx5.
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
# The interface over which ranks find each other: IP over InfiniBand.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
