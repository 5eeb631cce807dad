#!/bin/sh
# Made by `cargo xtask` from the user-data beside this file.
umask 077
failed=0

say() { echo "tenon-seed: $*"; }

# Carries out a step by its name and its command.
step() {
    name=$1
    shift
    "$@" || { say "$name: failed"; failed=1; }
}

# The guest's name, and its name with a domain.
host_name() {
    (umask 022; echo "$1" > /etc/hostname) && hostname "$1" || return
    words=$2
    [ "$1" = "$2" ] || words="$2 $1"
    { sed '/^127\.0\.1\.1[[:space:]]/d' /etc/hosts && echo "127.0.1.1 $words"; } > /etc/hosts.seed || return
    chmod 644 /etc/hosts.seed && mv /etc/hosts.seed /etc/hosts
}

# Path, mode, owner, `new` or `append`, encoding, content.
write_file() {
    (umask 022; mkdir -p "$(dirname "$1")") || return
    [ "$4" = append ] || : > "$1" || return
    case $5 in
        plain) printf %s "$6" ;;
        base64) printf %s "$6" | base64 --decode --ignore-garbage ;;
        gzip) printf %s "$6" | base64 --decode --ignore-garbage | gzip --decompress ;;
    esac >> "$1" || return
    chown "$3" "$1" && chmod "$2" "$1"
}

# Name, full name, shell, groups with commas.
account() {
    for group in $(echo "$4" | tr , ' '); do
        getent group "$group" > /dev/null || groupadd "$group" || return
    done
    if getent passwd "$1" > /dev/null; then
        usermod --shell "$3" ${2:+--comment "$2"} ${4:+--append --groups "$4"} "$1"
    else
        (umask 022; useradd --create-home --shell "$3" --comment "$2" ${4:+--groups "$4"} "$1")
    fi
}

# Name, password, `-e` if it is a hash.
password() { printf '%s:%s\n' "$1" "$2" | chpasswd ${3:+"$3"}; }

lock() { passwd --quiet --lock "$1"; }

expire() { passwd --quiet --expire "$1"; }

# Name, lines of a file for sudo.
sudo_rules() {
    command -v sudo > /dev/null || { say "the guest has no sudo"; return 1; }
    write_file "/etc/sudoers.d/90-seed-$(echo "$1" | tr . _)" 0440 root:root new plain "$2"
}

# Name, lines of a file authorized_keys.
keys() {
    home=$(getent passwd "$1" | cut -d : -f 6) && [ -n "$home" ] || return
    mkdir -p "$home/.ssh" && touch "$home/.ssh/authorized_keys" || return
    printf %s "$2" | while read -r key; do
        grep -qxF -e "$key" "$home/.ssh/authorized_keys" || echo "$key" >> "$home/.ssh/authorized_keys"
    done
    chown -R "$1:" "$home/.ssh"
}

apt() {
    verb=$1
    shift
    DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes -o Dpkg::Options::=--force-confold "$verb" "$@" > /var/log/tenon-seed-apt.log 2>&1 ||
        { tail -n 3 /var/log/tenon-seed-apt.log; return 1; }
}

# Lines of a script.
commands() { printf %s "$1" | (umask 022; sh); }

