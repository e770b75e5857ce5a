#!/usr/bin/env bash
# The reproduction as one chain of Slurm jobs: import -> SFT -> reward model -> PPO-GIL and its baselines -> responses and
# their scores -> export, judges, win rates, report.
#
#   slurm/pipeline.sh --llama DIR --data DIR --output DIR [options] [[STAGE:]section.key=value ...]
#
#   --llama DIR            a Hugging Face directory of a Llama, Qwen or Mistral
#   --data DIR             preferences and prompts: train/ and eval/ as prepare-data writes them
#   --demonstrations DIR   the same for SFT (default: --data)
#   --output DIR           everything is written below it; given again, the chain goes on with what is not done
#   --recipes DIR          sft.yaml, reward.yaml, dpo.yaml, generate.yaml, score.yaml and one YAML for each method
#                          (default: examples/paper_7b)
#   --methods "A B ..."    PPO runs, one array task each; the first is the one compared with the rest
#                          (default: "ppo_gil ppo_kl ppo")
#   --nodes N              of each training job (default 1); responses and scores take one
#   --rubric RUBRIC        by which responses to --data are judged: helpful (default), harmless, summary or a text file
#   --task NAME=DIR[,RUBRIC]  another prompt set that all methods answer and judges compare; may be given several times
#   --judge MODEL          a language model that judges beside the reward model; its key: $OPENAI_API_KEY
#   --judge-url URL        its server, where that is not OpenAI's
#   --dry-run              check every stage on this machine, print the jobs, submit nothing
#   --no-check             submit without that check
#
# Overrides go to every training stage, or to the one named before the colon (sft:, reward:, dpo:, ppo:, generate:,
# score:; of one task generate.NAME:, score.NAME:). A stage that fails cancels all after it; DIR/pipeline.log says why, in one line.
set -euo pipefail

slurm_dir=$(cd "$(dirname "$0")" && pwd)
project_dir=$(dirname "$slurm_dir")
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit "$1"; }
die() { echo "pipeline.sh: $*" >&2; exit 2; }

llama='' data='' demonstrations='' out='' recipes=$project_dir/examples/paper_7b
methods="ppo_gil ppo_kl ppo" nodes=1 dry_run='' no_check='' overrides=()
rubric=helpful judge='' judge_url='' given_tasks=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes; shift; continue ;;
    --no-check) no_check=yes; shift; continue ;;
    -h | --help) usage 0 ;;
    --*) [ $# -ge 2 ] || die "$1 needs a value" ;;
  esac
  case $1 in
    --llama) llama=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --demonstrations) demonstrations=$2; shift 2 ;;
    --output) out=$2; shift 2 ;;
    --recipes) recipes=$2; shift 2 ;;
    --methods) methods=$2; shift 2 ;;
    --nodes) nodes=$2; shift 2 ;;
    --rubric) rubric=$2; shift 2 ;;
    --task) given_tasks+=("$2"); shift 2 ;;
    --judge) judge=$2; shift 2 ;;
    --judge-url) judge_url=$2; shift 2 ;;
    *=*) overrides+=("$1"); shift ;;
    *) die "unknown argument $1; --help lists them" ;;
  esac
done
for name in llama data out; do
  [ -n "${!name}" ] || die "--${name/out/output} is not given; --help lists the arguments"
done
demonstrations=${demonstrations:-$data}
[ -z "$judge_url" ] || [ -n "$judge" ] || die "--judge-url $judge_url needs --judge, the model's name there"
[ -z "$judge" ] || [ -n "$judge_url" ] || [ -n "${OPENAI_API_KEY:-}" ] ||
  die "--judge $judge has no key: set OPENAI_API_KEY, or give --judge-url"
absolute() { realpath --no-symlinks --canonicalize-missing "$1"; }
for directory in "$llama" "$data" "$demonstrations" "$recipes"; do
  [ -d "$directory" ] || die "$directory is not a directory"
done
llama=$(absolute "$llama") data=$(absolute "$data") demonstrations=$(absolute "$demonstrations")
out=$(absolute "$out") recipes=$(absolute "$recipes")
for method in sft reward dpo generate score $methods; do
  [ -e "$recipes/$method.yaml" ] || die "$recipes/$method.yaml does not exist"
