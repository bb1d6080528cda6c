#!/usr/bin/env bash
# Trains to the end on a pod that may be taken away at any moment.
#
# usage: babysit.sh [--env FILE] [--dry_run] [--delete] [-- SETTINGS…]
#
# Makes the pod, sets it up, runs; when the pod is gone, all of it again, for as long as it
# takes. A failure is tried again too, until MAX_FAILURES happened in a row without a new
# checkpoint between them. A user's mistake ends it at once. It keeps no state of its own: break
# it off and start it anew at any time. --delete removes the pod once the run is done.
#
#   tpu_scripts/babysit.sh --delete 2>&1 | tee -a babysit.log

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local own=() delete='' word
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  parse ${own[@]+"${own[@]}"}
  for word in ${REST[@]+"${REST[@]}"}; do
    [[ $word == --delete ]] || die "$EXIT_MISTAKE" "unknown argument $word; see --help."
    delete=1
  done
  load_settings
  COMMON=(--env "$ENV_FILE" ${DRY_RUN:+--dry_run})
  RESULT_FILE=$(mktemp)
  export RESULT_FILE
  trap 'rm -f "$RESULT_FILE"' EXIT
  trap 'say "broken off; the run goes on, and babysit.sh takes it up again."; exit 130' INT TERM
  train "$@"
  if [[ $delete ]]; then "$SCRIPTS/delete.sh" "${COMMON[@]}" --yes; fi
}

train() {
  local code failures=0 taken=0 best=0 step
  while :; do
    code=0
    attempt "$@" || code=$?
    step=$(<"$RESULT_FILE")
    if ((${step:-0} > best)); then
      best=$step failures=0
    fi
    case $code in
      0)
        say "done at step $best; the pod was taken away $taken times."
        return
        ;;
      "$EXIT_MISTAKE") die "$EXIT_MISTAKE" "that will not mend itself; see above." ;;
      "$EXIT_AGAIN")
        taken=$((taken + 1))
        say "taken away for the ${taken}th time, at step $best; asking for the pod again."
        ;;
      *)
        failures=$((failures + 1))
        ((failures < MAX_FAILURES)) ||
          die "$EXIT_FAILED" "failed $failures times in a row without a step beyond $best."
        say "failed ($failures of $MAX_FAILURES in a row); trying again."
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Once through. A failure on a pod that is no longer there is not a failure of the run.
attempt() {
  local code=0
  : >"$RESULT_FILE"
  "$SCRIPTS/create.sh" "${COMMON[@]}" || return
  { "$SCRIPTS/setup.sh" "${COMMON[@]}" && "$SCRIPTS/run.sh" "${COMMON[@]}" "$@"; } || code=$?
  if ((code != 0 && code != EXIT_MISTAKE)) && [[ ! $DRY_RUN ]]; then
    local state
    state=$(pod_state) || state=UNKNOWN
    [[ $state == ACTIVE || $state == UNKNOWN ]] || code=$EXIT_AGAIN
  fi
  return "$code"
}

main "$@"
