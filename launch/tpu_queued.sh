#!/usr/bin/env bash
# TPUs from the queue, spot or not: asks for them, runs the job on each new set, and asks again until it is finished.
#
#   launch/tpu_queued.sh --name=vit-b16 --zone=us-east1-d --accelerator=v6e-16 --runtime=v2-alpha-tpuv6e --spot \
#     --bucket=gs://my-bucket/jobs --setup='mkdir -p /mnt/shared && mount 10.0.0.2:/share /mnt/shared' \
#     --config=configs/vit_b16.py --workdir=/mnt/shared/vit_b16
#
# How it knows that the job is finished: worker 0 writes gs://BUCKET/NAME/finished when the program exits with 0, and any
# worker writes `mistake` (exit code 2, not repeated) or `crashed` (too many crashes), with the end of its log. Unlike
# guest attributes these outlive the machines. Then the TPUs are deleted, and this launcher exits with 0, 2 or 1. Until
# then it replaces whatever was taken away or failed. It may be interrupted and run again: it finds what it started.
#
# Options, before --config=; whatever follows goes to robust_vit.main:
#   --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION [--project=PROJECT] [--service_account=EMAIL]
#   --bucket=gs://BUCKET[/FOLDER]   where the code is put for the workers, and where they say how it went
#   --spot | --reserved             spot capacity, or a reservation (default: on demand)
#   --setup=COMMAND                 what every new worker runs first, as root: mounts the folder of --workdir
#   --retries=K                     crashes on one set of machines (default 10)
#   --recreations=K                 how often the machines are asked for again (default 100)
#   --jax=REQUIREMENT               the JAX that is installed on the workers (default jax[tpu])
#   --poll=SECONDS                  between two looks (default 60)
#   --keep                          leaves the TPUs when the job has ended
#   --dry_run                       prints the commands and runs none
# Instead of running a job: --logs (worker 0), --status, --delete (ends the job; interrupt the launcher that watches over
# it first, or that one asks for new machines)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" zone="" accelerator="" runtime="" bucket="" action=babysit keep="" poll=60 recreations=100
where=() resources=() options=()
while [[ $# -gt 0 ]] && ! is_program_flag "$1"; do
  require_value "$1"
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) where+=("$1") ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --service_account=*) resources+=(--service-account="${1#*=}") ;;
    --spot | --reserved) resources+=("$1") ;;
    --bucket=*) bucket=${1#*=} ;;
    --setup=* | --jax=*) options+=("$1") ;;
    --retries=*)
      require_number --retries "${1#*=}"
      options+=("$1")
      ;;
    --recreations=*)
      recreations=${1#*=}
      require_number --recreations "$recreations"
      ;;
    --poll=*)
      poll=${1#*=}
      require_number --poll "$poll"
      ;;
    --keep) keep=yes ;;
    --logs | --status | --delete) action=${1#--} ;;
    --dry_run) dry_run=yes ;;
    --help | -h) show_help ;;
    *) unknown_option "$1" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
[[ -n "$name" ]] || fail "--name=NAME is missing: what the TPUs and the folder in the bucket are called."
[[ -n "$zone" ]] || fail "--zone=ZONE is missing: gcloud compute tpus locations list shows them."
require_name --name "$name"
require_name --zone "$zone"
where=(--zone="$zone" ${where[@]+"${where[@]}"})
markers="${bucket%/}/$name"

queued_resources() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}" </dev/null; }

# What every worker runs whenever it boots. The job's folder is one that any user may read (--logs).
startup_script() {
  cat <<SCRIPT
#!/usr/bin/env bash
export HOME=/root PATH="\$PATH:/snap/bin" ROBUST_VIT_JOB=/opt/robust_vit_job
mkdir -p "\$ROBUST_VIT_JOB/code.new"
cd "\$ROBUST_VIT_JOB"
until gcloud storage cp $(quoted "$markers/code.tar.gz") code.tar.gz && tar -xzf code.tar.gz -C code.new; do sleep 10; done
exec bash code.new/launch/tpu_worker.sh run $(quoted --markers="$markers" ${options[@]+"${options[@]}"} -- "$@") >>log 2>&1
SCRIPT
}

create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${resources[@]+"${resources[@]}"} \
    --scopes=https://www.googleapis.com/auth/cloud-platform --metadata-from-file=startup-script="$folder/startup.sh" \
    --quiet </dev/null
}

