#!/usr/bin/env bash
# A SLURM cluster of one node, this machine, to try sweeps on. From Debian's packages; needs root; no accounting.
#
#   scripts/slurm_local.sh start     # munged, slurmctld and slurmd, in a folder of their own; prints the SLURM_CONF to export
#   scripts/slurm_local.sh stop      # ends these three and nothing else
#
# The folder is $SLURM_LOCAL, default /tmp/slurm_local.
set -euo pipefail

ROOT=${SLURM_LOCAL:-/tmp/slurm_local}
PROGRAMS=(munged slurmctld slurmd)

need() {
    local missing=()
    for program in "${PROGRAMS[@]}" sbatch; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if ((${#missing[@]})); then
        echo "slurm_local: ${missing[*]} not found; install them with: apt-get install slurm-wlm munge" >&2
        exit 2
    fi
    if ((EUID != 0)); then
        echo "slurm_local: needs root, since slurmctld and slurmd run jobs as their users" >&2
        exit 2
    fi
}

alive() { # whether the process whose number is in a file is there
    [[ -s $1 ]] && kill -0 "$(cat "$1")" 2>/dev/null
}

await() { # await SECONDS WHAT COMMAND...: until the command succeeds
    local seconds=$1 what=$2
    shift 2
    for ((i = 0; i < 10 * seconds; i++)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "slurm_local: $what did not come up in $seconds s; see the logs in $ROOT" >&2
    exit 1
}

start() {
    need
    if alive "$ROOT/slurmctld.pid" && alive "$ROOT/slurmd.pid"; then
        echo "export SLURM_CONF=$ROOT/slurm.conf"
        return
    fi
    mkdir -p "$ROOT"/{state,spool,munge}
    chmod 755 "$ROOT"
    dd if=/dev/urandom of="$ROOT/munge/key" bs=1024 count=1 status=none
    chown -R munge: "$ROOT/munge"
    chmod 755 "$ROOT/munge"
    chmod 400 "$ROOT/munge/key"
    setpriv --reuid=munge --regid=munge --clear-groups munged --force --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" \
        --pid-file="$ROOT/munge/munged.pid" --log-file="$ROOT/munge/log" --seed-file="$ROOT/munge/seed"
    local memory
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat >"$ROOT/slurm.conf" <<EOF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.pid
SlurmctldLogFile=$ROOT/slurmctld.log
SlurmdLogFile=$ROOT/slurmd.log
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool
MailProg=/bin/true
ReturnToService=2
KillWait=30
MinJobAge=60
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    export SLURM_CONF=$ROOT/slurm.conf
    slurmctld -f "$SLURM_CONF"
    await 20 slurmctld scontrol ping
    slurmd -f "$SLURM_CONF"
    await 20 "the node" bash -c 'sinfo --noheader --format=%t | grep -qx idle'
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    for file in "$ROOT"/slurmd.pid "$ROOT"/slurmctld.pid "$ROOT"/munge/munged.pid; do
        if alive "$file"; then
            local pid
            pid=$(cat "$file")
            kill "$pid"
            for ((i = 0; i < 100; i++)); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.1
            done
        fi
    done
    echo "slurm_local: stopped; logs are in $ROOT"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    *)
        echo "usage: $0 start|stop" >&2
        exit 2
        ;;
esac
