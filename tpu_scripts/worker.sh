#!/usr/bin/env bash
# What happens on a host of the pod; the other scripts call this one over ssh.
#
# usage: worker.sh install DIGEST PYTHON_VERSION EXTRA   environment and package, once a digest
#        worker.sh mount BUCKET FOLDER                   a bucket as a folder
#        worker.sh versions                              one line, to compare between hosts
#        worker.sh start JOB WORKDIR [KEY=VALUE…] -- COMMAND…   detached; ends what ran before
#        worker.sh state JOB                             one line: running, ended, lost, absent
#        worker.sh stop JOB                              SIGTERM first, so that it can save
#        worker.sh tail JOB LINES                        the end of its log
#
# A job lives in ~/neo_jax_jobs/JOB: log (all starts, one after the other), pid, exit_code.

set -euo pipefail

JOBS=${NEO_JAX_JOBS:-$HOME/neo_jax_jobs}
VENV=${NEO_JAX_VENV:-$HOME/neo_jax_venv}
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HOST=${HOSTNAME:-$(hostname)}
GRACE_SECONDS=${NEO_JAX_GRACE_SECONDS:-120}

die() {
  echo "neo_jax: $HOST: $*" >&2
  exit 1
}

# --------------------------------------------------------------------------- installing

install() {
  local digest=$1 python_version=$2 extra=$3
  if [[ -f $VENV/digest && $(<"$VENV/digest") == "$digest" ]]; then
    echo "neo_jax: $HOST: installed already"
    return
  fi
  rm -f "$VENV/digest"
  # The hosts' own Python is 3.10, too old; uv brings another without touching it.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x $VENV/bin/python ]] || uv venv --quiet --python "$python_version" "$VENV"
  VIRTUAL_ENV=$VENV uv pip install --quiet \
    --constraint "$CODE/requirements/constraints.txt" --editable "${CODE}[$extra]"
  echo "$digest" >"$VENV/digest"
  echo "neo_jax: $HOST: installed"
}

mount_bucket() {
  local bucket=$1 folder=$2
  if mountpoint --quiet "$folder"; then
    echo "neo_jax: $HOST: $folder is mounted already"
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    # Source: cloud.google.com/storage/docs/cloud-storage-fuse/install.
    local release key=/usr/share/keyrings/cloud.google.asc
    release=gcsfuse-$(lsb_release -c -s)
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $release main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  # Nothing that other hosts wrote is answered from a memory of how it was.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" "$folder"
  echo "neo_jax: $HOST: mounted $bucket at $folder"
}

versions() {
  local digest=none packages
  [[ -f $VENV/digest ]] && digest=$(<"$VENV/digest")
  packages=$("$VENV/bin/python" -c '
import hashlib, importlib.metadata, platform
found = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
named = [p for p in found if p.split("==")[0] in ("jax", "jaxlib", "libtpu")]
print("python==" + platform.python_version(), *named,
      "all:" + hashlib.sha256("\n".join(found).encode()).hexdigest()[:12], sep=",")')
  echo "neo_jax-versions $HOST code:$digest,$packages"
}

# ---------------------------------------------------------------------------------- jobs

# When a process began, in ticks: a number may be given to another process later on.
birth() { awk '{ print $22 }' "/proc/$1/stat" 2>/dev/null; }

# is_running FOLDER: whether the job's process is there, and is the one that was started.
is_running() {
  local pid born
  [[ -f $1/pid ]] || return 1
  read -r pid born <"$1/pid"
  [[ $(birth "$pid") == "$born" ]]
}

start() {
  local job=$1 workdir=$2 folder=$JOBS/$1 other pid environment=()
  shift 2
  while [[ $1 != -- ]]; do
    environment+=("$1")
    shift
  done
  shift
  set -- "${@//%HOST%/${JAX_PROCESS_ID:-0}}"
  for other in "$JOBS"/*/; do
    [[ -d $other ]] && stop "$(basename "$other")"
  done
  refuse_foreign
  mkdir -p "$folder"
  rm -f "$folder/exit_code" "$folder/pid"
  echo "$workdir" >"$folder/workdir"
  echo "=== $(date -u +%Y-%m-%dT%H:%M:%SZ) $HOST: $*" >>"$folder/log"
  cd "$CODE" # where a path such as experiments/mine.py begins
  # A session of its own: it outlives the connection, and one signal reaches all of it.
  env ${environment[@]+"${environment[@]}"} PATH="$VENV/bin:$PATH" \
    setsid bash "$CODE/tpu_scripts/worker.sh" job "$folder" "$@" \
    </dev/null >>"$folder/log" 2>&1 &
  pid=$!
  echo "$pid $(birth "$pid")" >"$folder/pid"
  echo "neo_jax: $HOST: started $job as process $pid"
}

# What a job's own process does: run the command, and note how it ended.
job() {
  local folder=$1 code=0
  shift
  # A signal to the group is for the command; this shell has to outlive it. Not by `wait`, which
  # a signal ends with a code of its own: a command in the foreground is waited for to its end.
  trap : TERM
  "$@" || code=$?
  echo "=== ended with $code"
  echo "$code" >"$folder/exit_code.partial"
  mv "$folder/exit_code.partial" "$folder/exit_code"
}

# A TPU serves one process; one that is not ours is named, not ended.
refuse_foreign() {
  local devices=() held
  mapfile -t devices < <(compgen -G '/dev/accel*'; compgen -G '/dev/vfio/[0-9]*')
  ((${#devices[@]})) || return 0
  held=$(sudo fuser "${devices[@]}" 2>/dev/null | xargs) || return 0
  [[ -z $held ]] || die "the TPU is held by process $held; end it, then say this again."
}

state() {
  local folder=$JOBS/$1 workdir step=0 what=absent code=-
  if [[ -f $folder/exit_code ]]; then
    what=ended code=$(<"$folder/exit_code")
  elif is_running "$folder"; then
    what=running
  elif [[ -f $folder/pid ]]; then
    what=lost # the host started anew, or the process was killed with its shell
  fi
  if [[ -f $folder/workdir ]]; then
    workdir=$(<"$folder/workdir")
    step=$({ find "$workdir/checkpoints" -mindepth 1 -maxdepth 1 -regex '.*/[0-9]+' \
      -printf '%f\n' 2>/dev/null || true; } | sort -n | tail -n 1)
  fi
  echo "neo_jax-state $HOST $what $code ${step:-0}"
}

stop() {
  local folder=$JOBS/$1 pid waited=0
  is_running "$folder" || return 0
  read -r pid _ <"$folder/pid"
  kill -TERM -- "-$pid" 2>/dev/null || true
  while is_running "$folder" && ((waited < GRACE_SECONDS * 10)); do
    sleep 0.1
    waited=$((waited + 1))
  done
  if is_running "$folder"; then
    kill -KILL -- "-$pid" 2>/dev/null || true
    echo "neo_jax: $HOST: killed $1, which did not end within $GRACE_SECONDS s" >&2
  else
    echo "neo_jax: $HOST: stopped $1"
  fi
}

case ${1:-} in
  install) install "${@:2:3}" ;;
  mount) mount_bucket "$2" "$3" ;;
  versions) versions ;;
  start) start "${@:2}" ;;
  job) job "${@:2}" ;; # by start
  state) state "$2" ;;
  stop) stop "$2" ;;
  tail) tail -n "$3" "$JOBS/$2/log" ;;
  *) sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
