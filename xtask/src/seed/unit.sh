#!/bin/sh
# Sets this guest up as a NoCloud seed says which `cargo xtask run` has made: once for each instance-id.
state=/var/lib/tenon-seed
seed=/run/tenon-seed

say() { echo "tenon-seed: $*"; }

if [ "${1-}" = late ]; then
    # What a power cut interrupts is begun again.
    sh $state/late
    status=$?
    mv $state/late $state/late.done
    say "done"
    exit $status
fi
for label in CIDATA cidata; do
    device=$(blkid -t LABEL=$label -o device | head -n 1)
    [ -z "$device" ] || break
done
[ -n "$device" ] || exit 0
mkdir -p -m 700 $state $seed
mount -o ro "$device" $seed || exit
trap 'umount $seed' EXIT
id=$(sed -n 's/^instance-id: *//p' $seed/meta-data)
if [ "$id" != "$(cat $state/instance 2> /dev/null)" ]; then
    if [ ! -f $seed/tenon-early ]; then
        say "$device: no seed of cargo xtask: it needs cloud-init"
        exit 1
    fi
    sh $seed/tenon-early
    status=$?
    rm -f $state/late
    [ ! -f $seed/tenon-late ] || cp $seed/tenon-late $state/late
    echo "$id" > $state/instance
    sync
    say "$id: $([ $status = 0 ] && echo set up || echo set up but for what has failed)"
fi
[ ! -f $state/late ] || systemctl --no-block start tenon-seed-late.service
exit ${status-0}
