# shellcheck shell=bash
# What the scripts of this folder share; sourced by each, never run.
#
# Enters: the environment file and the options that every script takes. Leaves: variables that
# are checked, and functions to ask and to change a pod with. Exit codes are those of
# neo_jax.main: 0 done, 1 failed, 2 a user's mistake, 75 taken away: say it again.

set -euo pipefail

readonly EXIT_FAILED=1 EXIT_MISTAKE=2 EXIT_AGAIN=75
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly SCRIPTS

say() { printf '%s %s: %s\n' "$(date -u +%H:%M:%S)" "${0##*/}" "$*" >&2; }

# die CODE WORDS…
die() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

# The comment at a script's top is its help.
usage() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

# ------------------------------------------------------------------ options and settings

# parse "$@": takes --env, --dry_run and --help; the rest is left in REST.
parse() {
  ENV_FILE=${NEO_TPU_ENV:-pod.env}
  DRY_RUN=
  REST=()
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry_run) DRY_RUN=1 ;;
      --env)
        (($# > 1)) || die "$EXIT_MISTAKE" "--env wants a file."
        ENV_FILE=$2
        shift
        ;;
      --env=*) ENV_FILE=${1#--env=} ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
}

# Settings, their defaults, and what is wrong with them. `env.example` explains each.
load_settings() {
  [[ -r $ENV_FILE ]] || die "$EXIT_MISTAKE" \
    "$ENV_FILE cannot be read; copy $SCRIPTS/env.example there, or name another with --env."
  # shellcheck source=env.example disable=SC1091
  source "$ENV_FILE"
  : "${NUM_SLICES:=1}" "${PROVISIONING:=on-demand}" "${MOUNT:=/mnt/neo_jax}" "${RUN_NAME:=run}"
  : "${BUCKET:=}" "${NETWORK:=}" "${SUBNETWORK:=}" "${SERVICE_ACCOUNT:=}" "${VALID_UNTIL:=}"
  : "${RESERVATION_PROJECT:=}" "${INTERNAL_IPS:=}" "${SSH_THROUGH:=}" "${MAIN_FLAGS:=--coordinator auto}"
  : "${CONFIG:=}" "${OVERRIDES:=}" "${JOB_ENV:=}" "${PYTHON_VERSION:=3.11}" "${EXTRA:=tpu}"
  : "${POLL_SECONDS:=30}" "${MAX_FAILURES:=5}" "${PATIENCE:=10}" "${WORKDIR:=}"
  local key
  for key in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE; do
    [[ -n ${!key:-} ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no $key."
  done
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]{0,47}[a-z0-9])?$ ]] || die "$EXIT_MISTAKE" \
    "TPU_NAME=$TPU_NAME: take small letters, digits and hyphens, a letter first."
  [[ $RUN_NAME =~ ^[A-Za-z0-9._-]+$ ]] || die "$EXIT_MISTAKE" \
    "RUN_NAME=$RUN_NAME: take letters, digits, points, hyphens and underscores."
  for key in NUM_SLICES MAX_FAILURES PATIENCE; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || die "$EXIT_MISTAKE" "$key=${!key} must be positive."
  done
  [[ $PROVISIONING =~ ^(on-demand|spot|reserved)$ ]] || die "$EXIT_MISTAKE" \
    "PROVISIONING=$PROVISIONING must be on-demand, spot or reserved."
  [[ $SSH_THROUGH =~ ^(|iap|internal)$ ]] || die "$EXIT_MISTAKE" \
    "SSH_THROUGH=$SSH_THROUGH must be empty, iap or internal."
  : "${RUNTIME_VERSION:=$(default_runtime)}"
  [[ -n $RUNTIME_VERSION ]] || exit "$EXIT_MISTAKE"
  : "${WORKDIR:=$MOUNT/$RUN_NAME}"
}

# Source: cloud.google.com/tpu/docs/runtimes.
default_runtime() {
  case $ACCELERATOR_TYPE in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) say "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is lent through GKE only: see gke/." ;;
    *) say "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is unknown; examples: v4-32, v5litepod-64, v6e-8." ;;
  esac
}

# Devices that JAX will see, all slices together: chips, but cores of v2 and v3. The number
# in a name counts cores up to v5p, chips from v5e on.
expected_devices() {
  local number=${ACCELERATOR_TYPE##*-}
  case $ACCELERATOR_TYPE in
    v[23]-* | v5litepod-* | v6e-*) echo $((number * NUM_SLICES)) ;;
    *) echo $((number * NUM_SLICES / 2)) ;;
  esac
}

# ------------------------------------------------------------------------------- gcloud

