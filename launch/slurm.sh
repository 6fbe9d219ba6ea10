#!/usr/bin/env bash
# One machine of a Slurm cluster, requeued until training and studies are finished.
#
#   launch/slurm.sh --config=configs/vit_b16.py --workdir=/scratch/runs/vit_b16 [more flags of robust_vit.main]
#   launch/slurm.sh --dry_run --config=...        prints the job and submits nothing
#
# Slurm sends SIGTERM 5 minutes before it takes the machine away; robust_vit saves and exits with 75, and the job puts
# itself back into the queue. Options for sbatch (partition, account, gres) go into SBATCH_* environment variables.
set -euo pipefail

submit=(sbatch)
if [[ "${1:-}" == --dry_run ]]; then
  submit=(cat)
  shift
fi
if [[ $# -eq 0 || "$*" != *--config=* || "$*" != *--workdir=* ]]; then
  echo "usage: launch/slurm.sh [--dry_run] --config=FILE --workdir=FOLDER [flags of robust_vit.main]" >&2
  exit 2
fi

"${submit[@]}" <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=robust_vit
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=robust_vit-%j.log
srun python -m robust_vit.main$(printf ' %q' "$@") &
worker=\$!
trap 'kill -TERM \$worker; wait \$worker; code=\$?; [[ \$code -eq 75 ]] && scontrol requeue \$SLURM_JOB_ID; exit \$code' TERM
wait \$worker
JOB
