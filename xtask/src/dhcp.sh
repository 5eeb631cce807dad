#!/bin/busybox sh
# Run by udhcpc: $1 says what has happened, the environment what the server said.
case $1 in
deconfig)
    ip -4 address flush dev $interface
    ip link set $interface up
    ;;
bound | renew)
    ip -4 address flush dev $interface
    ip address add $ip/$mask dev $interface
    [ -z "$mtu" ] || ip link set $interface mtu $mtu
    for gateway in $router; do ip route replace default via $gateway dev $interface && break; done
    : > /etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
    [ -z "$hostname" ] || hostname $hostname
    [ $1 = renew ] || echo "tenon-guest: $interface has the address $ip" > /dev/console
    ;;
esac
