# One host of its own (network, processes, /tmp/ray, home), a Ray cluster with token
# authentication on it, and a run started by `ray job submit` and one by `ray submit`.
# To be run by: unshare --net --mount --pid --fork --mount-proc --kill-child bash submit.sh ...
set -euo pipefail
work=$1 root=$2 bin=$3 flags=${*:4}

ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray /run/sshd "$work/ray" "$work/home"
mount --bind "$work/ray" /tmp/ray
home=$(getent passwd "$(id -u)" | cut -d: -f6) # ssh reads this one, not $HOME
python=$(dirname "$(dirname "$(readlink -f "$bin/python")")")
case $python in # Python and the checkout may lie below the home that is covered
"$home"/*) mkdir -p "$work/home/${python#"$home"/}" && mount --bind "$python" "$work/home/${python#"$home"/}" ;;
esac
case $root in
"$home"/*) mkdir -p "$work/home/${root#"$home"/}" && mount --bind "$root" "$work/home/${root#"$home"/}" ;;
esac
mount --rbind "$work/home" "$home"
export HOME=$home PATH=$bin:$PATH RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
export RAY_UP_enable_autoscaler_v2=0

mkdir -m 700 "$HOME/.ssh" "$HOME/.ray"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$HOME/.ray/auth_token")
cp "$HOME/.ray/auth_token" "$work/auth_token"
ssh-keygen -q -t ed25519 -N '' -f "$work/id"
ssh-keygen -q -t ed25519 -N '' -f "$work/host"
cp "$work/id.pub" "$HOME/.ssh/authorized_keys"
printf '%s\n' 'Port 2222' 'ListenAddress 127.0.0.1' "HostKey $work/host" "PidFile $work/sshd.pid" \
    'StrictModes no' 'UsePAM no' >"$work/sshd.conf"
"$(command -v sshd || echo /usr/sbin/sshd)" -f "$work/sshd.conf"

cat >"$work/cluster.yaml" <<END
cluster_name: submit
provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}
auth:
  ssh_user: $(id -un)
  ssh_private_key: $work/id
  ssh_proxy_command: "bash -c 'exec 3<>/dev/tcp/%h/2222; cat <&3 & cat >&3'"
file_mounts: {~/.ray/auth_token: $work/auth_token}
setup_commands:
  - echo 'export PATH=$bin:\$PATH RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token' >> ~/.bashrc
head_start_ray_commands:
  - ray stop
  - ray start --head --port=6379 --num-cpus=3 --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1
    --object-store-memory=200000000 --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands: []
END

cd "$work/user"
ray up -y "$work/cluster.yaml"
echo "== ray job submit"
ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
    metadist train $flags --executor ray --executor.num_workers 2 --run_dir "$work/runs/job"
echo "== ray submit"
cp ./*.py "$HOME" # beside the script
ray submit "$work/cluster.yaml" "$root/scripts/train.py" -- \
    $flags --executor ray --executor.num_workers 2 --run_dir "$work/runs/submit"
echo "== refused"
if ray submit "$work/cluster.yaml" "$root/scripts/train.py" -- $flags --run_dir "$work/runs/job"; then
    exit 1
fi
