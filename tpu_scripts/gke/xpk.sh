#!/usr/bin/env bash
# Prints the commands of XPK that do what create.sh and run.sh of this folder do.
#
# usage: gke/xpk.sh [--env FILE] [-- SETTINGS…]
#
# For clusters that XPK manages: it makes the node pools and the JobSet itself. Look the commands
# over, then run them; XPK counts restarts, and takes the environment from --env.
#
#   tpu_scripts/gke/xpk.sh --env gke.env

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local own=() environment word command capacity
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  (($# == 0)) || shift
  parse ${own[@]+"${own[@]}"}
  none ${REST[@]+"${REST[@]}"}
  load_cluster
  for word in IMAGE CONFIG; do
    [[ ${!word} ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no $word, which XPK needs."
  done
  case $PROVISIONING in
    spot) capacity=--spot ;;
    reserved) capacity=--reservation=$RESERVATION ;;
    *) capacity=--on-demand ;;
  esac
  local common=(--cluster "$CLUSTER" --tpu-type="$ACCELERATOR_TYPE" --num-slices="$NUM_SLICES"
    --zone="$ZONE" --project="$PROJECT")
  quoted xpk cluster create "${common[@]}" "$capacity"
  command="python -m neo_jax.main --config $(quoted "$CONFIG") --workdir $(quoted "$WORKDIR")"
  command+="${MAIN_FLAGS:+ $MAIN_FLAGS}${OVERRIDES:+ $OVERRIDES}"
  if (($#)); then command+=" $(quoted "$@")"; fi
  local workload=(xpk workload create "${common[@]}" --workload "$TPU_NAME"
    --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" --command "$command")
  read -r -a environment <<<"$JOB_ENV"
  for word in ${environment[@]+"${environment[@]}"}; do workload+=(--env "$word"); done
  quoted "${workload[@]}"
}

main "$@"
