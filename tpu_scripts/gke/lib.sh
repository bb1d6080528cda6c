# shellcheck shell=bash
# What the scripts for GKE share, beside ../lib.sh; sourced by each, never run.

# shellcheck source=../lib.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Settings of a cluster. Fills in ACCELERATOR (the nodes' label), MACHINE and HOSTS (a slice).
load_cluster() {
  : "${RUNTIME_VERSION:=of-the-image}" # GKE brings its own
  load_settings
  local key chips
  for key in CLUSTER LOCATION TOPOLOGY; do
    [[ -n ${!key:-} ]] || die "$EXIT_MISTAKE" "$ENV_FILE sets no $key, which GKE needs."
  done
  : "${IMAGE:=}" "${KUBERNETES_ACCOUNT:=default}" "${RESERVATION:=}" "${MAX_RESTARTS:=1000}"
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "$EXIT_MISTAKE" \
    "TOPOLOGY=$TOPOLOGY must be as 8x8 or 2x2x4."
  # Source: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
  case $ACCELERATOR_TYPE in
    v4-*) ACCELERATOR=tpu-v4-podslice MACHINE=ct4p-hightpu-4t ;;
    v5litepod-*) ACCELERATOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t ;;
    v5p-*) ACCELERATOR=tpu-v5p-slice MACHINE=ct5p-hightpu-4t ;;
    v6e-*) ACCELERATOR=tpu-v6e-slice MACHINE=ct6e-standard-4t ;;
    tpu7x-*) ACCELERATOR=tpu7x MACHINE=tpu7x-standard-4t ;;
    *) die "$EXIT_MISTAKE" "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not lent through GKE." ;;
  esac
  chips=$((${TOPOLOGY//x/*}))
  ((chips % 4 == 0)) || die "$EXIT_MISTAKE" "TOPOLOGY=$TOPOLOGY: hosts of 4 chips do not make it up."
  HOSTS=$((chips / 4))
  export ACCELERATOR MACHINE HOSTS
}

# The node pools, one a slice.
pools() { nodes; }

# none "$@": for scripts without arguments of their own.
none() { (($# == 0)) || die "$EXIT_MISTAKE" "unknown argument $1; see --help."; }
