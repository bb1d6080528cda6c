#!/usr/bin/env bash
# Ends the job on GKE and, where --pools is said, gives the slices back. Bucket and cluster stay.
#
# usage: gke/delete.sh [--env FILE] [--dry_run] [--pools]
#
# The job gets SIGTERM and the time to save. What is gone already is no error.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local with_pools='' word pool out
  parse "$@"
  for word in ${REST[@]+"${REST[@]}"}; do
    [[ $word == --pools ]] || die "$EXIT_MISTAKE" "unknown argument $word; see --help."
    with_pools=1
  done
  load_cluster
  change kubectl delete jobset "$TPU_NAME" --ignore-not-found
  [[ $with_pools ]] || return 0
  for pool in $(pools); do
    COMMAND=(gcloud container node-pools delete "$pool" --cluster="$CLUSTER"
      --location="$LOCATION" --project="$PROJECT" --quiet)
    if [[ $DRY_RUN ]]; then
      change "${COMMAND[@]}"
    elif ! out=$("${COMMAND[@]}" 2>&1); then
      grep -qi 'not found\|NOT_FOUND\|code=404' <<<"$out" ||
        die "$EXIT_FAILED" "$(tail -n 1 <<<"$out")"
    fi
  done
}

main "$@"