done
declare -A prompts_of rubric_of # by task; main is --data's
tasks=(main) prompts_of[main]=$data/eval rubric_of[main]=$rubric
for given in "${given_tasks[@]}"; do
  [[ $given =~ ^([A-Za-z0-9_-]+)=([^,]+)(,(.+))?$ ]] || die "--task $given is not NAME=DIR[,RUBRIC]"
  name=${BASH_REMATCH[1]}
  [ -z "${prompts_of[$name]:-}" ] || die "--task $name is given twice, or is main, which stands for --data"
  [ -d "${BASH_REMATCH[2]}" ] || die "--task $name: ${BASH_REMATCH[2]} is not a directory"
  tasks+=("$name") prompts_of[$name]=$(absolute "${BASH_REMATCH[2]}") rubric_of[$name]=${BASH_REMATCH[4]:-helpful}
done
for name in "${tasks[@]}"; do
  case ${rubric_of[$name]} in
    helpful | harmless | summary) continue ;;
  esac
  [ -f "${rubric_of[$name]}" ] || die "rubric ${rubric_of[$name]} of $name: no such file, nor helpful, harmless or summary"
  rubric_of[$name]=$(absolute "${rubric_of[$name]}")
done
. "$slurm_dir/env.sh"

# --- the arguments of each stage
sft=$out/sft/final/policy reward=$out/reward/final/reward_model task=main
own() { # own STAGE: the overrides for it and, where it has one, the task, one a line
  local override
  for override in "${overrides[@]}"; do
    case $override in
      "$1":* | "$1.$task":*) echo "${override#*:}" ;;
      sft:* | reward:* | dpo:* | ppo:* | generate:* | score:* | generate.*:* | score.*:*) ;;
      *) case $1 in generate | score) ;; *) echo "$override" ;; esac ;;
    esac
  done
}
responses_of() { [ "$1" = main ] && echo "$out/responses" || echo "$out/responses/$1"; }
scores_of() { [ "$1" = main ] && echo "$out/scores" || echo "$out/scores/$1"; }
stage_arguments() { # stage_arguments STAGE: the command line of megatron-gil for it and the task, one argument a line
  case $1 in
    sft)
      printf '%s\n' sft --config "$recipes/sft.yaml" run.dir="$out/sft" models.policy="$out/llama" \
        data.train="$demonstrations/train" data.eval="$demonstrations/eval" ;;
    reward)
      printf '%s\n' reward --config "$recipes/reward.yaml" run.dir="$out/reward" models.reward_model="$sft" \
        data.train="$data/train" data.eval="$data/eval" ;;
    dpo)
      printf '%s\n' dpo --config "$recipes/dpo.yaml" run.dir="$out/dpo" models.policy="$sft" \
        data.train="$data/train" data.eval="$data/eval" ;;
    ppo)
      printf '%s\n' ppo --config "$recipes/{method}.yaml" run.dir="$out/{method}" models.policy="$sft" \
        models.reward_model="$reward" data.train="$data/train" data.eval="${prompts_of[main]}" ;;
    generate)
      printf '%s\n' generate --config "$recipes/generate.yaml" models.policy="$out/{method}/final/policy" \
        data.train="${prompts_of[$task]}" output="$(responses_of "$task")/{method}.jsonl" ;;
    score)
      printf '%s\n' score --config "$recipes/score.yaml" models.reward_model="$reward" \
        data.train="$(responses_of "$task")/{method}.jsonl" output="$(scores_of "$task")/{method}.jsonl" ;;
  esac
  own "$1"
}

