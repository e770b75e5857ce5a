#!/usr/bin/env bash
# stop.sh DIR: end the cluster that start.sh DIR started; every process by its own pid, from its own pid file.
set -uo pipefail
[ $# -eq 1 ] || { sed -n 2p "$0"; exit 2; }
DIR=$(cd "$1" && pwd -P) || exit 2
if [ -s "$DIR/env.sh" ] && [ -s "$DIR/run/slurmctld.pid" ] && kill -0 "$(cat "$DIR/run/slurmctld.pid")" 2>/dev/null; then
  . "$DIR/env.sh"
  for j in $(timeout 10 squeue -h -o %A | sort -u); do timeout 10 scancel "$j"; done
  for _ in $(seq 200); do [ -z "$(timeout 10 squeue -h -o %A)" ] && break; sleep 0.1; done
fi
# end PIDFILE NAME: only if that pid still runs that program
end() {
  local pid; pid=$(cat "$1" 2>/dev/null) || return 0
  [ -n "$pid" ] && [ -d "/proc/$pid" ] || { rm -f "$1"; return 0; }
  case $(tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null) in *"$2"*) ;; *) echo "stop.sh: pid $pid of $1 is not $2: left alone" >&2; return 0 ;; esac
  kill -TERM "$pid"
  for _ in $(seq 100); do [ -d "/proc/$pid" ] || break; case $(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null) in Z) break;; esac; sleep 0.1; done
  if [ -d "/proc/$pid" ] && [ "$(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null)" != Z ]; then
    echo "stop.sh: $2 ($pid) ignored SIGTERM for 10 s; SIGKILL" >&2; kill -KILL "$pid"
  fi
  rm -f "$1"
}
for p in "$DIR"/run/slurmd.*.pid; do [ -e "$p" ] && end "$p" slurmd; done
[ -e "$DIR/run/slurmctld.pid" ] && end "$DIR/run/slurmctld.pid" slurmctld
[ -e "$DIR/run/munged.pid" ] && end "$DIR/run/munged.pid" munged
if [ -s "$DIR/run/netns" ]; then while read -r n; do ip netns del "$n"; done < "$DIR/run/netns"; rm -f "$DIR/run/netns"; fi
if [ -s "$DIR/run/bridge" ]; then ip link del "$(cat "$DIR/run/bridge")"; rm -f "$DIR/run/bridge"; fi
# what outlived it: steps of a dead slurmd, and processes that left their job by setsid and a double fork (without
# cgroups Slurm cannot follow those). Known by this cluster's SLURM_CONF and a SLURM_JOB_ID in their environment.
mine=" $$ "; q=$$; while q=$(awk '/^PPid:/{print $2}' "/proc/$q/status" 2>/dev/null) && [ "${q:-0}" -gt 1 ]; do mine+="$q "; done
left=()
for d in /proc/[0-9]*; do
  q=${d#/proc/}; case $mine in *" $q "*) continue ;; esac
  e=$(tr '\0' '\n' 2>/dev/null < "$d/environ") || continue
  grep -qx "SLURM_CONF=$DIR/etc/slurm.conf" <<<"$e" || continue
  case $(tr '\0' ' ' < "$d/cmdline" 2>/dev/null) in slurmstepd:*) ;; *) grep -q '^SLURM_JOB_ID=' <<<"$e" || continue ;; esac
  left+=("$q"); echo "stop.sh: left over: $q $(tr '\0' ' ' < "$d/cmdline" 2>/dev/null | cut -c1-60)" >&2
done
if [ ${#left[@]} -gt 0 ]; then kill -TERM "${left[@]}" 2>/dev/null; sleep 1; kill -KILL "${left[@]}" 2>/dev/null; fi
exit 0