delete() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet </dev/null; }

# Forgets how an earlier job of this name ended, and puts the code where the workers find it.
upload() {
  local outcome
  for outcome in finished mistake crashed; do
    run gcloud storage rm "$markers/$outcome" --quiet </dev/null 2>/dev/null || true
  done
  pack_code "$folder/code.tar.gz"
  run gcloud storage cp "$folder/code.tar.gz" "$markers/code.tar.gz" --quiet </dev/null
}

# Sets `state`: what the queue says; MISSING; LOST where the queue says ACTIVE and the machines are gone; UNKNOWN, with why.
look() {
  local node=""
  if state=$(queued_resources describe --format='value(state.state)' 2>"$folder/error"); then
    if [[ "$state" == ACTIVE ]]; then
      node=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' </dev/null 2>"$folder/error") ||
        { grep -q NOT_FOUND "$folder/error" && node=TERMINATED; } || true
      [[ "$node" != PREEMPTED && "$node" != TERMINATED ]] || state=LOST
    fi
  elif grep -q NOT_FOUND "$folder/error"; then
    state=MISSING
  else
    state="UNKNOWN ($(tail -n 1 "$folder/error"))"
  fi
}

# Ends this launcher where the workers have written how the job ended.
conclude() {
  local objects outcome code
  objects=$(gcloud storage ls "$markers/" </dev/null 2>/dev/null) || return 0
  for outcome in finished mistake crashed none; do
    ! grep --quiet --line-regexp --fixed-strings "$markers/$outcome" <<<"$objects" || break
  done
  case "$outcome" in
    finished) code=0 ;;
    mistake) code=$EXIT_USER_ERROR ;;
    crashed) code=1 ;;
    none) return 0 ;;
  esac
  [[ "$code" -eq 0 ]] || gcloud storage cat "$markers/$outcome" </dev/null >&2 || true
  say "$outcome${keep:+; the TPUs are kept: --delete ends what they cost}"
  if [[ -z "$keep" && "$state" != MISSING ]]; then
    delete || { say "could not delete the TPUs: run with --delete, or they go on costing" && code=1; }
  fi
  exit "$code"
}

babysit() {
  local asked=0 before=""
  trap 'say "the job goes on; run the same command again to watch over it, or --delete to end it"; exit 130' INT TERM
  look
  case "$state" in
    MISSING) upload ;;
    UNKNOWN*) fail "gcloud does not answer: $state" ;;
    *) say "$name exists: watches over it, with the code and flags that it was started with" ;;
  esac
  while :; do
    conclude
    [[ "$state" == "$before" ]] || say "$(date '+%F %T') $state"
    before=$state
    case "$state" in
      FAILED | SUSPENDED | LOST)
        queued_resources describe --format='yaml(state)' >&2 || true
        delete || say "could not delete it; tries again"
        ;;
      MISSING)
        asked=$((asked + 1))
        [[ "$asked" -le $((recreations + 1)) ]] || { say "asked $((asked - 1)) times: given up" && exit 1; }
        create || say "could not ask for TPUs; tries again"
        ;;
    esac
    sleep "$poll" &
    wait $! # A signal does not have to wait for the end of the sleep.
    look
  done
}

case "$action" in
  logs)
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="tail -n 100 -F /opt/robust_vit_job/log" </dev/null
    ;;
  status) run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='yaml(state)' </dev/null ;;
  delete) delete ;;
  babysit)
    require_program_flags "$@"
    require_absolute_workdir
    [[ -n "$accelerator" ]] || fail "--accelerator=TYPE is missing: gcloud compute tpus accelerator-types list shows them."
    [[ -n "$runtime" ]] || fail "--runtime=VERSION is missing: gcloud compute tpus tpu-vm versions list shows them."
    [[ "$bucket" =~ ^gs://[-_./a-z0-9]+$ ]] || fail "--bucket=$bucket: expected gs://BUCKET or gs://BUCKET/FOLDER."
    if [[ -n "$dry_run" ]]; then
      folder=/tmp
      upload 2>&1
      echo "# startup.sh:"
      startup_script "$@"
      echo "# whenever there are no TPUs:"
      create
      echo "# whenever they are FAILED, SUSPENDED or lost, and when the job has ended:"
      delete
    else
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
      startup_script "$@" >"$folder/startup.sh"
      babysit
    fi
    ;;
esac