# --- what can be wrong is found now, not after days
ranks_per_node=1
for option in "${train_options[@]}"; do
  case $option in --ntasks-per-node=*) ranks_per_node=${option#*=} ;; esac
done
check() { # check STAGE [METHOD]: the command's own --dry-run, with sizes of the base model where a stage has yet to run
  local arguments ranks=$((nodes * ranks_per_node))
  [ "$1" != generate ] || ranks=$ranks_per_node
  mapfile -t arguments < <(stage_arguments "$1")
  arguments=("${arguments[@]//\{method\}/${2:-}}")
  echo "== ${2:-$1}"
  "${launch[@]}" -m megatron_gil "${arguments[@]}" --dry-run --gpus "$ranks" --sizes-from "$llama" ||
    die "stage ${2:-$1} cannot run as it is; see the line above"
}
cd "$project_dir"
if [ -n "$no_check" ]; then
  :
elif "${launch[@]}" -c 'import megatron_gil' 2> /dev/null; then
  checks=$(check sft && check reward && check dpo && for method in $methods; do check ppo "$method" || exit 2; done &&
    for task in "${tasks[@]}"; do check generate "generate.$task" || exit 2; done) || exit 2
  [ -z "$dry_run" ] || printf '%s\n' "$checks"
else
  echo "pipeline.sh: megatron_gil does not import here (${launch[*]}); the stages are not checked before they run" >&2
fi

# --- submit
submit() { # submit NAME AFTER OPTION... -- ARGUMENT...: the job's number; AFTER: numbers joined by colons, or nothing
  local name=$1 after=$2 options=()
  shift 2
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  set -- sbatch --parsable --job-name="$name" --output="$out/logs/$name${array:+.%a}.log" "${job_options[@]}" \
    "${options[@]}" ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "$@"
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@" >&2
    echo >&2
    echo "\$$name"
    return
  fi
  local number
  number=$("$@") || die "sbatch refused the stage $name; cancel those before it: scancel $(tr '\n' ' ' < "$out/jobs")"
  number=${number%%;*} # with several clusters, JOB;CLUSTER
  echo "$number" >> "$out/jobs"
  echo "$name: job $number" >&2
  echo "$number"
}
train() { # train STAGE AFTER NODES [METHODS]: with methods, an array of one job each
  local arguments array='' name=$1
  [ "$task" = main ] || name+=.$task
  mapfile -t arguments < <(stage_arguments "$1")
  if [ -n "${4:-}" ]; then
    local words
    read -ra words <<< "$4"
    array=--array=0-$((${#words[@]} - 1))
  fi
  MEGATRON_GIL_METHODS=${4:-} submit "$name" "$2" "${train_options[@]}" --nodes="$3" \
    --signal=B:USR1@"$save_seconds" ${array:+"$array"} -- "$slurm_dir/train.sbatch" "${arguments[@]}"
}
tool() { # tool NAME AFTER PRODUCT ARGUMENT...
  local array=''
  submit "$1" "$2" "${tool_options[@]}" -- "$slurm_dir/tool.sbatch" "${@:3}"
}

export MEGATRON_GIL_LOG=$out/pipeline.log MEGATRON_GIL_CLUSTER=${MEGATRON_GIL_CLUSTER:-$slurm_dir/cluster.sh}
if [ -z "$dry_run" ]; then
  mkdir -p "$out"/{logs,tables}
  for name in "${tasks[@]}"; do mkdir -p "$(responses_of "$name")" "$(scores_of "$name")"; done
  if [ -s "$out/jobs" ] && alive=$(squeue --noheader --format=%A --jobs "$(paste -sd, "$out/jobs")" 2> /dev/null) &&
    [ -n "$alive" ]; then
    die "$out: jobs of this chain are still there: $(echo "$alive" | sort -u | paste -sd' '); scancel them first"
  fi
  : > "$out/jobs"
fi
all="sft dpo $methods" first=${methods%% *}
job_import=$(tool import "" "$out/llama" tools/convert_hf.py import "$llama" "$out/llama")
job_sft=$(train sft "$job_import" "$nodes")
job_reward=$(train reward "$job_sft" "$nodes")
job_dpo=$(train dpo "$job_sft" "$nodes")
job_ppo=$(train ppo "$job_reward" "$nodes" "$methods")
tool export "$job_ppo" "$out/policy_hf" tools/convert_hf.py export "$out/$first" "$out/policy_hf" > /dev/null
runs=() rest=()
for method in $all; do
  runs+=("$out/$method")
  [ "$method" = "$first" ] || rest+=("$method.jsonl")
done
jobs_judged='' judgments=()
judged_by() { # judged_by NAME OPTION...: a job that compares the first method with the rest on the task
  local table=$out/tables/$task.$1 scores
  scores=$(scores_of "$task")
  jobs_judged+=:$(tool "evaluate.$task.$1" "$job_score" "$table.json" -m megatron_gil evaluate "$scores/$first.jsonl" \
    "${rest[@]/#/$scores/}" --task "$task" --output "$table.json" "${@:2}")
  judgments+=("$table.judgments.jsonl")
}
for task in "${tasks[@]}"; do
  job_generate=$(train generate "$job_ppo:$job_dpo" 1 "$all")
  job_score=$(train score "$job_generate" 1 "$all")
  judged_by score
  [ -z "$judge" ] || judged_by llm --judge llm --model "$judge" ${judge_url:+--base-url "$judge_url"} \
    --rubric "${rubric_of[$task]}" --answers "$out/tables/$task.answers.sqlite"
done
job_win_rates=$(tool win_rates "${jobs_judged#:}" "$out/win_rates.json" -m megatron_gil win-rates "${judgments[@]}" \
  --output "$out/win_rates.json")
tool report "$job_win_rates" "$out/report.html" -m megatron_gil report "${runs[@]}" "$out/reward" \
  --judgments "${judgments[@]}" --output "$out/report.html" > /dev/null
[ -n "$dry_run" ] || echo "what happens is written to $out/pipeline.log, one line a step; logs of the stages: $out/logs"
