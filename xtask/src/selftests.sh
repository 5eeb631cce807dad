#!/bin/busybox sh
# Runs the kernel's selftests in a guest, each for at most so many seconds: run SECONDS. Of each it prints its line of the list,
# what it says, what the kernel warns of meanwhile, and its exit status.
export PATH=/bin
mount -t tmpfs -o size=50% tmpfs /tmp
mkdir -p /dev/shm
mount -t tmpfs -o size=50% tmpfs /dev/shm
mount -t debugfs debugfs /sys/kernel/debug
echo 0 > /proc/sys/kernel/randomize_va_space
dmesg -c > /dev/null
while read -r program arguments; do
    echo "@@ test $program${arguments:+ $arguments}"
    cd /selftests/${program%/*}
    timeout -s KILL $1 ./${program##*/} $arguments < /dev/null > /tmp/said 2>&1
    status=$?
    # Processes of a test that was ended must not disturb the next.
    killall -q -9 ${program##*/}
    tr -d '\000' < /tmp/said | head -c 100000
    echo
    dmesg -c | grep -E 'WARNING:|BUG|Oops|multicall|Bad page|bad pte' | sed 's/^/@@ log /'
    echo "@@ end $status"
done < /selftests/list
echo "@@ all tests have ended"
