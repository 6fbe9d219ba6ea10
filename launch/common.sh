# shellcheck shell=bash
# What the launchers share; sourced by them. A launcher's own options come first; from --config= or --workdir= (or from
# --) on, every argument is a flag of robust_vit.main. Macs ship bash 3.2: hence ${array[@]+...} and no ${word@Q}.

readonly EXIT_USER_ERROR=2
dry_run=""

fail() {
  printf 'error: %s\n' "$*" >&2
  exit "$EXIT_USER_ERROR"
}

say() { printf 'launcher: %s\n' "$*" >&2; }

# The comment at the top of the launcher is its manual.
show_help() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
}

# Whether the argument belongs to the program: there the launcher's own options end.
is_program_flag() { [[ "$1" == -- || "$1" == --config=* || "$1" == --workdir=* ]]; }

# An option without its value says so before anything else is looked at.
require_value() { [[ "$1" != --*= ]] || fail "$1: expected $1VALUE (--help explains)."; }

unknown_option() { fail "unknown option $1; the launcher's options come before --config= (--help lists them)."; }

require_number() { [[ "$2" =~ ^[0-9]+$ ]] || fail "$1=$2: expected a whole number."; }
require_positive() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: expected a whole number of 1 or more."; }

# Cloud names become parts of commands and addresses.
require_name() { [[ "$2" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "$1=$2: expected lower-case letters, digits and hyphens."; }

# What every program needs. Sets `workdir`.
require_program_flags() {
  local argument config=""
  workdir=""
  for argument in "$@"; do
    case "$argument" in
      --config=?*) config=yes ;;
      --workdir=gs://*) fail "$argument: expected a folder that all machines mount (NFS, Filestore, Lustre, gcsfuse)." ;;
      --workdir=?*) workdir=${argument#*=} ;;
    esac
  done
  [[ -n "$config" ]] || fail "--config=FILE is missing: what to run (--help shows the command)."
  [[ -n "$workdir" ]] || fail "--workdir=/SHARED/FOLDER is missing: where checkpoints and results go."
}

require_absolute_workdir() {
  [[ "$workdir" == /* ]] || fail "--workdir=$workdir: expected an absolute path; every machine has to find the same folder."
}

# Words that a shell reads back as they are, in single quotes where they need it.
quoted() {
  local word words="" quote="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]] || word="'${word//\'/$quote}'"
    words+=" $word"
  done
  printf '%s' "${words# }"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Packs the working tree, local changes included, into the archive $1.
pack_code() {
  run tar -czf "$1" -C "$(dirname "${BASH_SOURCE[0]}")/.." --exclude=__pycache__ \
    robust_vit configs launch setup.py README.md LICENSE pyproject.toml
}
