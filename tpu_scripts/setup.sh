#!/usr/bin/env bash
# Copies this checkout to every host of the pod, installs it, and checks that the hosts agree.
#
# usage: setup.sh [--env FILE] [--dry_run]
#
# Mounts the bucket, compares Python, JAX, libtpu and code of all hosts, and has them count
# their devices together. What is done already is not done again.
#
#   tpu_scripts/setup.sh

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  parse "$@"
  ((${#REST[@]} == 0)) || die "$EXIT_MISTAKE" "unknown argument ${REST[0]}; see --help."
  load_settings
  if [[ ! $DRY_RUN ]] && runs_everywhere "$RUN_NAME"; then
    say "$RUN_NAME runs; nothing is changed under it. run.sh --stop ends it."
    return
  fi
  local archive
  archive=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder's name as it is now
  trap "rm -rf '$archive'" EXIT
  pack "$archive/neo_jax.tar.gz"
  DIGEST=$(sha256sum "$archive/neo_jax.tar.gz" | cut -c 1-16)
  say "copying $DIGEST to every host"
  queued scp "$archive/neo_jax.tar.gz" "$TPU_NAME:neo_jax.tar.gz" --node=all --worker=all \
    --batch-size=all
  change "${COMMAND[@]}" >&2 || die "$EXIT_FAILED" "the code could not be copied to every host."
  on_all "$(install_command)" >&2 ||
    die "$EXIT_FAILED" "not every host is installed; the lines above say which."
  compare_versions
  count_devices
}

# The files that git knows, as they are now; the same files make the same bytes.
pack() {
  local root
  root=$(cd "$SCRIPTS/.." && pwd)
  if git -C "$root" rev-parse --git-dir >/dev/null 2>&1; then
    git -C "$root" ls-files -z --cached --others --exclude-standard
  else
    (cd "$root" && find . -type f -not -path './.venv*' -not -path './runs/*' -print0)
  fi | (cd "$root" && sort -z | while IFS= read -r -d '' file; do
    if [[ -e $file ]]; then printf '%s\0' "$file"; fi
  done) | tar --create --owner=0 --group=0 --numeric-owner --mtime=@0 --directory="$root" \
    --null --files-from=- | gzip --no-name >"$1"
}

install_command() {
  # The folder is changed in one step, and only where the code is another.
  local unpack="rm -rf neo_jax.new && mkdir neo_jax.new && tar -xzf neo_jax.tar.gz -C neo_jax.new"
  unpack+=" && rm -rf neo_jax && mv neo_jax.new neo_jax && echo $DIGEST > neo_jax.digest"
  echo "{ grep -qsx $DIGEST neo_jax.digest || { $unpack; }; } &&" \
    "$(worker install "$DIGEST" "$PYTHON_VERSION" "$EXTRA")" \
    "${BUCKET:+&& $(worker mount "$BUCKET" "$MOUNT")}"
}

compare_versions() {
  local lines distinct workers
  if [[ $DRY_RUN ]]; then
    on_all "$(worker versions)"
    return
  fi
  workers=$(count_workers) || die "$EXIT_FAILED" "the number of hosts cannot be learnt."
  lines=$(on_all "$(worker versions)" 2>/dev/null | sed -n 's/^neo_jax-versions //p' | sort) || true
  if (($(grep -c . <<<"$lines") < workers)); then
    die "$EXIT_FAILED" "only $(grep -c . <<<"$lines") of $workers hosts told their versions."
  fi
  distinct=$(cut -d ' ' -f 2 <<<"$lines" | sort | uniq -c | sort -rn)
  if (($(wc -l <<<"$distinct") > 1)); then
    say "the hosts differ:"
    echo "$lines" >&2
    die "$EXIT_FAILED" "remove ~/neo_jax_venv on the hosts that differ, then say this again."
  fi
  say "all $workers hosts: $(awk '{ print $2 }' <<<"$distinct")"
}

count_devices() {
  local code=0 command=(python -m neo_jax.doctor --distributed --devices "$(expected_devices)")
  run_job check "$WORKDIR" -- "${command[@]}" || code=$?
  ((code == 0)) || {
    on_all "$(worker tail check 5)" >&2 || true
    die "$EXIT_FAILED" "the hosts do not see $(expected_devices) devices together."
  }
}

main "$@"
