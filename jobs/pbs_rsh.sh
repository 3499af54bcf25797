#!/bin/sh
# Launch agent of mpirun on PBS. As with ssh, mpirun gives it HOST and one command for the user's login shell. The agent
# starts the command by pbs_tmrsh if there is one, so that it belongs to the job on that node; otherwise by ssh.
host=$1
shift
command=$*
shell=$(getent passwd "$(id -u)" | cut -d: -f7)

# mpirun splits the name of its agent at blanks. If this folder has a blank, mpirun gets the bare name, which its daemon on
# the other node looks for on PATH. mpirun writes its own folder, MEGDET_MPI_PREFIX, into the command without quotes. A
# variable takes the place of that folder, and an empty IFS keeps it whole.
quoted() { printf '%s\n' "$1" | sed "s/'/'\\\\''/g; s/^/'/; s/\$/'/"; }
jobs=$(dirname "$0")
# shellcheck disable=SC2016 # the other node's shell expands it
case $jobs${MEGDET_MPI_PREFIX:-} in
*[!A-Za-z0-9_./+:@%,=-]*)
    case $shell in *csh)
        echo "jobs/pbs_rsh.sh: $shell cannot start what lies in a path with a blank ($jobs, $MEGDET_MPI_PREFIX)" >&2
        exit 2
        ;;
    esac
    rest=$command command=
    while [ -n "${MEGDET_MPI_PREFIX:-}" ] && [ "${rest#*"$MEGDET_MPI_PREFIX"}" != "$rest" ]; do
        command=$command${rest%%"$MEGDET_MPI_PREFIX"*}'${megdet_prefix}'
        rest=${rest#*"$MEGDET_MPI_PREFIX"}
    done
    command="$command$rest"
    command="megdet_prefix=$(quoted "${MEGDET_MPI_PREFIX:-}"); PATH=\$PATH:$(quoted "$jobs"); export PATH; IFS=; $command"
    ;;
esac

command -v pbs_tmrsh >/dev/null || exec ssh -x "$host" "$command"
# pbs_tmrsh runs a program with its arguments, without a shell. It needs the host's name from the node file, but mpirun
# removes the domain.
named=$(awk -v host="$host" '$1 == host || index($1, host ".") == 1 { print $1; exit }' "$PBS_NODEFILE")
case $shell in *csh) ;; *) shell=/bin/sh ;; esac
exec pbs_tmrsh "${named:-$host}" "$shell" -c "$command"
