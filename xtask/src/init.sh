#!/bin/busybox sh
# The first program of Tenon's test guests. Everything it runs is busybox.
export PATH=/bin HOME=/root TERM=linux PS1='tenon-guest# '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# Boot messages would fall between what a test types and what it reads.
echo 1 > /proc/sys/kernel/printk
echo "tenon-guest: init reached"
# Where the hypervisor shows the kernel's log alone, the line has to go there.
[ -c /dev/hvc0 ] || ! grep -q xenboot /proc/consoles || echo "<0>tenon-guest: init reached" > /dev/kmsg
for word in $(cat /proc/cmdline); do
    case $word in
    tenon.oneshot) poweroff -f ;;
    esac
done
console=/dev/hvc0
[ -c $console ] || console=/dev/console
cd /root
# A session of its own makes the console the shell's terminal, so that Ctrl-C works. A shell that ends is started anew.
while :; do
    setsid sh -c "exec sh -i <$console >$console 2>&1"
done
