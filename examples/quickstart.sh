#!/usr/bin/env bash
# The whole story on one machine: from nothing to a trained ProRes language model, in minutes.
#
#   bash examples/quickstart.sh            # goes on where an earlier start left off, if there was one
#   bash examples/quickstart.sh --fresh    # starts the training over; text and tokenizer are kept
#
# Needs no GPU and downloads nothing but Python packages: the text is the source code and the
# documentation of the Python on this machine. With GPUs it trains on those, else on two CPU cores.
#
# Settings (environment variables), with what a step costs on two CPU cores:
PRORES_RUN_DIR=${PRORES_RUN_DIR:-runs/quickstart}   # where everything goes
PRORES_CORPUS_MB=${PRORES_CORPUS_MB:-12}            # text, in MB                       (5 s)
PRORES_VOCAB=${PRORES_VOCAB:-4096}                  # pieces of the tokenizer           (5 s)
PRORES_LAYERS=${PRORES_LAYERS:-12}                  # depth of the model; even
PRORES_ITERS=${PRORES_ITERS:-300}                   # training iterations               (3 min)
PRORES_SCHEDULE=${PRORES_SCHEDULE:-linear}          # of the paper, or none: plain Megatron
PRORES_WARMUP_ITERS=${PRORES_WARMUP_ITERS:-$((PRORES_ITERS * 3 / 5))} # the whole ProRes warmup
# The environment has settings of its own: see scripts/setup.sh.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$PRORES_RUN_DIR
[[ $run == /* ]] || run=$repo/$run

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Of Megatron's log, the lines that tell how training goes: losses, checkpoints, and the layer map.
show_progress() {
  sed -u -nE '/iteration +[0-9]+\/|validation loss|(saved|loaded) checkpoint|> ProRes:|^error:/p' |
    sed -u -E 's/ \| (loss scale|number of (skipped|nan) iterations|global batch size|consumed samples): +[0-9.]+//g; s/Number of parameters[^[]*$//; s/^Number of parameters[^[]*//'
}

fresh=no
case ${1:-} in
  --fresh) fresh=yes ;;
  '') ;;
  *) fail "$1: unknown; the only option is --fresh" ;;
esac
for number in PRORES_CORPUS_MB PRORES_VOCAB PRORES_LAYERS PRORES_ITERS PRORES_WARMUP_ITERS; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "$number=${!number}: give a whole number above 0"
done
((PRORES_LAYERS % 2 == 0)) || fail "PRORES_LAYERS=$PRORES_LAYERS: give an even number, for 2 pipeline stages"

say "1/7 environment"
PYTHON=$(bash "$repo/scripts/setup.sh")
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
# Megatron says at every start which optional packages it does without.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

# A run can only go on with the settings that it was started with.
settings="layers=$PRORES_LAYERS iterations=$PRORES_ITERS schedule=$PRORES_SCHEDULE"
settings+=" warmup=$PRORES_WARMUP_ITERS text=${PRORES_CORPUS_MB}MB vocabulary=$PRORES_VOCAB"
mkdir -p "$run"
if [[ $fresh == yes ]]; then
  echo "starting over: the checkpoints and logs in $run are deleted, as --fresh asks"
  rm -rf "$run"/{checkpoints,tensorboard,wandb,train.log,settings}
elif [[ -f $run/checkpoints/latest_checkpointed_iteration.txt ]]; then
  before=$(cat "$run/settings")
  [[ $before == "$settings" ]] ||
    fail "the run in $run was started with other settings ($before, now $settings): give those, start over with --fresh, or choose another PRORES_RUN_DIR"
  echo "resuming at iteration $(cat "$run/checkpoints/latest_checkpointed_iteration.txt")" \
    "of $PRORES_ITERS (--fresh starts over)"
else
  echo "starting a new run in $run"
fi
echo "$settings" >"$run/settings"

data=$run/data-${PRORES_CORPUS_MB}mb-$PRORES_VOCAB
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model")

say "2/7 text: this machine's Python library, split by file"
if [[ -f $data/train.jsonl && -f $data/valid.jsonl ]]; then
  echo "there already: $data"
else
  "$PYTHON" "$repo/tools/build_corpus.py" --output-dir "$data" \
    --min-megabytes $((PRORES_CORPUS_MB < 10 ? PRORES_CORPUS_MB / 2 : 10)) \
    --max-megabytes "$PRORES_CORPUS_MB" --validation-fraction 0.05
fi

say "3/7 tokenizer"
if [[ -f $data/tokenizer.model ]]; then
  echo "there already: $data/tokenizer.model"
else
  "$PYTHON" "$repo/tools/train_tokenizer.py" --input "$data/train.jsonl" \
    --vocab-size "$PRORES_VOCAB" --output "$data/tokenizer.model"
fi

say "4/7 tokens, in Megatron's format"
for split in train valid; do
  if [[ -f $data/${split}_text_document.idx ]]; then
    echo "there already: $data/${split}_text_document"
  else
    "$PYTHON" "$repo/tools/preprocess_data.py" --input "$data/$split.jsonl" \
      --output-prefix "$data/$split" "${tokenizer[@]}" --append-eod --workers 2
  fi
