"""`megdet scaling-report`: runs of jobs/bench_scaling as a table, and as the report that a centre asks for."""
