#!/usr/bin/env bash
# Tells how the pod, its hosts and the run are.
#
# usage: status.sh [--env FILE] [--dry_run]
#
# A line for the pod, one for each slice, one for each host with its job's state and the newest
# checkpoint's step, and the last line of the first host's log.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local state node
  parse "$@"
  ((${#REST[@]} == 0)) || die "$EXIT_MISTAKE" "unknown argument ${REST[0]}; see --help."
  load_settings
  if [[ $DRY_RUN ]]; then
    on_all "$(worker state "$RUN_NAME")"
    last_line
    return
  fi
  state=$(pod_state) || die "$EXIT_FAILED" "the pod's state cannot be learnt."
  echo "pod $TPU_NAME ($ACCELERATOR_TYPE × $NUM_SLICES, $PROVISIONING): $state"
  [[ $state == ACTIVE ]] || return 0
  for node in $(nodes); do
    echo "slice $node: $(ask gcloud compute tpus tpu-vm describe "$node" --zone="$ZONE" \
      --project="$PROJECT" '--format=value(state,health)')"
  done
  job_states "$RUN_NAME" | while read -r host what code step; do
    [[ $code == - ]] || what="$what with $code"
    echo "host $host: $RUN_NAME is $what; newest checkpoint: step $step"
  done
  last_line 2>/dev/null || true
}

last_line() {
  queued ssh "$TPU_NAME" --node=0 --worker=0 "--command=$(worker tail "$RUN_NAME" 1)"
  change "${COMMAND[@]}"
}

main "$@"
