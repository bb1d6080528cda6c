#!/usr/bin/env bash
# Tells how the job and its hosts are on GKE, and shows the end of the first host's log.
#
# usage: gke/status.sh [--env FILE] [--dry_run]

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  parse "$@"
  none ${REST[@]+"${REST[@]}"}
  load_cluster
  change kubectl get jobset "$TPU_NAME"
  change kubectl get pods "--selector=jobset.sigs.k8s.io/jobset-name=$TPU_NAME" --output=wide
  change kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$TPU_NAME,$(first_host)" \
    --container=neo-jax --tail=20
}

first_host() {
  echo "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

main "$@"
