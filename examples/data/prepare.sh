# shellcheck shell=bash
# Brings a corpus from the Hugging Face Hub and writes what Megatron trains on; an example sets NAME,
# CORPUS and what to read of it, and sources this file.
#
# Variables:
#   DATA_DIR       where to write, else data/NAME; the same for examples/pretrain_*.sh afterwards
#   TRAIN_TOKENS, VALID_TOKENS   else 50 billion and 10 million, up to the end of a document
#   TOKENIZER      a repository on the Hub with a tokenizer.model, or such a file; else Llama's, which
#                  is gated: accept its license and set HF_TOKEN. TinyLlama/TinyLlama_v1.1 has the same
#                  32,000 pieces and is open
#   CORPUS         a directory with a copy of the repository, to read that instead
#   TRAIN_FILES, VALID_FILES     files, directories or patterns to read instead, such as those of C4
#                  where it has been brought before
#   SHARD          I/N: one of N jobs that run at once and share DATA_DIR, each with its own I; then one
#                  start without it joins their shards
#   WORKERS        processes that tokenize, else all cores
#   PYTHON         else that of scripts/setup.sh; it needs the package datasets
#
# Texts are streamed; DATA_DIR needs twice the size of the tokens, 200 GB for 50 billion of them, and
# half of it in the end. Started again it goes on with what is missing, file by file of the corpus.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# run COMMAND...: runs it, or prints it for a dry run.
run() {
  if [[ $dry_run == yes ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# make SPLIT TOKENS SOURCE...: one data set, unless it is there.
make() {
  local split=$1 tokens=$2
  shift 2
  local shards=$DATA_DIR/$split.shards data=$DATA_DIR/${split}_text_document
  if [[ -f $data.idx ]]; then
    echo "there already: $data"
    return
  fi
  run "$PYTHON" "$repo/tools/preprocess_data.py" "$@" --output-dir "$shards" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA_DIR/tokenizer.model" \
    --append-eod --stop-after-tokens "$tokens" \
    ${SHARD:+--shard "$SHARD"} ${WORKERS:+--workers "$WORKERS"}
  [[ -z ${SHARD:-} ]] || return 0
  run "$PYTHON" "$repo/tools/dataset.py" merge "$shards" --tokens "$tokens" --output "$data"
  run rm -r "$shards"
}

prepare() {
  dry_run=no
  [[ ${1:-} != --dry-run ]] || { dry_run=yes && shift; }
  (($# == 0)) || fail "$1: unknown; the only option is --dry-run"
  DATA_DIR=${DATA_DIR:-data/$NAME}
  TRAIN_TOKENS=${TRAIN_TOKENS:-50000000000}
  VALID_TOKENS=${VALID_TOKENS:-10000000}
  TOKENIZER=${TOKENIZER:-meta-llama/Llama-2-7b-hf}
  train=(--dataset "$CORPUS" "${train[@]}")
  valid=(--dataset "$CORPUS" "${valid[@]}")
  [[ -z ${TRAIN_FILES:-} ]] || train=(--input "$TRAIN_FILES")
  [[ -z ${VALID_FILES:-} ]] || valid=(--input "$VALID_FILES")
  if [[ $dry_run == yes ]]; then
    PYTHON=${PYTHON:-python3}
  else
    PYTHON=${PYTHON:-$(bash "$repo/scripts/setup.sh")}
    mkdir -p "$DATA_DIR"
  fi
  if [[ -f $DATA_DIR/tokenizer.model ]]; then
    echo "there already: $DATA_DIR/tokenizer.model"
  elif [[ -f $TOKENIZER ]]; then
    run cp "$TOKENIZER" "$DATA_DIR/tokenizer.model"
  else
    run "$PYTHON" "$repo/tools/hub.py" tokenizer "$TOKENIZER" "$DATA_DIR/tokenizer.model"
  fi
  make valid "$VALID_TOKENS" "${valid[@]}"
  make train "$TRAIN_TOKENS" "${train[@]}"
}
