#!/usr/bin/env bash
# Trains on the slices of a GKE cluster, waits, and ends as the training ends.
#
# usage: gke/run.sh [--env FILE] [--dry_run] [--no_wait] [-- SETTINGS…]
#
# Fills in jobset.yaml and applies it. The JobSet controller restarts all hosts when one is taken
# away or fails, up to MAX_RESTARTS times, and stops at a user's mistake (exit code 2). Where the
# job is there already, it is only waited for. Exit code: 0 done, 1 failed, 2 a user's mistake.
#
#   tpu_scripts/gke/run.sh --env gke.env
#   tpu_scripts/gke/run.sh --env gke.env --dry_run >job.yaml

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local own=() wait=1 word
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  (($# == 0)) || shift
  parse ${own[@]+"${own[@]}"}
  for word in ${REST[@]+"${REST[@]}"}; do
    [[ $word == --no_wait ]] || die "$EXIT_MISTAKE" "unknown argument $word; see --help."
    wait=
  done
  load_cluster
  for word in IMAGE BUCKET CONFIG; do
    [[ ${!word} ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no $word, which GKE needs."
  done
  if [[ $DRY_RUN ]]; then
    manifest "$@"
    return
  fi
  if kubectl get jobset "$TPU_NAME" --output=name >/dev/null 2>&1; then
    say "$TPU_NAME is there already."
  else
    manifest "$@" | kubectl apply --filename=- >&2 ||
      die "$EXIT_FAILED" "the cluster did not take the job."
  fi
  if [[ $wait ]]; then wait_for_end; fi
}

wait_for_end() {
  local end silent=0
  while :; do
    if end=$(kubectl get jobset "$TPU_NAME" '--output=jsonpath={.status.terminalState}'); then
      silent=0
    else
      silent=$((silent + 1))
      ((silent < PATIENCE)) || die "$EXIT_FAILED" "the cluster does not answer."
    fi
    case $end in
      Completed) return 0 ;;
      Failed) die "$EXIT_FAILED" "$TPU_NAME failed; gke/status.sh shows where." ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# jobset.yaml with every @NAME@ filled in.
manifest() {
  local text name environment flags overrides word command variables=
  text=$(<"$SCRIPTS/gke/jobset.yaml")
  read -r -a environment <<<"$JOB_ENV"
  read -r -a flags <<<"$MAIN_FLAGS"
  read -r -a overrides <<<"$OVERRIDES"
  command=$(json_list python -m neo_jax.main --config "$CONFIG" --workdir "$WORKDIR" \
    ${flags[@]+"${flags[@]}"} ${overrides[@]+"${overrides[@]}"} "$@")
  for word in ${environment[@]+"${environment[@]}"}; do
    variables+="${variables:+, }{name: $(json "${word%%=*}"), value: $(json "${word#*=}")}"
  done
  for name in TPU_NAME ACCELERATOR TOPOLOGY HOSTS NUM_SLICES MAX_RESTARTS IMAGE BUCKET MOUNT \
    KUBERNETES_ACCOUNT; do
    text=${text//"@$name@"/"${!name}"}
  done
  text=${text//@COMMAND@/"$command"}
  text=${text//@ENVIRONMENT@/"[$variables]"}
  # Only pools of spot machines carry the label.
  if [[ $PROVISIONING != spot ]]; then text=$(grep -v 'gke-spot' <<<"$text"); fi
  echo "$text"
}

# A string as JSON, which YAML takes as well.
json() {
  local text=${1//\\/\\\\}
  echo "\"${text//\"/\\\"}\""
}

json_list() {
  local list='' word
  for word in "$@"; do list+="${list:+, }$(json "$word")"; done
  echo "[$list]"
}

main "$@"
