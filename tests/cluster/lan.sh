# A network of simulated hosts in a network, mounts and processes of its own: all of it is gone
# when this process is. Writes the process ids of the hosts, as seen in here, to WORK/NAME.pid.
# To be run by: unshare --net --mount --pid --fork --mount-proc --kill-child bash lan.sh ...
set -euo pipefail
work=$1 root=$2 bin=$3 names=${*:4}

ip link set lo up
ip link add lan type bridge
ip link set lan up
number=0
for name in $names; do
    number=$((number + 1))
    unshare --net --mount --pid --fork --mount-proc --uts --kill-child \
        bash "$(dirname "$0")/host.sh" "$work" "$root" "$bin" "$name" "10.77.0.$number" \
        </dev/null >"$work/$name.log" 2>&1 &
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
    ip link add "lan$number" type veth peer name eth0 netns "$!"
    ip link set "lan$number" master lan up
    until first=$(tr -d ' ' <"/proc/$!/task/$!/children") && [ "$first" ]; do sleep 0.05; done
    echo "$first" >"$work/$name.pid"
done
echo up
wait
