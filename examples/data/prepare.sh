# shellcheck shell=bash
# Brings a corpus from the Hugging Face Hub and writes what Megatron trains on; an example sets NAME
# and what to read, and sources this file. Nothing else is kept on disk: 100 GB for 50 billion tokens.
#
# Variables:
#   DATA_DIR       where to write, else data/NAME; the same for examples/pretrain_*.sh afterwards
#   TRAIN_TOKENS, VALID_TOKENS   else 50 billion and 10 million; at most 100,000 more are written
#   TOKENIZER      a repository on the Hub with a tokenizer.model, or such a file; else Llama's, which
#                  is gated: accept its license and set HF_TOKEN. TinyLlama/TinyLlama_v1.1 has the same
#                  32,000 pieces and is open
#   TRAIN_FILES, VALID_FILES     patterns of JSON lines to read instead, such as those of C4 where it
#                  has been brought before
#   WORKERS        processes that tokenize, else all cores
#   PYTHON         else that of scripts/setup.sh; it needs the package datasets
#
# Started again it goes on with what is missing: the tokenizer, the one or the other data set.

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

# tokenize SPLIT TOKENS: reads JSON lines.
tokenize() {
  run "$PYTHON" "$repo/tools/preprocess_data.py" --input - --output-prefix "$DATA_DIR/$1" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA_DIR/tokenizer.model" \
    --append-eod --stop-after-tokens "$2" ${WORKERS:+--workers "$WORKERS"}
}

# make SPLIT TOKENS SOURCE...: one data set, unless it is there.
make() {
  local split=$1 tokens=$2 code
  shift 2
  if [[ -f $DATA_DIR/${split}_text_document.idx ]]; then
    echo "there already: $DATA_DIR/${split}_text_document"
    return
  fi
  local read=("$PYTHON" "$repo/tools/hub.py" text "$@")
  if [[ $dry_run == yes ]]; then
    printf '%s | \\\n  %s\n' "$(run "${read[@]}")" "$(tokenize "$split" "$tokens")"
    return
  fi
  "${read[@]}" --documents 1 >/dev/null # ends here where it cannot be reached
  code=0
  "${read[@]}" | tokenize "$split" "$tokens" || code=$?
  # 141: it had enough, and the reader was told by SIGPIPE.
  ((code == 0 || code == 141)) || exit "$code"
}

prepare() {
  dry_run=no
  [[ ${1:-} != --dry-run ]] || { dry_run=yes && shift; }
  (($# == 0)) || fail "$1: unknown; the only option is --dry-run"
  DATA_DIR=${DATA_DIR:-data/$NAME}
  TRAIN_TOKENS=${TRAIN_TOKENS:-50000000000}
  VALID_TOKENS=${VALID_TOKENS:-10000000}
  TOKENIZER=${TOKENIZER:-meta-llama/Llama-2-7b-hf}
  [[ -z ${TRAIN_FILES:-} ]] || train=(--dataset json --data-files "$TRAIN_FILES")
  [[ -z ${VALID_FILES:-} ]] || valid=(--dataset json --data-files "$VALID_FILES")
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
