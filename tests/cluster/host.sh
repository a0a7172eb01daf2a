# One simulated host, with sshd: started by lan.sh as the first process of a process namespace.
set -euo pipefail
work=$1 root=$2 bin=$3 name=$4 address=$5

hostname "$name"
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add 8.8.8.8/32 dev eth0 # Ray finds its own address by asking for this route
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray /run/sshd "$work/$name/ray" "$work/$name/home"
mount --bind "$work/$name/ray" /tmp/ray

home=$(getent passwd "$(id -u)" | cut -d: -f6) # ssh reads this one, not $HOME
python=$(dirname "$(dirname "$(readlink -f "$bin/python")")")
for needed in "$python" "$root"; do # which may lie below the home that is covered
    case $needed in
    "$home"/*)
        mkdir -p "$work/$name/home/${needed#"$home"/}"
        mount --rbind "$needed" "$work/$name/home/${needed#"$home"/}"
        ;;
    esac
done
mount --rbind "$work/$name/home" "$home"
export HOME=$home

mkdir -p -m 700 "$HOME/.ssh" "$HOME/.ray"
cp "$work/id.pub" "$HOME/.ssh/authorized_keys"
if [ "$name" = laptop ]; then
    cp "$work/id" "$HOME/.ssh/id_ed25519"
    cp "$work/auth_token" "$HOME/.ray/auth_token"
else
    # No network to install from: what metadist depends on is there, and pip changes a layer on it.
    "$bin/python" -m venv --without-pip "$HOME/metadist"
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    mkdir -p "$work/$name/layer"
    mount -t tmpfs tmpfs "$work/$name/layer"
    mkdir "$work/$name/layer/upper" "$work/$name/layer/work"
    lower=$("$bin/python" -c "$packages")
    mount -t overlay overlay "$("$HOME/metadist/bin/python" -c "$packages")" \
        -o "lowerdir=$lower,upperdir=$work/$name/layer/upper,workdir=$work/$name/layer/work"
    for script in ray tensorboard; do
        sed "1s|.*|#!$HOME/metadist/bin/python|" "$bin/$script" >"$HOME/metadist/bin/$script"
        chmod +x "$HOME/metadist/bin/$script"
    done
    mkdir -p "$HOME/.config/pip"
    printf '[global]\nno-index = true\ndisable-pip-version-check = true\n' >"$HOME/.config/pip/pip.conf"
    echo 'export RAY_USAGE_STATS_ENABLED=0 AUTOSCALER_UPDATE_INTERVAL_S=1' >"$HOME/.bashrc"
fi
printf '%s\n' "HostKey $work/host_key" "PidFile $work/$name/sshd.pid" 'StrictModes no' 'UsePAM no' \
    'PermitRootLogin prohibit-password' >"$work/$name/sshd.conf"
"$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f "$work/$name/sshd.conf" &
touch "$work/$name/up"
wait
