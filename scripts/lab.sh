# scripts/lab.sh: what the demos share; they source it with their name and a time limit.
#
#     . scripts/lab.sh NAME SECONDS FLANNEL-DP
#
# Everything happens in namespaces named fdp-NAME-PID-*, which are deleted at the end,
# whatever that end is; the machine's own network is not touched.

[ "$(id -u)" = 0 ] || { echo "the demo makes network namespaces: run it as root" >&2; exit 1; }
if [ -z "${FDP_DEMO_LIMIT:-}" ]; then
    FDP_DEMO_LIMIT=$2 exec timeout --foreground --kill-after=20 "$2" "$0" "$3"
fi

flannel_dp=$(realpath -s "$3")
prefix=fdp-$1-$$
files=$(mktemp -d)
wrong=0

delete_namespace() { # NAME, without the prefix
    rm -f "/run/flannel-dp/$(stat -L -c %i "/run/netns/$prefix-$1")"-*.lock
    ip netns delete "$prefix-$1" || true
}

cleanup() {
    local path
    for path in /run/netns/"$prefix"-*; do
        [ -e "$path" ] || continue
        delete_namespace "${path#/run/netns/"$prefix"-}"
    done
    rm -rf "$files"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold='' dim='' green='' red='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
fi

step=0
title() {
    step=$((step + 1))
    between=''
    printf '\n%s%d. %s%s\n\n' "$bold" "$step" "$1" "$plain"
}
say() { printf '%s\n' "$@"; }

# Run flannel-dp on a node, and show the command as it would be typed there. The variable
# "expect" is the exit code it should end with, "through" a filter for what it prints.
on() {
    local node=$1 code=0
    shift
    printf '%s' "$between"
    between=$'\n'
    printf '%s%s $%s %sflannel-dp %s%s\n' "$dim" "$node" "$plain" "$bold" "$*" "$plain"
    if [ -n "${through:-}" ]; then
        on_silently "$node" "$@" | "$through" || code=${PIPESTATUS[0]}
    else
        on_silently "$node" "$@" || code=$?
    fi
    if [ "$code" != "${expect:-0}" ]; then
        echo "flannel-dp $* ended with exit code $code" >&2
        exit 1
    fi
}

on_silently() { # the same without a word of ours; the exit code is the command's
    local node=$1
    shift
    (cd "$files" && timeout 300 "$flannel_dp" "$@" --netns "$prefix-$node")
}

in_ns() { # NAMESPACE COMMAND...
    local ns=$1
    shift
    ip netns exec "$prefix-$ns" "$@"
}

write_sysctls() { # forwarding as a node has it; no waiting for duplicate addresses
    in_ns "$1" sh -c '
        cd /proc/sys/net
        echo 0 >ipv6/conf/all/accept_dad
        echo 0 >ipv6/conf/default/accept_dad
        echo '"$2"' >ipv4/ip_forward
        echo '"$2"' >ipv6/conf/all/forwarding'
}

reaches() { # NAMESPACE ADDRESS [SECONDS]
    in_ns "$1" ping -q -n -c 1 -W "${3:-2}" "$2" >/dev/null 2>&1
}

finish() { # the last words, and the exit code
    if [ $wrong != 0 ]; then
        echo "${red}$wrong pings did not do what they should${plain}" >&2
        exit 1
    fi
    echo
    echo "${bold}All pings did what they should.${plain} The namespaces of this demo are removed now."
}
