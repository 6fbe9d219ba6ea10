#!/usr/bin/env bash
# What every worker of a TPU VM does. tpu_vm.sh and tpu_queued.sh start it there; nobody has to call it by hand.
#
#   tpu_worker.sh start [options] -- flags of robust_vit.main     in the background; it survives the ssh session
#   tpu_worker.sh run [options] -- flags of robust_vit.main       in the foreground
#   tpu_worker.sh stop | status | follow                          save and leave; one line; the log until the job ends
#
# Options: --setup=COMMAND (run first, for example to mount the shared folder), --jax=REQUIREMENT (default jax[tpu]),
# --retries=K (crashes that are answered with a new start, default 10), --pause=SECONDS (before that, default 30),
# --markers=gs://BUCKET/FOLDER (where the outcome is written: finished, mistake or crashed, with the end of the log).
#
# Everything lives in $ROBUST_VIT_JOB (default ~/robust_vit_job): code/ (what arrived as code.new/), venv/, log, exit_code.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly SECONDS_TO_SAVE=300
home=${ROBUST_VIT_JOB:-$HOME/robust_vit_job}
setup="" jax="jax[tpu]" retries=10 pause=30 markers=""

# The lock is held by the job and by its program: whoever of them lives, the job lives. Who asks holds it for a moment.
is_running() { ! flock --shared --nonblock "$home/lock" true; }

parse_options() {
  while [[ $# -gt 0 ]] && ! is_program_flag "$1"; do
    require_value "$1"
    case "$1" in
      --setup=*) setup=${1#*=} ;;
      --jax=*) jax=${1#*=} ;;
      --retries=*)
        retries=${1#*=}
        require_number --retries "$retries"
        ;;
      --pause=*)
        pause=${1#*=}
        require_number --pause "$pause"
        ;;
      --markers=*) markers=${1#*=} ;;
      *) unknown_option "$1" ;;
    esac
    shift
  done
  [[ "${1:-}" == -- ]] && shift
  program_flags=("$@")
  require_program_flags "$@"
}

start_job() {
  is_running && fail "a job runs here already: stop it first (--stop)."
  rm -f "$home/exit_code"
  setsid nohup bash "${BASH_SOURCE[0]}" run "$@" >>"$home/log" 2>&1 </dev/null &
  local _
  for _ in {1..100}; do
    if is_running || [[ -f "$home/exit_code" ]]; then
      echo "$(hostname): started"
      return
    fi
    sleep 0.1
  done
  say "$(hostname): did not start: $(tail -n 1 "$home/log")"
  return 1
}

# The packages, once and whenever setup.py changes. The system's Python may be too old: uv brings its own.
install_packages() {
  local wanted
  wanted="$jax $(cksum <"$home/code/setup.py")"
  [[ "$(cat "$home/venv/installed" 2>/dev/null)" != "$wanted" ]] || return 0
  say "installs $jax and the packages that robust_vit needs"
  { [[ -x "$home/uv/bin/uv" ]] || python3 -m pip install --quiet --target "$home/uv" uv; } &&
    "$home/uv/bin/uv" venv --quiet --clear --python '>=3.11' "$home/venv" &&
    "$home/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" "$jax" --editable "$home/code" &&
    printf '%s' "$wanted" >"$home/venv/installed"
}

# Runs the program once and sets `code`. SIGTERM is passed on; who does not leave in time is killed.
run_program() {
  (cd "$home/code" && exec "$home/venv/bin/python" -m robust_vit.main "${program_flags[@]}") &
  program=$!
  interrupted=yes
  while [[ -n "$interrupted" ]]; do # A signal ends the waiting, not the program.
    interrupted=""
    wait "$program" && code=0 || code=$?
  done
  kill -KILL -- "-$program" 2>/dev/null || true # What it left behind: data workers.
  [[ -z "$watchdog" ]] || kill -KILL -- "-$watchdog" 2>/dev/null || true
  program="" watchdog=""
}

stop_program() {
  stopping=yes interrupted=yes
  [[ -n "$program" ]] || return 0
  kill -TERM "$program" 2>/dev/null || true
  (sleep "$SECONDS_TO_SAVE" && kill -KILL -- "-$program") 9>&- >/dev/null 2>&1 &
  watchdog=$!
  disown
}

# Writes the outcome where tpu_queued.sh looks for it; several workers write the same.
mark() {
  [[ -n "$markers" ]] || return 0
  local _
  for _ in 1 2 3 4 5; do
    tail -n 40 "$home/log" | gcloud storage cp - "$markers/$1" --quiet && return
    sleep "$pause"
  done
}

is_first_worker() {
  local number
  number=$(curl --silent --fail --header "Metadata-Flavor: Google" \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) || return 0
  [[ "$number" == 0 ]]
}

prepare() {
  if [[ -n "$setup" ]]; then
    bash -c "$setup" 9>&- || return # A mount that stays must not hold the lock.
  fi
  if [[ -d "$home/code.new" ]]; then
    rm -rf "$home/code" && mv "$home/code.new" "$home/code" || return
  fi
  install_packages 9>&-
}

run_job() {
  exec 9>>"$home/lock"
  flock --timeout 5 9 || fail "a job runs here already: stop it first (--stop)."
  echo $$ >"$home/pid"
  rm -f "$home/exit_code"
  stopping="" program="" watchdog="" code=1
  local crashes=0
  trap 'echo "$code" >"$home/exit_code"' EXIT
  trap stop_program TERM INT
  set -m # The program gets a process group of its own.
  export ROBUST_VIT_DISTRIBUTED=1
  while [[ -z "$stopping" ]]; do
    say "$(date '+%F %T') start: $(quoted "${program_flags[@]}")"
    code=1
    if prepare; then run_program; else say "the setup command or the installation failed"; fi
    say "$(date '+%F %T') exit code $code"
    case "$code" in
      0)
        if is_first_worker; then mark finished; fi
        break
        ;;
      2)
        mark mistake
        break
        ;;
      75) ;;
      *)
        crashes=$((crashes + 1))
        if [[ -z "$stopping" && "$crashes" -gt "$retries" ]]; then
          mark crashed
          break
        fi
        ;;
    esac
    [[ -n "$stopping" ]] || { sleep "$pause" 9>&- & wait $! || true; }
  done
  exit "$code"
}

stop_job() {
  if is_running; then
    kill -TERM "$(cat "$home/pid")"
    flock --timeout $((SECONDS_TO_SAVE + 60)) "$home/lock" true || fail "the job did not end: sudo reboot helps."
  fi
  show_status
}

show_status() {
  local state
  if is_running; then
    state="running"
  elif [[ -f "$home/exit_code" ]]; then
    state="ended with $(cat "$home/exit_code")"
  else
    state="no job"
  fi
  echo "$(hostname): $state: $(tail -n 1 "$home/log" 2>/dev/null || true)"
}

follow() {
  [[ -f "$home/log" ]] || fail "there is no job here."
  if is_running; then
    tail -n 100 --follow=name --pid="$(cat "$home/pid")" "$home/log"
  else
    tail -n 100 "$home/log"
  fi
  return "$(cat "$home/exit_code" 2>/dev/null || echo 1)"
}

action=${1:-help}
[[ $# -gt 0 ]] && shift
mkdir -p "$home"
case "$action" in
  start)
    parse_options "$@"
    start_job "$@"
    ;;
  run)
    parse_options "$@"
    run_job
    ;;
  stop) stop_job ;;
  status) show_status ;;
  follow) follow ;;
  *) show_help ;;
esac