done

# A small Llama-like model, deep and narrow, with the paper's recipe: AdamW, a warmup of the learning
# rate, a constant phase, and a linear decay.
model=(
  --num-layers "$PRORES_LAYERS" --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 4
  --seq-length 128 --max-position-embeddings 128 --normalization RMSNorm --norm-epsilon 1e-5
  --swiglu --disable-bias-linear --position-embedding-type rope
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
training=(
  --micro-batch-size 2 --global-batch-size 12 --train-iters "$PRORES_ITERS"
  --lr 2e-3 --min-lr 0 --lr-decay-style WSD --lr-warmup-iters $((PRORES_ITERS / 20))
  --lr-wsd-decay-style linear --lr-wsd-decay-iters $((PRORES_ITERS / 10 + 1))
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.02
)
interval=$((PRORES_ITERS < 6 ? 1 : PRORES_ITERS / 6))
logging=(
  --log-interval $((PRORES_ITERS < 30 ? 1 : PRORES_ITERS / 30))
  --eval-interval "$interval" --eval-iters 8
  --save "$run/checkpoints" --load "$run/checkpoints" --save-interval "$((2 * interval))"
  --tensorboard-dir "$run/tensorboard"
  --wandb-project prores-quickstart --wandb-exp-name "$PRORES_SCHEDULE" --wandb-save-dir "$run"
)
# Without a device of the driver there is no GPU, which torch takes seconds to find out.
gpus=0
if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]; then
  gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
if ((gpus >= 1)); then
  ranks=$((gpus >= 2 ? 2 : 1))
  without=()
  "$PYTHON" -c 'import torch, transformer_engine' 2>/dev/null || without+=(transformer_engine)
  "$PYTHON" -c 'import torch, fused_weight_gradient_mlp_cuda' 2>/dev/null || without+=(apex)
  flags=$("$PYTHON" -m studies.paper.recipes gpu-flags "$ranks" "$ranks" 1 "$ranks" bf16 "${without[*]}")
  # shellcheck disable=SC2206 # flags, in a string
  device=(--device cuda --bf16 $flags)
else
  ranks=2
  device=(--device cpu)
fi

say "5/7 training: $PRORES_ITERS iterations on $ranks pipeline rank(s), ${device[1]}"
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=${WANDB_SILENT:-true}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) >= 4 ? $(nproc) / 2 : 1))}
# In the background, so that a signal to this script is handed on at once: the run saves and ends.
exec {progress}> >(trap '' INT TERM USR1; tee -a "$run/train.log" | show_progress)
progress_pid=$!
"$PYTHON" -m megatron_prores.launch --standalone --nproc-per-node "$ranks" \
  "$repo/pretrain_gpt_prores.py" "${device[@]}" --pipeline-model-parallel-size "$ranks" \
  "${model[@]}" "${training[@]}" "${tokenizer[@]}" \
  --train-data-path "$data/train_text_document" --valid-data-path "$data/valid_text_document" \
  --prores-schedule "$PRORES_SCHEDULE" --prores-warmup-iters "$PRORES_WARMUP_ITERS" \
  "${logging[@]}" >&"$progress" 2>&1 {progress}>&- &
training_pid=$!
exec {progress}>&-
trap 'signalled=yes; kill -TERM "$training_pid" 2>/dev/null || true' INT TERM USR1
signalled=yes
while [[ $signalled == yes ]]; do # a signal ends the waiting, not the run
  signalled=no
  code=0
  wait "$training_pid" || code=$?
done
wait "$progress_pid" || true
trap - INT TERM USR1
case $code in
  0) ;;
  75)
    say "interrupted, and saved"
    echo "the same command goes on at iteration $(cat "$run/checkpoints/latest_checkpointed_iteration.txt") of $PRORES_ITERS"
    exit 75
    ;;
  *)
    tail -n 40 "$run/train.log" >&2
    fail "training failed; the whole log is $run/train.log"
    ;;
esac

say "6/7 picture"
"$PYTHON" "$repo/tools/plot_run.py" --tensorboard-dir "$run/tensorboard" \
  --output "$run/run.png" --title "ProRes quickstart: $PRORES_LAYERS layers, $PRORES_SCHEDULE"

say "7/7 the model for others, and what it writes"
"$PYTHON" -W ignore "$repo/tools/export_hf.py" --load "$run/checkpoints" --output "$run/model" \
  --overwrite
"$PYTHON" -W ignore "$repo/tools/generate.py" --load "$run/checkpoints" \
  --prompt "def " --prompt "import " --max-new-tokens 32 --temperature 0.7

say "done"
cat <<END
checkpoint       $run/checkpoints (iteration $(cat "$run/checkpoints/latest_checkpointed_iteration.txt"))
TensorBoard      $run/tensorboard
W&B, offline     $run/wandb
training log     $run/train.log
picture          $run/run.png
Hugging Face     $run/model
validation loss  $(grep -oE 'validation loss at iteration [0-9]+ on validation set \| lm loss value: [0-9.E+-]+' "$run/train.log" | tail -n 1 | awk '{print $NF + 0}') (mean over 8 batches of text from held-out files)
END
