#!/bin/sh
# Launch agent of mpirun on PBS: mpirun hands over HOST and one shell command, as to ssh; pbs_tmrsh runs a program
# and its words, without a shell. mpirun cuts the domain off a host's name, and pbs_tmrsh wants it as it stands in the
# node file.
host=$(awk -v host="$1" '$1 == host || index($1, host ".") == 1 { print $1; exit }' "$PBS_NODEFILE")
host=${host:-$1}
shift
exec pbs_tmrsh "$host" /bin/sh -c "$*"
