# 200 programs that end at once, one after the other.
PATH=/bin
i=0
while [ $i -lt 200 ]; do
    /bin/true
    i=$((i + 1))
done
