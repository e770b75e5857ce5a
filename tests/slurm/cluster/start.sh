#!/usr/bin/env bash
# start.sh DIR [name=value ...]: a real Slurm cluster on this machine, all its files under DIR, without systemd or cgroups.
#
#   nodes=2 cpus=96 mem=128000 gpus=8   virtual nodes n1..nN and what each claims to have
#                                    (GPUs are device files that do nothing: Slurm discards one without a file)
#   ns=net     a host name, network namespace and address per node, on a bridge with no uplink (root only)
#   ns=uts     a host name per node; all of them are 127.0.0.1, a port each
#   grace=20 credexpire=5 (Slurm ignores less; a requeued job waits that long) base=17000
#
# Needs the Debian packages slurmctld slurmd slurm-client munge. Then: . DIR/env.sh; sinfo. Stop: stop.sh DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"; DIR=$(cd "$1" && pwd -P); shift
nodes=2 cpus=96 mem=128000 gpus=8 ns=uts killwait=5 grace=20 credexpire=5 base=17000
for kv in "$@"; do
  case $kv in
    nodes=*|cpus=*|mem=*|gpus=*|ns=*|killwait=*|grace=*|credexpire=*|base=*) declare "${kv%%=*}=${kv#*=}" ;;
    *) echo "start.sh: unknown setting '$kv'" >&2; exit 2 ;;
  esac
done
PATH=$PATH:/usr/sbin:/sbin
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
trap '[ $? = 0 ] || "$here/stop.sh" "$DIR" >&2' EXIT
umask 022
mkdir -p "$DIR"/{etc,run,state,log,dev}
chmod 755 "$DIR" "$DIR"/run
me=$(id -un); short=$(hostname -s); list=n[1-$nodes]

# Not 127.0.1.K with ns=uts: srun would listen there, but its packets leave from 127.0.0.1 and slurmstepd calls that back.
if [ "$ns" = net ]; then ctl=10.213.0.254; addr() { echo "10.213.0.$1"; }; else ctl=127.0.0.1; addr() { echo 127.0.0.1; }; fi
{ echo "127.0.0.1 localhost"; echo "$ctl $short ctl"
  for ((i=1;i<=nodes;i++)); do echo "$(addr "$i") n$i"; done; } > "$DIR/etc/hosts"

# --- slurm.conf, gres.conf
: > "$DIR/etc/gres.conf"
types=; gres=
if [ "$gpus" -gt 0 ]; then
  types=gpu; gres=" Gres=gpu:$gpus"; device=$DIR/dev/nvidia
  for ((k=0;k<gpus;k++)); do
    [ -c "$device$k" ] || mknod -m 666 "$device$k" c 1 3 2>/dev/null || { device=/dev/tty; break; }
  done
  echo "NodeName=$list Name=gpu File=${device}[0-$((gpus-1))]" > "$DIR/etc/gres.conf"
fi
lines=
for ((i=1;i<=nodes;i++)); do
  lines+="NodeName=n$i NodeHostname=n$i NodeAddr=$(addr "$i") Port=$((base+i)) CPUs=$cpus RealMemory=$mem$gres State=UNKNOWN"$'\n'
