#!/usr/bin/env bash
# HH-RLHF end to end; see README.md beside this file.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 LLAMA_DIR HH_FILE OUTPUT_DIR [[COMMAND:]section.key=value ...]" >&2
  exit 2
fi
llama=$1 hh=$2 out=$3
overrides=("${@:4}")
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
python=${PYTHON:-}
for found in "$project/.venv/bin/python" python python3; do # no activated environment is needed
  [ -n "$python" ] || ! command -v "$found" > /dev/null || python=$found
done
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
if ! "${python:-false}" -c 'from importlib.util import find_spec as f; assert f("megatron") and f("torch")' 2> /dev/null; then
  echo "$0: ${python:-python} has no torch or no megatron-core; run \`make setup\` in $project, or name another in PYTHON" >&2
  exit 2
fi
one=("$python" -m megatron_gil) gil=("$python" -m megatron_gil)
if [ "${NPROC:-1}" -gt 1 ]; then
  gil=("$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m megatron_gil)
fi

newest() { # newest RUN ROLE: the directory of a role in a run's newest checkpoint
  echo "$(printf '%s\n' "$1"/checkpoints/iter_* | tail -n 1)/$2"
}
command_line() { # command_line COMMAND: its arguments, one a line, with the overrides for it
  local sft reward policy override
  sft=$(newest "$out/sft" policy) reward=$(newest "$out/reward" reward_model) policy=$(newest "$out/ppo_gil" policy)
  case $1 in
    sft)
      printf '%s\n' sft --config "$here/sft.yaml" run.dir="$out/sft" models.policy="$out/llama" \
        data.train="$out/data/train" data.eval="$out/data/eval" ;;
    reward)
      printf '%s\n' reward --config "$here/reward.yaml" run.dir="$out/reward" models.reward_model="$sft" \
        data.train="$out/data/train" data.eval="$out/data/eval" ;;
    ppo)
      printf '%s\n' ppo --config "$here/ppo_gil.yaml" run.dir="$out/ppo_gil" models.policy="$sft" \
        models.reward_model="$reward" data.train="$out/data/train" ;;
    generate)
      printf '%s\n' generate models.policy="$policy" data.train="$out/data/eval" data.max_prompt_tokens=192 \
        sampling.max_new_tokens=48 sampling.temperature=0.8 sampling.top_p=0.9 output="$out/responses.jsonl" ;;
  esac
  for override in "${overrides[@]}"; do
    case $override in
      "$1":*) echo "${override#*:}" ;;
      sft:* | reward:* | ppo:* | generate:*) ;;
      *) [ "$1" = generate ] || echo "$override" ;; # as slurm/pipeline.sh: for every training command
    esac
  done
}
check() { # check COMMAND: whether it can run, with the sizes of the Llama where a model is yet to be trained
  local arguments
  mapfile -t arguments < <(command_line "$1")
  "${one[@]}" "${arguments[@]}" --dry-run --gpus "${NPROC:-1}" --sizes-from "$out/llama" > /dev/null
}
run() { # run COMMAND
  local arguments
  mapfile -t arguments < <(command_line "$1")
  echo "== $1"
  "${gil[@]}" "${arguments[@]}"
}

mkdir -p "$out"
[ -d "$out/data" ] || "${one[@]}" prepare-data hh --input "$hh" --output "$out/data"
[ -d "$out/llama" ] || "${one[@]}" convert import "$llama" "$out/llama"

# What is wrong is found now, and not after the training before it.
for command in sft reward ppo; do check $command; done
[ -e "$out/responses.jsonl" ] || check generate

for command in sft reward ppo; do run $command; done
[ -e "$out/responses.jsonl" ] || run generate
[ -d "$out/policy_hf" ] || "${one[@]}" convert export "$out/ppo_gil" "$out/policy_hf"
"${one[@]}" report "$out/sft" "$out/reward" "$out/ppo_gil" --output "$out/report.html"
echo "samples of the training: $out/ppo_gil/samples.jsonl; answers to held-out prompts: $out/responses.jsonl"
echo "the policy for transformers and vLLM: $out/policy_hf"
