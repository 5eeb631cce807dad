# 40 pipelines of four programs, each with 64 KiB of the same data.
PATH=/bin
i=0
while [ $i -lt 40 ]; do
    head -c 65536 /bin/busybox | od | sort | gzip >/dev/null
    i=$((i + 1))
done
