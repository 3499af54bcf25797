"""What a detector gets wrong: figures, tables and one page, `python -m megdet_hpc.analyze RUN`."""
