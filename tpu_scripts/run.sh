#!/usr/bin/env bash
# Trains on every host of the pod, waits, and ends as the training ends.
#
# usage: run.sh [--env FILE] [--dry_run] [--no_wait] [--stop] [-- SETTINGS…]
#
# Where the run goes on already, it is only waited for. Where one host dropped out, what is left
# is ended and all start anew, from the newest checkpoint. Breaking this script off leaves the
# run alone. Logs stay on the hosts (fetch.sh). Exit code: 0 done, 1 failed, 2 a user's mistake,
# 75 the pod was taken away, and everything up to the last checkpoint is saved.
#
#   tpu_scripts/run.sh
#   tpu_scripts/run.sh -- --config.train.num_steps=1000
#   tpu_scripts/run.sh --stop          save and end it

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local own=() wait=1 stop='' state code=0
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  (($# == 0)) || shift
  parse ${own[@]+"${own[@]}"}
  local word
  for word in ${REST[@]+"${REST[@]}"}; do
    case $word in
      --no_wait) wait= ;;
      --stop) stop=1 ;;
      *) die "$EXIT_MISTAKE" "unknown argument $word; see --help." ;;
    esac
  done
  load_settings
  if [[ $stop ]]; then
    on_all "$(worker stop "$RUN_NAME")" >&2
    return
  fi
  [[ $CONFIG ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no CONFIG."
  [[ $BUCKET || $WORKDIR != "$MOUNT"/* ]] || die "$EXIT_MISTAKE" \
    "$ENV_FILE sets neither BUCKET nor WORKDIR; checkpoints want a folder that all hosts see."
  if [[ ! $DRY_RUN ]]; then
    state=$(pod_state) || die "$EXIT_FAILED" "the pod's state cannot be learnt."
    [[ $state == ACTIVE ]] || die "$EXIT_AGAIN" "$TPU_NAME is $state; create.sh makes it."
  fi
  training "$@"
  if [[ ! $wait ]]; then
    if [[ ! $DRY_RUN ]] && runs_everywhere "$RUN_NAME"; then
      say "$RUN_NAME runs already."
      return
    fi
    on_all "$(worker start "$RUN_NAME" "$WORKDIR" "${TRAINING[@]}")" >&2
    return
  fi
  run_job "$RUN_NAME" "$WORKDIR" "${TRAINING[@]}" || code=$?
  if [[ ${RESULT_FILE:-} ]]; then echo "$STEP" >"$RESULT_FILE"; fi # read by babysit.sh
  ((code == 0)) || [[ $code == "$EXIT_AGAIN" ]] || on_all "$(worker tail "$RUN_NAME" 3)" >&2 || true
  return "$code"
}

# The command of a host, environment first.
training() {
  local environment flags overrides
  # These hold several words each.
  read -r -a environment <<<"$JOB_ENV"
  read -r -a flags <<<"$MAIN_FLAGS"
  read -r -a overrides <<<"$OVERRIDES"
  TRAINING=(
    ${environment[@]+"${environment[@]}"} --
    python -m neo_jax.main --config "$CONFIG" --workdir "$WORKDIR"
    ${flags[@]+"${flags[@]}"} ${overrides[@]+"${overrides[@]}"} "$@"
  )
}

main "$@"
