#!/bin/sh
# Makes a fresh Vagrant machine able to run guest.sh: what `./bootstrap setup` does on any host, and nothing else.
set -eu
cd /stockade
./bootstrap setup
if [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then
    echo "this machine does not use cgroup v2; boot it with systemd.unified_cgroup_hierarchy=1" >&2
    exit 1
fi
