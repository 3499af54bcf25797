"""Benchmarks that a site can repeat: python -m megdet_hpc.bench NAME, alone or under mpirun."""
