#!/usr/bin/env bash
# A TPU VM that exists, of one worker or of many: copies the code to all of them, starts the job, shows worker 0's log.
#
#   launch/tpu_vm.sh --name=my-tpu --zone=us-central2-b --config=configs/vit_b16.py --workdir=/mnt/shared/vit_b16
#
# The job runs in the background of the workers: closing the terminal does not end it. The same command goes on after
# anything that ended the job. --workdir is a folder that every worker mounts (Filestore, NFS, Lustre, gcsfuse).
#
# Options, before --config=; whatever follows goes to robust_vit.main:
#   --name=TPU --zone=ZONE [--project=PROJECT]
#   --setup=COMMAND     what every worker runs first, for example 'sudo mount 10.0.0.2:/share /mnt/shared'
#   --retries=K         how often a crashed job is started again (default 10); a user's mistake (exit code 2) never is
#   --jax=REQUIREMENT   the JAX that is installed on the workers on first use (default jax[tpu])
#   --internal_ip       ssh through the internal network
#   --no_follow         does not show the log
#   --dry_run           prints the commands and runs none
# Instead of starting a job:
#   --logs              worker 0's log, until the job ends; then exits with the job's code
#   --status            one line for each worker
#   --stop              saves and ends the job: SIGTERM, and after 5 minutes SIGKILL
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" zone="" action=start follow=yes
where=() options=()
while [[ $# -gt 0 ]] && ! is_program_flag "$1"; do
  require_value "$1"
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) where+=("$1") ;;
    --internal_ip) where+=(--internal-ip) ;;
    --setup=* | --jax=*) options+=("$1") ;;
    --retries=*)
      require_number --retries "${1#*=}"
      options+=("$1")
      ;;
    --no_follow) follow="" ;;
    --logs | --status | --stop) action=${1#--} ;;
    --dry_run) dry_run=yes ;;
    --help | -h) show_help ;;
    *) unknown_option "$1" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
[[ -n "$name" ]] || fail "--name=TPU is missing: gcloud compute tpus tpu-vm list shows them."
[[ -n "$zone" ]] || fail "--zone=ZONE is missing: where the TPU is."
require_name --name "$name"
require_name --zone "$zone"
where=(--zone="$zone" ${where[@]+"${where[@]}"})

# Runs the command $2 on the worker(s) $1.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2" </dev/null
}

show_log() {
  local code=0
  on_workers 0 "bash robust_vit_job/code/launch/tpu_worker.sh follow" || code=$?
  [[ "$code" -ne 255 ]] || say "the connection broke, the job goes on: --logs shows it again"
  return "$code"
}

case "$action" in
  logs) show_log ;;
  status) on_workers all "bash robust_vit_job/code/launch/tpu_worker.sh status" ;;
  stop) on_workers all "bash robust_vit_job/code/launch/tpu_worker.sh stop" ;;
  start)
    require_program_flags "$@"
    require_absolute_workdir
    folder=/tmp
    if [[ -z "$dry_run" ]]; then
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
    fi
    pack_code "$folder/robust_vit_code.tar.gz"
    run gcloud compute tpus tpu-vm scp "$folder/robust_vit_code.tar.gz" "$name:robust_vit_code.tar.gz" "${where[@]}" --worker=all
    new=robust_vit_job/code.new
    on_workers all "rm -rf $new && mkdir -p $new && tar -xzf robust_vit_code.tar.gz -C $new && bash $new/launch/tpu_worker.sh start $(quoted ${options[@]+"${options[@]}"} -- "$@")" ||
      fail "not every worker started the job (see above): --stop ends it on the others."
    if [[ -n "$follow" ]]; then show_log; fi
    ;;
esac
