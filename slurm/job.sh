# shellcheck shell=bash
# What the batch scripts share. Sourced; sets $slurm_dir, $job (its number as Slurm's commands take it) and `note`.

# The number of an array's first task is also the number of the whole array, and scontrol would requeue all of it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

job_field() { # job_field NAME: one field of `scontrol show job`, up to the end of its line
  scontrol show job "$job" | sed -n "s/^ *$1=//p" | head -n 1
}

note() { # one line in the job's log, and in the pipeline's where there is one
  local line
  line="$(date '+%Y-%m-%d %H:%M:%S')  ${stage:-$SLURM_JOB_NAME} (job $job): $*"
  echo "$line"
  [ -z "${MEGATRON_GIL_LOG:-}" ] || echo "$line" >> "$MEGATRON_GIL_LOG"
}

reason() { # what the run itself said last: its one line, else the end of a traceback
  local log
  log=$(job_field StdOut)
  grep -E 'megatron-gil [a-z-]+( [a-z]+)?: |^([0-9]+: )?([A-Za-z_]+\.)*[A-Z][A-Za-z]*(Error|Exception|Failed)\b' "$log" |
    tail -n 1 | sed 's/^ *[0-9]*: //'
}

fail() { # fail STATUS: say why, and end; what depends on this job is cancelled (--kill-on-invalid-dep)
  local said
  said=$(reason)
  note "FAILED with exit code $1: ${said:-no reason given}; log: $(job_field StdOut); not requeued, nothing after it runs"
  exit "$1"
}
