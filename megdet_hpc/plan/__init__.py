"""Arithmetic of a run before it starts: its steps, its risks and its costs. It needs no MPI, GPU or data."""
