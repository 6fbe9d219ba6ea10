#!/usr/bin/env bash
# Any number of machines of a Slurm cluster, requeued until training and studies are finished.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --config=configs/vit_b16.py --workdir=/scratch/runs/vit_b16
#
# Options, before --config=; whatever follows goes to robust_vit.main:
#   --nodes=N           machines (default 1)
#   --gpus_per_node=G   accelerators of each; one process is started for each of them (default 0: one process a machine)
#   --cpus_per_task=C   cores of each process, for decoding images (default: the cluster's)
#   --retries=K         how often a job that crashed goes back into the queue (default 10)
#   --name=NAME         the job's name (default robust_vit)
#   --dry_run           prints the job and submits nothing
# Everything else that sbatch takes goes into its environment variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.
# Submit from the folder in which `python -m robust_vit.main` runs, with its virtual environment active.
#
# Five minutes before the time limit, and when the machines are taken away, all processes save and exit with 75: the job
# goes back into the queue and goes on from there. A user's mistake (2) is not repeated, a crash K times. When a process
# dies, Slurm ends the others. `scancel JOB` ends the job for good.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus_per_node=0 cpus_per_task="" retries=10 name=robust_vit
while [[ $# -gt 0 ]] && ! is_program_flag "$1"; do
  require_value "$1"
  case "$1" in
    --nodes=*)
      nodes=${1#*=}
      require_positive --nodes "$nodes"
      ;;
    --gpus_per_node=*)
      gpus_per_node=${1#*=}
      require_number --gpus_per_node "$gpus_per_node"
      ;;
    --cpus_per_task=*)
      cpus_per_task=${1#*=}
      require_positive --cpus_per_task "$cpus_per_task"
      ;;
    --retries=*)
      retries=${1#*=}
      require_number --retries "$retries"
      ;;
    --name=*)
      name=${1#*=}
      [[ "$name" =~ ^[-_.A-Za-z0-9]+$ ]] || fail "$1: expected letters, digits, - _ and ."
      ;;
    --dry_run) dry_run=yes ;;
    --help | -h) show_help ;;
    *) unknown_option "$1" ;;
  esac
  shift
done
[[ "${1:-}" == -- ]] && shift
require_program_flags "$@"

# With JAX under Slurm each process owns the one accelerator that has its local number.
tasks_per_node=$((gpus_per_node > 0 ? gpus_per_node : 1))
resources="#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks_per_node"
[[ "$gpus_per_node" -gt 0 ]] && resources+="
#SBATCH --gpus-per-node=$gpus_per_node"
step_options=(--kill-on-bad-exit=1)
if [[ -n "$cpus_per_task" ]]; then
  resources+="
#SBATCH --cpus-per-task=$cpus_per_task"
  step_options+=("--cpus-per-task=$cpus_per_task") # srun no longer takes it from sbatch.
fi
distributed=""
[[ $((nodes * tasks_per_node)) -gt 1 ]] && distributed="export ROBUST_VIT_DISTRIBUTED=1"

submit=(sbatch)
[[ -n "$dry_run" ]] && submit=(cat)
"${submit[@]}" <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$name
$resources
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
$distributed
# A job that was cancelled stays so, and one that was preempted Slurm puts back itself: neither is running any more.
requeue() {
  state=\$(squeue --noheader --jobs="\$SLURM_JOB_ID" --format=%T)
  if [[ "\$state" == RUNNING ]]; then
    echo "\$1; back into the queue"
    scontrol requeue "\$SLURM_JOB_ID"
  else
    echo "\$1; the job is \$state"
  fi
}
# Slurm reports the highest exit code of all processes; a user's mistake is raised above the codes that it causes.
task='trap : TERM; "\$@"; code=\$?; exit \$((code == 2 ? 254 : code))'
# srun answers SIGTERM by killing its processes; scancel passes the signal on to them.
trap 'interrupted=yes; scancel --signal=TERM "\$SLURM_JOB_ID"' TERM
srun $(quoted "${step_options[@]}") bash -c "\$task" task python -m robust_vit.main $(quoted "$@") &
step=\$!
interrupted=yes
while [[ -n "\$interrupted" ]]; do # A signal ends the waiting, not the step.
  interrupted=
  wait "\$step"
  code=\$?
done
case "\$code" in
  0) echo "finished" ;;
  254)
    echo "a mistake in the command or the configuration; not repeated"
    code=2
    ;;
  75) requeue "saved" ;;
  *)
    if [[ "\${SLURM_RESTART_COUNT:-0}" -lt $retries ]]; then
      requeue "crashed with \$code"
    else
      echo "crashed with \$code after \${SLURM_RESTART_COUNT:-0} restarts; given up"
    fi
    ;;
esac
exit "\$code"
JOB