done
template=$(cat "$here/slurm.conf")
sub() { template=${template//"@$1@"/$2}; }
sub DIR "$DIR"; sub CTLHOST "$short"; sub CTLADDR "$ctl"; sub USER "$me"; sub NODES "$list"
sub CTLPORT "$base"; sub DPORT "$((base+1))"; sub SRUNPORTS "$((base+100))-$((base+899))"
# A node's namespace has only its own address, and srun must be reachable from all nodes: no NoInAddrAny there.
if [ "$ns" = net ]; then sub COMM NoCtldInAddrAny; else sub COMM NoInAddrAny,NoCtldInAddrAny; fi
sub CREDEXPIRE "$credexpire"; sub KILLWAIT "$killwait"; sub GRACE "$grace"; sub GRESTYPES "$types"; sub NODELINES "$lines"
printf '%s\n' "$template" | grep -v '^GresTypes=$' > "$DIR/etc/slurm.conf"
printf 'export SLURM_CONF="%s"\nexport PATH="$PATH:/usr/sbin:/sbin"\n' "$DIR/etc/slurm.conf" > "$DIR/env.sh"
. "$DIR/env.sh"

# --- munge: own key, own socket
[ -s "$DIR/etc/munge.key" ] || mungekey --create --keyfile="$DIR/etc/munge.key"
chmod 600 "$DIR/etc/munge.key"
munged --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.socket" --pid-file="$DIR/run/munged.pid" \
       --log-file="$DIR/log/munged.log" --seed-file="$DIR/state/munge.seed" --num-threads=4 2>>"$DIR/log/munged.start.log"

# --- network namespaces: a bridge in this namespace, no uplink, no route out
if [ "$ns" = net ]; then
  br=gilbr$((base % 100000))
  ip link add "$br" type bridge; ip addr add $ctl/24 dev "$br"; ip link set "$br" up
  echo "$br" > "$DIR/run/bridge"
  for ((i=1;i<=nodes;i++)); do
    name=$br-n$i
    ip netns add "$name"; echo "$name" >> "$DIR/run/netns"
    ip link add "$br-$i" type veth peer name eth0 netns "$name"
    ip link set "$br-$i" master "$br" up
    ip -n "$name" link set lo up
    ip -n "$name" addr add "$(addr "$i")/24" dev eth0
    ip -n "$name" link set eth0 up
  done
fi

# --- daemons. in_ns NAME cmd...: own host name, own /etc/hosts
userns=(); [ "$(id -u)" = 0 ] || userns=(--user --map-current-user --keep-caps)
in_ns() {
  local name=$1 enter=(); shift
  [ "$ns" != net ] || enter=(nsenter "--net=/run/netns/$br-$name" --)
  # shellcheck disable=SC2016  # the inner shell expands them
  "${enter[@]}" unshare "${userns[@]}" --uts --mount -- \
    sh -c 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"' "$name" "$DIR/etc/hosts" "$@"
}
ctld=(slurmctld -f "$SLURM_CONF")   # it binds to what its own host name resolves to
# shellcheck disable=SC2016
[ "$ns" != net ] || ctld=(unshare --mount -- sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$DIR/etc/hosts" "${ctld[@]}")
"${ctld[@]}" >>"$DIR/log/slurmctld.start.log" 2>&1 ||
  { echo "start.sh: slurmctld did not start:" >&2; tail -n 5 "$DIR/log/slurmctld.start.log" >&2; exit 5; }
for _ in 1 2 3 4 5; do sleep 0.02; alive "$DIR/run/slurmctld.pid" && break; done
alive "$DIR/run/slurmctld.pid" || { echo "start.sh: slurmctld ended:" >&2; tail -n 3 "$DIR/log/slurmctld.log" >&2; exit 5; }
for ((i=1;i<=nodes;i++)); do
  in_ns "n$i" slurmd -f "$SLURM_CONF" -N "n$i" >>"$DIR/log/slurmd.n$i.start.log" 2>&1 ||
    { echo "start.sh: slurmd n$i did not start:" >&2; tail -n 5 "$DIR/log/slurmd.n$i.start.log" "$DIR/log/slurmd.n$i.log" >&2; exit 5; }
done

# --- wait until every node is idle
n=0
for _ in $(seq 150); do
  n=$(timeout 5 sinfo -h -N -p batch -t idle -o %N 2>/dev/null | sort -u | wc -l) || n=0
  [ "$n" -lt "$nodes" ] || { trap - EXIT; exit 0; }
  sleep 0.1
done
echo "start.sh: only $n of $nodes nodes came up; see $DIR/log" >&2
exit 5
