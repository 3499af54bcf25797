"""Arithmetic of a run before it starts: what it does, what is risky, what it costs. Needs no MPI, no GPU, no data."""
