#!/bin/sh
# Runs kernel tests in a guest whose kernel is not the host's: under User-Mode Linux and in the Vagrant machine alike.
#
# Usage: guest.sh OUT TEST...
#   OUT      directory for result.xml (JUnit), facts.txt and status; made if it is missing
#   TEST...  what pytest is to run, relative to the repository
#
# Needs root, cgroup v2 at /sys/fs/cgroup, and the repository with its .venv around this script.
set -eu

out=$1
shift
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${STOCKADE_PYTHON:-$repository/.venv/bin/python}
mkdir -p "$out"

# The controllers must reach the groups that tests make at the root; the root itself may hold processes (cgroups(7)).
printf '+cpu +memory +pids' > /sys/fs/cgroup/cgroup.subtree_control

{
    echo "kernel $(uname -r)"
    echo "cgroup $(stat -f -c %T /sys/fs/cgroup)"
    echo "controllers $(cat /sys/fs/cgroup/cgroup.controllers)"
    echo "temporary $(stat -f -c %T "${TMPDIR:-/tmp}")"
} > "$out/facts.txt"

cd "$repository"
export PYTHONDONTWRITEBYTECODE=1
status=0
"$python" -m pytest -q --color=no -p no:cacheprovider --junitxml="$out/result.xml" --basetemp="${TMPDIR:-/tmp}/pytest" "$@" || status=$?
echo "$status" > "$out/status"
