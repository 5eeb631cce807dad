#!/bin/busybox sh
# The first program of Tenon's test guests. Everything it runs is busybox.
export PATH=/bin HOME=/root TERM=linux PS1='tenon-guest# '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# Boot messages would fall between what a test types and what it reads.
echo 1 > /proc/sys/kernel/printk
# The kernel loads file systems when they are mounted, and drivers of devices only if asked. Disks may come later, too.
release=$(uname -r)
if [ -d /lib/modules/$release ]; then modprobe xen_blkfront & fi
for disk in /sys/bus/xen/devices/vbd-*; do
    [ -d $disk ] || break
    if [ ! -d /lib/modules/$release ] && [ ! -d /sys/bus/xen/drivers/vbd ]; then
        echo "tenon-guest: no disks: neither the kernel $release nor this ramdisk has the driver xen-blkfront"
        break
    fi
    for tenth in $(seq 100); do
        [ ! -d $disk/block ] || break
        usleep 100000
    done
    [ -d $disk/block ] || echo "tenon-guest: the disk ${disk##*/vbd-} has not come up in 10 s"
done
# A kernel that is alone on a machine finds its system on a virtio disk.
for word in $(cat /proc/cmdline); do
    case $word in
    root=/dev/vd*)
        modprobe virtio_pci
        modprobe virtio_blk
        for tenth in $(seq 100); do
            [ ! -b ${word#root=} ] || break
            usleep 100000
        done
        ;;
    esac
done
# A guest whose system is on a disk goes on from there. That system checks the disk before it makes it writable.
for word in $(cat /proc/cmdline); do
    case $word in
    root=*)
        root=${word#root=}
        # Its first program may be a link that leads somewhere only there.
        if mkdir -p /mnt && mount -o ro $root /mnt && { [ -L /mnt/sbin/init ] || [ -x /mnt/sbin/init ]; }; then
            for folder in proc sys dev; do mount --move /$folder /mnt/$folder; done
            exec switch_root /mnt /sbin/init
        fi
        echo "tenon-guest: $root has no system to start"
        ;;
    esac
done
# Addresses are asked for while other things go on, and renewed as long as the guest runs.
ip link set lo up
if [ -d /sys/bus/xen/devices/vif-0 ] && [ -d /lib/modules/$release ]; then modprobe xen_netfront; fi
for vif in /sys/bus/xen/devices/vif-*; do
    [ -d $vif/net ] || continue
    nic=$(ls $vif/net)
    udhcpc -f -i $nic -s /etc/dhcp.sh -t 1000 -T 3 -O mtu > /dev/null 2>&1 &
done
# A guest whose system is a container goes on with a program of its own.
if [ -x /bin/container-init ]; then
    for module in /lib/container/*.ko; do insmod $module; done
    exec /bin/container-init
fi
if [ -x /bin/dropbear ]; then mkdir -p /etc/dropbear && dropbear -R -s; fi
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
