"""What setup.cfg cannot say: the packages that are found, and the job scripts beside them as one more."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megdet_hpc*", "data_prep*"]), "megdet_hpc.jobs"],
    package_dir={"megdet_hpc.jobs": "jobs"},
)
