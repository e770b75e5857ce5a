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
tools=$here/../../tools
python=${PYTHON:-python}
if [ "${NPROC:-1}" -gt 1 ]; then
  gil=("$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m megatron_gil)
else
  gil=("$python" -m megatron_gil)
fi

run() { # run COMMAND ARGUMENT...: with the overrides for every command and those for this one
  local command=$1 override own=()
  for override in "${overrides[@]}"; do
    case $override in
      "$command":*) own+=("${override#*:}") ;;
      sft:* | reward:* | ppo:* | generate:*) ;;
      *) own+=("$override") ;;
    esac
  done
  echo "== $command"
  "${gil[@]}" "$@" "${own[@]}"
}

newest() { # newest RUN ROLE: the directory of a role in a run's newest checkpoint
  echo "$(printf '%s\n' "$1"/checkpoints/iter_* | tail -n 1)/$2"
}

mkdir -p "$out"
[ -d "$out/data" ] || "$python" "$tools/prepare_data.py" hh --input "$hh" --output "$out/data"
[ -d "$out/llama" ] || "$python" "$tools/convert_hf.py" import "$llama" "$out/llama"

run sft --config "$here/sft.yaml" run.dir="$out/sft" models.policy="$out/llama" \
  data.train="$out/data/train" data.eval="$out/data/eval"
run reward --config "$here/reward.yaml" run.dir="$out/reward" models.reward_model="$(newest "$out/sft" policy)" \
  data.train="$out/data/train" data.eval="$out/data/eval"
run ppo --config "$here/ppo_gil.yaml" run.dir="$out/ppo_gil" models.policy="$(newest "$out/sft" policy)" \
  models.reward_model="$(newest "$out/reward" reward_model)" data.train="$out/data/train"

[ -e "$out/responses.jsonl" ] || run generate models.policy="$(newest "$out/ppo_gil" policy)" \
  data.train="$out/data/eval" data.max_prompt_tokens=192 sampling.max_new_tokens=48 sampling.temperature=0.8 \
  sampling.top_p=0.9 output="$out/responses.jsonl"
[ -d "$out/policy_hf" ] || "$python" "$tools/convert_hf.py" export "$out/ppo_gil" "$out/policy_hf"
"$python" -m megatron_gil report "$out/sft" "$out/reward" "$out/ppo_gil" --output "$out/report.html"
echo "samples of the training: $out/ppo_gil/samples.jsonl; answers to held-out prompts: $out/responses.jsonl"
echo "the policy for transformers and vLLM: $out/policy_hf"
