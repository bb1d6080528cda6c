#!/usr/bin/env bash
# Adds the TPU slices to a GKE cluster, one node pool each.
#
# usage: gke/create.sh [--env FILE] [--dry_run]
#
# The cluster must be there, with the JobSet controller and the Cloud Storage FUSE driver. A pool
# that is there already is kept.
#
#   tpu_scripts/gke/create.sh --env gke.env

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local pool status refusal
  parse "$@"
  none ${REST[@]+"${REST[@]}"}
  load_cluster
  for pool in $(pools); do
    request "$pool"
    if [[ $DRY_RUN ]]; then
      change "${COMMAND[@]}"
      continue
    fi
    status=$(pool_status "$pool") || die "$EXIT_FAILED" "the state of $pool cannot be learnt."
    if [[ $status != ABSENT ]]; then
      say "$pool is there already: $status"
      continue
    fi
    refusal=$("${COMMAND[@]}" 2>&1) || case $refusal in
      *ALREADY_EXISTS* | *"Already exists"*) say "$pool exists by now." ;;
      *[Qq]uota* | *RESOURCE_EXHAUSTED* | *GCE_STOCKOUT*)
        die "$EXIT_FAILED" "no room for $pool in $ZONE: $(tail -n 1 <<<"$refusal")"
        ;;
      *) die "$EXIT_FAILED" "$(tail -n 1 <<<"$refusal")" ;;
    esac
  done
}

pool_status() {
  local out
  if out=$(gcloud container node-pools describe "$1" --cluster="$CLUSTER" \
    --location="$LOCATION" --project="$PROJECT" '--format=value(status)' 2>&1); then
    echo "$out"
  elif grep -qi 'not found\|NOT_FOUND\|code=404' <<<"$out"; then
    echo ABSENT
  else
    echo "$out" >&2
    return 1
  fi
}

request() {
  COMMAND=(gcloud container node-pools create "$1" --cluster="$CLUSTER" --location="$LOCATION"
    --node-locations="$ZONE" --project="$PROJECT" --machine-type="$MACHINE"
    --num-nodes="$HOSTS" --scopes=https://www.googleapis.com/auth/cloud-platform)
  if ((HOSTS > 1)); then COMMAND+=(--tpu-topology="$TOPOLOGY"); fi
  case $PROVISIONING in
    spot) COMMAND+=(--spot) ;;
    reserved)
      [[ $RESERVATION ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no RESERVATION."
      COMMAND+=(--reservation-affinity=specific --reservation="$RESERVATION")
      ;;
  esac
}

main "$@"
