#!/usr/bin/env bash
# Opens a shell on one host of the pod, or runs a command on all.
#
# usage: ssh.sh [--env FILE] [--dry_run] [--slice I] [--host J]       a shell; 0 and 0 if not said
#        ssh.sh [--env FILE] [--dry_run] --all COMMAND                a command, on every host
#
#   tpu_scripts/ssh.sh --host 3
#   tpu_scripts/ssh.sh --all 'df -h / | tail -n 1'

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local slice=0 host=0 all='' node
  parse "$@"
  set -- ${REST[@]+"${REST[@]}"}
  while (($#)); do
    (($# > 1)) || die "$EXIT_MISTAKE" "$1 wants a value; see --help."
    case $1 in
      --slice) slice=$2 ;;
      --host) host=$2 ;;
      --all) all=$2 ;;
      *) die "$EXIT_MISTAKE" "unknown argument $1; see --help." ;;
    esac
    shift 2
  done
  load_settings
  if [[ $all ]]; then
    on_all "$all"
    return
  fi
  node=$(nodes | sed -n "$((slice + 1))p")
  [[ $node ]] || die "$EXIT_MISTAKE" "--slice $slice: there are $NUM_SLICES, counted from 0."
  # `queued-resources ssh` insists on a command; a shell wants the slice's own.
  local shell=(gcloud compute tpus tpu-vm ssh "$node" --worker="$host")
  case $SSH_THROUGH in
    iap) shell=(gcloud alpha compute tpus tpu-vm ssh "$node" --worker="$host" --tunnel-through-iap) ;;
    internal) shell+=(--internal-ip) ;;
  esac
  change "${shell[@]}" --zone="$ZONE" --project="$PROJECT"
}

main "$@"
