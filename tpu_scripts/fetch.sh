#!/usr/bin/env bash
# Brings a run's results and the logs of every host to this machine.
#
# usage: fetch.sh [--env FILE] [--dry_run] [--checkpoints] [FOLDER]      FOLDER: pods/RUN_NAME
#
# Logs go to FOLDER/logs/SLICE-HOST.log, the workdir to FOLDER/workdir, without checkpoints
# unless --checkpoints is said. What is there already is brought up to date, nothing is removed.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local checkpoints='' folder='' word
  parse "$@"
  for word in ${REST[@]+"${REST[@]}"}; do
    case $word in
      --checkpoints) checkpoints=1 ;;
      --*) die "$EXIT_MISTAKE" "unknown argument $word; see --help." ;;
      *) folder=$word ;;
    esac
  done
  load_settings
  : "${folder:=pods/$RUN_NAME}"
  change mkdir -p "$folder/logs" "$folder/workdir"
  fetch_workdir "$folder/workdir" "$checkpoints"
  fetch_logs "$folder/logs"
}

fetch_workdir() {
  local to=$1 checkpoints=$2
  if [[ $BUCKET && $WORKDIR == "$MOUNT"/* ]]; then
    local sync=(gcloud storage rsync --recursive)
    [[ $checkpoints ]] || sync+=('--exclude=^checkpoints/.*$')
    change "${sync[@]}" "gs://$BUCKET/${WORKDIR#"$MOUNT"/}" "$to" --project="$PROJECT"
    return
  fi
  # A folder that all hosts see: the first one has it. scp knows no exclusions, tar does.
  local pack=(tar -czf neo_jax_workdir.tar.gz -C "$WORKDIR")
  [[ $checkpoints ]] || pack+=(--exclude=./checkpoints)
  queued ssh "$TPU_NAME" --node=0 --worker=0 "--command=$(quoted "${pack[@]}" .)"
  change "${COMMAND[@]}" >&2
  queued scp "$TPU_NAME:neo_jax_workdir.tar.gz" "$to/" --node=0 --worker=0
  change "${COMMAND[@]}" >&2
  change tar -xzf "$to/neo_jax_workdir.tar.gz" -C "$to"
  change rm "$to/neo_jax_workdir.tar.gz"
}

fetch_logs() {
  local to=$1 slice=0 node host number=1 missing=0
  for node in $(nodes); do
    if [[ ! $DRY_RUN ]]; then
      number=$(ask gcloud compute tpus tpu-vm describe "$node" --zone="$ZONE" \
        --project="$PROJECT" '--format=value(networkEndpoints.len())')
      [[ $number =~ ^[0-9]+$ ]] || die "$EXIT_FAILED" "the hosts of $node cannot be counted."
    fi
    for ((host = 0; host < number; host++)); do
      queued scp "$TPU_NAME:neo_jax_jobs/$RUN_NAME/log" "$to/$slice-$host.log" --node="$slice" \
        --worker="$host"
      change "${COMMAND[@]}" >&2 || missing=$((missing + 1))
    done
    slice=$((slice + 1))
  done
  ((missing == 0)) || die "$EXIT_FAILED" "$missing hosts gave no log of $RUN_NAME."
}

main "$@"
