#!/usr/bin/env bash
# Gives the pod back: its slices, its hosts' disks, its place in the queue. The bucket stays.
#
# usage: delete.sh [--env FILE] [--dry_run] [--yes]
#
# Asks first, unless --yes is said. A run that is still going is told to save. A pod that is
# gone already is no error.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local yes='' word answer state
  parse "$@"
  for word in ${REST[@]+"${REST[@]}"}; do
    [[ $word == --yes ]] || die "$EXIT_MISTAKE" "unknown argument $word; see --help."
    yes=1
  done
  load_settings
  if [[ ! $DRY_RUN ]]; then
    state=$(pod_state) || die "$EXIT_FAILED" "the pod's state cannot be learnt."
    case $state in
      ABSENT | DELETING)
        say "$TPU_NAME is $state."
        return
        ;;
    esac
    if [[ ! $yes ]]; then
      read -r -p "Delete $TPU_NAME ($ACCELERATOR_TYPE × $NUM_SLICES) in $ZONE of $PROJECT? [y/N] " answer
      [[ $answer == [yY]* ]] || die "$EXIT_FAILED" "nothing was deleted."
    fi
    if [[ $state == ACTIVE ]]; then
      on_all "$(worker stop "$RUN_NAME")" >&2 || say "not every host could be told to save."
    fi
  fi
  queued delete "$TPU_NAME" --force --async --quiet
  change "${COMMAND[@]}"
}

main "$@"
