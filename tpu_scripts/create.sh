#!/usr/bin/env bash
# Asks for a TPU pod and waits until it is there.
#
# usage: create.sh [--env FILE] [--dry_run] [--no_wait]
#
# What is asked for stands in the environment file (env.example explains it): one slice or
# several, on demand, spot, or from a reservation. A pod that is there already is kept, one
# that was taken away or refused is removed and asked for again.
#
#   tpu_scripts/create.sh
#   tpu_scripts/create.sh --env big.env --no_wait
#   tpu_scripts/create.sh --dry_run

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local wait=1 word
  parse "$@"
  for word in ${REST[@]+"${REST[@]}"}; do
    [[ $word == --no_wait ]] || die "$EXIT_MISTAKE" "unknown argument $word; see --help."
    wait=
  done
  load_settings
  if [[ $DRY_RUN ]]; then
    request
    return
  fi
  reach_active "$wait"
}

# The loop goes by what is there, so that it may be broken off and begun anew anywhere.
reach_active() {
  local wait=$1 state before=
  while :; do
    state=$(pod_state) || die "$EXIT_FAILED" "the pod's state cannot be learnt."
    [[ $state == "$before" ]] || say "$TPU_NAME: $state"
    before=$state
    case $state in
      ACTIVE)
        check_shape
        return
        ;;
      ABSENT) request || explain_refusal ;;
      FAILED | SUSPENDED | PREEMPTED)
        explain_state
        remove
        ;;
      CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES)
        [[ $wait ]] || return 0
        ;;
      SUSPENDING | DELETING) ;;
      *) die "$EXIT_FAILED" "$TPU_NAME is in state $state, which is not known here." ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

request() {
  queued create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" --async
  if ((NUM_SLICES == 1)); then
    COMMAND+=(--node-id="$TPU_NAME")
  else
    COMMAND+=(--node-count="$NUM_SLICES" --node-prefix="$TPU_NAME")
  fi
  case $PROVISIONING in
    spot) COMMAND+=(--spot) ;;
    reserved)
      if [[ $RESERVATION_PROJECT ]]; then
        COMMAND+=(--reservation-host-project="$RESERVATION_PROJECT")
      else
        COMMAND+=(--reserved)
      fi
      ;;
  esac
  if [[ $VALID_UNTIL ]]; then COMMAND+=(--valid-until-duration="$VALID_UNTIL"); fi
  if [[ $NETWORK ]]; then COMMAND+=(--network="$NETWORK"); fi
  if [[ $SUBNETWORK ]]; then COMMAND+=(--subnetwork="$SUBNETWORK"); fi
  if [[ $SERVICE_ACCOUNT ]]; then
    COMMAND+=(--service-account="$SERVICE_ACCOUNT"
      --scopes=https://www.googleapis.com/auth/cloud-platform)
  fi
  if [[ $INTERNAL_IPS ]]; then COMMAND+=(--internal-ips); fi
  REFUSAL=
  if [[ $DRY_RUN ]]; then
    change "${COMMAND[@]}"
  else
    REFUSAL=$("${COMMAND[@]}" 2>&1)
  fi
}

# A request that was not taken. One that somebody else made meanwhile is as good as ours.
explain_refusal() {
  case $REFUSAL in
    *ALREADY_EXISTS*) say "$TPU_NAME exists by now." ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*)
      die "$EXIT_FAILED" "no quota for $ACCELERATOR_TYPE ($PROVISIONING) in $ZONE of $PROJECT: ask" \
        "for more, or choose another ZONE or PROVISIONING. $(last_line "$REFUSAL")"
      ;;
    *PERMISSION_DENIED*)
      die "$EXIT_MISTAKE" "$PROJECT does not allow it: $(last_line "$REFUSAL")"
      ;;
    *INVALID_ARGUMENT*) die "$EXIT_MISTAKE" "$(last_line "$REFUSAL")" ;;
    *) die "$EXIT_FAILED" "$(last_line "$REFUSAL")" ;;
  esac
}

last_line() { sed '/^[[:space:]]*$/d' <<<"$1" | tail -n 1; }

# Why the queue gave up, in its own words.
explain_state() {
  queued describe "$TPU_NAME" '--format=value(state.failedData.error.message)'
  local reason
  reason=$(ask "${COMMAND[@]}") || return 0
  [[ -z $reason || $reason == ABSENT ]] || say "$reason"
}

remove() {
  queued delete "$TPU_NAME" --force --async --quiet
  "${COMMAND[@]}" >&2 || say "$TPU_NAME could not be removed yet."
}

# A pod of this name may be another one.
check_shape() {
  local node type
  for node in $(nodes); do
    type=$(ask gcloud compute tpus tpu-vm describe "$node" --zone="$ZONE" --project="$PROJECT" \
      '--format=value(acceleratorType.basename())') || return 0
    [[ -z $type || $type == "$ACCELERATOR_TYPE" ]] || die "$EXIT_MISTAKE" \
      "$node exists and is a $type, not a $ACCELERATOR_TYPE; take another TPU_NAME."
  done
}

main "$@"
