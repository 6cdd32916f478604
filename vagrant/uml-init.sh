#!/bin/sh
# pid 1 under User-Mode Linux: the host's files are the root, read-only; everything that is written goes to memory, to the
# disk image at /dev/ubda, or to the one directory of the host that the kernel command line names.
#
# Kernel command line: STOCKADE_OUT=DIRECTORY STOCKADE_TESTS=TEST[,TEST...]
#                  or: STOCKADE_OUT=DIRECTORY STOCKADE_RUN=ARGUMENT[,ARGUMENT...] of Python, whose output goes to the console
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

off() {
    sync
    poweroff -f 2> /dev/null
    echo o > /proc/sysrq-trigger
    sleep 60
}
trap off EXIT

here=$(cd "$(dirname "$0")" && pwd)
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2> /dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
# A clone below one of these directories must not vanish under the memory that is mounted there.
clone=$(dirname "$here")
mkdir /dev/keep
mount --bind "$clone" /dev/keep
for directory in /dev/shm /run /tmp /mnt; do mount -t tmpfs tmpfs "$directory"; done
case $clone in
    /run/* | /tmp/* | /mnt/*) mkdir -p "$clone" && mount --move /dev/keep "$clone" ;;
    *) umount /dev/keep ;;
esac
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup 2> /dev/null
umount /sys/fs/cgroup 2> /dev/null
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup

# The kernel's own modules; the host's /lib/modules has those of the host's kernel, if any.
mkdir -p /run/modules/lib/modules
ln -s "/usr/lib/uml/modules/$(uname -r)" "/run/modules/lib/modules/$(uname -r)"
for module in ipv6 veth nf_tables nft_reject_inet overlay ext4 loop; do modprobe -d /run/modules -q "$module"; done
# No more of them: the kernel would look in vain, and take seconds for each kind of socket that an attempt asks for.
echo > /proc/sys/kernel/modprobe
ip link set lo up

mkdir /mnt/out /mnt/disk
mount -t hostfs -o "$STOCKADE_OUT" none /mnt/out
if [ -e /dev/ubda ]; then
    # Owners can be mapped on ext4 and not on hostfs; Linux 6.1 has no idmapped tmpfs yet either.
    mount -t ext4 /dev/ubda /mnt/disk
    chmod 1777 /mnt/disk
    export TMPDIR=/mnt/disk
fi
IFS=,
if [ -n "${STOCKADE_RUN:-}" ]; then
    cd "$clone" || exit 1
    # shellcheck disable=SC2086 # a list, split at commas
    "$STOCKADE_PYTHON" $STOCKADE_RUN > /dev/console
    exit
fi
# shellcheck disable=SC2086 # a list, split at commas
"$here/guest.sh" /mnt/out $STOCKADE_TESTS
