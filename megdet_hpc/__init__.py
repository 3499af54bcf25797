"""megdet_hpc: object detectors trained with very large mini-batches on HPC clusters.

Implements MegDet (Peng et al., CVPR 2018) on Horovod and MPI. This module imports nothing, so that tools
which only need the packed data format (`data_prep/`) run without torch.
"""

__version__ = "0.1.0"
