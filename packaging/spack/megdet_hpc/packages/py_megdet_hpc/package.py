"""Spack recipe of megdet_hpc over the site's own PyTorch and MPI: packaging/spack, docs/packaging.md.

UNTRIED: Spack could not be installed where this was written. The file was read by Python alone. Expect to adapt the
names of packages to the site's Spack.
"""

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PyMegdetHpc(PythonPackage):
    """Object detectors trained with very large mini-batches: MegDet on PyTorch and MPI."""

    # Spack builds a development version from the checkout: spack develop --path CHECKOUT py-megdet-hpc@0.2.0
    version("0.2.0")

    license("Apache-2.0")

    variant("mpi", default=True, description="CGBN's messages over MPI; without it over torch.distributed")
    variant("horovod", default=False, description="Gradients over Horovod; without it over torch.distributed")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@70:", type="build")

    with default_args(type=("build", "run")):
        depends_on("py-torch@2.4:+distributed")
        depends_on("py-torchvision@0.19:")
        depends_on("py-numpy")
        depends_on("py-h5py")
        depends_on("py-pycocotools")
        depends_on("pil@10:")
        depends_on("py-jsonargparse@4.49: +signatures")
        depends_on("py-pyyaml")
        depends_on("py-tqdm")
        depends_on("py-tensorboard")
        depends_on("py-matplotlib")
        # Optional: COCO scoring in Rust, which Spack's own list may not have. Without it pycocotools scores, more
        # slowly, and megdet analyze does not run.
        # depends_on("py-hotcoco@1.3:")
        depends_on("py-mpi4py@4.1:", when="+mpi")
        depends_on("py-horovod@0.28.1: frameworks=pytorch", when="+horovod")

    conflicts("+horovod", when="~mpi", msg="Horovod finds its ranks by MPI here")

    import_modules = ["megdet_hpc", "data_prep"]
