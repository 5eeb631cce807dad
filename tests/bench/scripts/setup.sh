# Before the scripts that are measured: their commands, and the files they need.
/bin/busybox --install -s /bin
/bin/mount -t proc proc /proc
/bin/mount -t devtmpfs dev /dev