# quoted WORDS…: as one would type them.
quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# change WORDS…: a command that changes something, or with --dry_run only its text.
change() {
  if [[ $DRY_RUN ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# queued VERB WORDS…: the arguments of a queued-resources command, left in COMMAND.
queued() {
  local verb=$1
  shift
  COMMAND=(gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE" --project="$PROJECT")
  if [[ $verb == ssh || $verb == scp ]]; then
    case $SSH_THROUGH in
      iap) COMMAND+=(--tunnel-through-iap) ;;
      internal) COMMAND+=(--internal-ip) ;;
    esac
  fi
}

# The nodes, one a slice; the names are those that the queue gives.
nodes() {
  if ((NUM_SLICES == 1)); then
    echo "$TPU_NAME"
    return
  fi
  local i
  for ((i = 0; i < NUM_SLICES; i++)); do echo "$TPU_NAME-$i"; done
}

# ask WORDS…: what a look prints; "ABSENT" where there is no such thing.
ask() {
  local errors out
  errors=$(mktemp)
  if out=$("$@" 2>"$errors"); then
    rm "$errors"
    echo "$out"
  elif grep -q NOT_FOUND "$errors"; then
    rm "$errors"
    echo ABSENT
  else
    cat "$errors" >&2
    rm "$errors"
    return 1
  fi
}

# Of the whole pod: ABSENT, a state of the queue's, or PREEMPTED where the queue still says
# ACTIVE but a slice is gone. Fails where that cannot be learnt.
pod_state() {
  local state node of_node
  queued describe "$TPU_NAME" '--format=value(state.state)'
  state=$(ask "${COMMAND[@]}") || return 1
  if [[ $state == ACTIVE ]]; then
    for node in $(nodes); do
      of_node=$(ask gcloud compute tpus tpu-vm describe "$node" --zone="$ZONE" \
        --project="$PROJECT" '--format=value(state)') || return 1
      [[ $of_node == READY ]] || state=PREEMPTED
    done
  fi
  echo "$state"
}

# Hosts of all slices together.
count_workers() {
  local node number total=0
  for node in $(nodes); do
    number=$(ask gcloud compute tpus tpu-vm describe "$node" --zone="$ZONE" \
      --project="$PROJECT" '--format=value(networkEndpoints.len())') || return 1
    [[ $number =~ ^[0-9]+$ ]] || return 1
    total=$((total + number))
  done
  echo "$total"
}

# on_all COMMAND: on every host. What it runs must not wait for other hosts: gcloud opens at
# most 64 connections at a time.
on_all() {
  queued ssh "$TPU_NAME" --node=all --worker=all --batch-size=all "--command=$1"
  change "${COMMAND[@]}"
}

# worker WORDS…: a command line for worker.sh on a host.
worker() { echo "bash neo_jax/tpu_scripts/worker.sh $(quoted "$@")"; }

# -------------------------------------------------------------------------------- jobs

# job_states JOB: a line "HOST STATE CODE STEP" for each host that answers.
job_states() {
  on_all "$(worker state "$1")" 2>/dev/null | sed -n 's/^neo_jax-state //p' || true
}

# verdict WORKERS <STATES: "running", "partly" (some hosts do not run it), "silent" (some do
# not answer), or the exit code of the job as a whole.
verdict() {
  awk -v workers="$1" '
    { seen++; count[$2]++; if ($2 == "ended") codes[$3]++ }
    END {
      if (seen < workers) print "silent"
      else if (count["running"] == seen) print "running"
      else if (count["running"] || count["absent"]) print "partly"
      else if (codes[2]) print 2
      else if (codes[0] == seen) print 0
      # 69: only lost its company; 134: JAX aborted it for that before it could say so.
      else if (codes[0] + codes[75] + codes[69] + codes[134] + count["lost"] == seen) print 75
      else print 1
    }'
}

# The largest step of a checkpoint among STATES.
step_of() { awk '$4 > step { step = $4 } END { print step + 0 }'; }

# runs_everywhere JOB: whether all hosts run it.
runs_everywhere() {
  local workers
  workers=$(count_workers) || die "$EXIT_FAILED" "the number of hosts cannot be learnt."
  [[ $(job_states "$1" | verdict "$workers") == running ]]
}

# run_job JOB WORKDIR COMMAND…: starts it on every host, or joins it where it runs already;
# waits; exits with its code. The last step of a checkpoint is left in STEP.
run_job() {
  local job=$1 workdir=$2 workers states word partly=0 silent=0 state
  shift 2
  STEP=0
  if [[ $DRY_RUN ]]; then
    on_all "$(worker start "$job" "$workdir" "$@")"
    on_all "$(worker state "$job")"
    return 0
  fi
  workers=$(count_workers) || return "$EXIT_AGAIN"
  states=$(job_states "$job")
  word=$(verdict "$workers" <<<"$states")
  if [[ $word == running ]]; then
    say "$job runs on all $workers hosts already; waiting for it."
  else
    on_all "$(worker start "$job" "$workdir" "$@")" >&2 || {
      say "$job did not start on every host."
      on_all "$(worker stop "$job")" >&2 || true
      return "$EXIT_FAILED"
    }
    say "$job started on $workers hosts."
  fi
  while :; do
    sleep "$POLL_SECONDS"
    states=$(job_states "$job")
    word=$(verdict "$workers" <<<"$states")
    STEP=$(step_of <<<"$states")
    case $word in
      running) partly=0 silent=0 ;;
      partly)
        # The other hosts notice by themselves within minutes; who does not is told.
        partly=$((partly + 1))
        if ((partly == PATIENCE)); then
          say "some hosts ended and others did not; ending $job on all."
          on_all "$(worker stop "$job")" >&2 || true
        fi
        ((partly < 3 * PATIENCE)) || return "$EXIT_FAILED"
        ;;
      silent)
        silent=$((silent + 1))
        state=$(pod_state) || state=UNKNOWN
        if [[ $state != ACTIVE && $state != UNKNOWN ]]; then
          say "the pod is $state."
          return "$EXIT_AGAIN"
        fi
        if ((silent == PATIENCE)); then
          say "hosts do not answer, though the pod is $state."
          return "$EXIT_FAILED"
        fi
        ;;
      *)
        say "$job ended with $word after step $STEP."
        return "$word"
        ;;
    esac
  done
}
