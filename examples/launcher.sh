# shellcheck shell=bash
# How a published run is started; an example says which in NAME and sources this file. The numbers of
# the runs are in studies/paper/runs.toml.
#
#   bash examples/pretrain_130m.sh                       # pre-norm with ProRes, schedule linear
#   bash examples/pretrain_130m.sh post plain            # post-norm without ProRes
#   bash examples/pretrain_130m.sh --dry-run deepnorm prores linear_sqrt
#   bash examples/pretrain_130m.sh pre --seed 7          # flags go on to pretrain_gpt_prores.py
#
# Words:      a placement (pre sandwich post deepnorm lns; scaled, ds: pre with these initial
#             weights), prores or plain, a schedule. Default: pre prores linear.
# --dry-run   prints the whole command, for node NODE_RANK, and starts nothing.
#
# Started once per node; inside of Slurm the nodes find each other, elsewhere they need NNODES,
# NODE_RANK and MASTER_ADDR. The same command started again goes on where the run was saved.
# docs/launch.md explains the settings below, all of them environment variables. What is passed on as
# it is, the program checks, in one line and before any work.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# is_one_of WORD WORDS...
is_one_of() { [[ " ${*:2} " == *" $1 "* ]]; }

# ---- The method, in words ------------------------------------------------------------------------

PLACEMENTS=(pre sandwich post deepnorm lns scaled ds)
SCHEDULES=(linear linear_sqrt linear_square equal reverse stagewise_0 stagewise_L stagewise_sqrt_L
  stagewise_sqrt_l fix_L fix_sqrt_L fix_sqrt_l)

# read_method WORDS AND FLAGS...: sets placement, prores, schedule, method, dry_run, and flags.
read_method() {
  placement='' prores='' schedule='' dry_run=no flags=()
  local word kind
  for word; do
    if [[ $word == --dry-run ]]; then
      dry_run=yes
    elif ((${#flags[@]})) || [[ $word == -* ]]; then
      flags+=("$word")
    else
      if is_one_of "$word" "${PLACEMENTS[@]}"; then
        kind=placement
      elif is_one_of "$word" prores plain; then
        kind=prores
      elif is_one_of "$word" "${SCHEDULES[@]}"; then
        kind=schedule
      else
        fail "$word: no such word; a placement is one of ${PLACEMENTS[*]}; then prores or plain;" \
          "a schedule is one of ${SCHEDULES[*]}; flags of the program begin with --"
      fi
      [[ -z ${!kind} ]] || fail "${!kind} $word: give one $kind"
      printf -v "$kind" %s "$word"
    fi
  done
  [[ $prores != plain || -z $schedule ]] || fail "plain $schedule: a schedule is one of prores"
  placement=${placement:-pre} prores=${prores:-prores}
  [[ $prores == plain ]] || schedule=${schedule:-linear}
  method=$placement-$prores${schedule:+-$schedule}
}

# ---- The table of runs ---------------------------------------------------------------------------

# table WORDS...: what studies/paper/recipes.py prints. PYTHON may be one of another machine, and that
# of scripts/setup.sh is not made before the words are known to be right.
table() {
  local python
  for python in "${PYTHON:-python3}" python3; do
    "$python" -c 'import tomllib' 2>/dev/null || continue
    PYTHONPATH=$repo "$python" -m studies.paper.recipes "$@" || exit 2
    return
  done
  fail "${PYTHON:-python3}: not a Python 3.11 or newer, which reads studies/paper/runs.toml:" \
    "set PYTHON, as by PYTHON=\$(bash scripts/setup.sh)"
}

# choose_job STUDY ARGUMENTS...: for a study of several runs. Sets chosen: the arguments, with --job
# NUMBER replaced by the words of that job. --list prints the jobs and ends.
# shellcheck disable=SC2034 # chosen is the example's
choose_job() {
  local study=$1 dry=() jobs=()
  shift
  if [[ ${1:-} == --list ]]; then
    table jobs "$study"
    exit 0
  fi
  if [[ ${1:-} == --dry-run ]]; then
    dry=(--dry-run)
    shift
  fi
  (($#)) || fail "which run of the study? ${0##*/} --list shows them"
  if [[ $1 == --job ]]; then
    mapfile -t jobs < <(table jobs "$study")
    ((${#jobs[@]})) || exit 2
    [[ ${2:-} =~ ^(0|[1-9][0-9]{0,5})$ && $2 -lt ${#jobs[@]} ]] ||
      fail "--job ${2:-}: give a number from 0 to $((${#jobs[@]} - 1)) (--list shows them)"
    read -ra chosen <<<"${jobs[$2]#* }"
    shift 2
  else
    chosen=("$1")
    shift
  fi
  chosen+=("$@" "${dry[@]}")
}

# check_numbers VARIABLES...: what is calculated with here, or would end in a traceback of torch's.
check_numbers() {
  local variable
  for variable; do
    [[ ${!variable} =~ ^[1-9][0-9]{0,9}$ ]] || fail "$variable=${!variable}: give a whole number above 0"
  done
}

# Sets the variables of the run NAME that the user has not set.
read_recipe() {
  local recipe name value own_warmup=${WARMUP_ITERS:-}${WARMUP_ITERS_PER_LAYER:-}
  [[ -z ${WARMUP_ITERS:-} || -z ${WARMUP_ITERS_PER_LAYER:-} ]] ||
    fail "WARMUP_ITERS and WARMUP_ITERS_PER_LAYER each say how long the ProRes warmup is: give one"
  lr_warmup_percent='' lr_decay_percent='' recipe_flags=''
  # shellcheck disable=SC2153 # NAME is the example's
  recipe=$(table settings "$NAME" "$placement" "${schedule:-none}") || exit 2
  while IFS='=' read -r name value; do
    [[ -n ${!name:-} || ($name == WARMUP_* && -n $own_warmup) ]] || printf -v "$name" %s "$value"
  done <<<"$recipe"
  # Tensor, pipeline and context ranks, virtual stages per pipeline rank.
  TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} VPP=${VPP:-1}
  check_numbers TRAIN_ITERS VOCAB_SIZE TP PP CP
  LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-$((TRAIN_ITERS * lr_warmup_percent / 100))}
  LR_DECAY_ITERS=${LR_DECAY_ITERS:-$(((TRAIN_ITERS * lr_decay_percent + 99) / 100))} # 1 at least
}

# ---- Settings that are not the run's -------------------------------------------------------------

# Jobs that share a host must not share a port; all nodes of one job must.
default_port() {
  [[ -z ${SLURM_JOB_ID:-} ]] && echo 29500 || echo $((15000 + SLURM_JOB_ID % 15000))
}

# The host of node 0, inside of Slurm.
first_host() { scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1; }

read_settings() {
  NNODES=${NNODES:-${SLURM_NNODES:-1}}
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
  GPUS_PER_NODE=${GPUS_PER_NODE:-8} # on the CPU device: ranks per node
  MASTER_PORT=${MASTER_PORT:-$(default_port)}
  NODE_WAIT_SECONDS=${NODE_WAIT_SECONDS:-600} # for all nodes to come
  # How long a rank waits for the others in one operation, a checkpoint for instance; and a launcher
  # for a heartbeat from another node's.
  DISTRIBUTED_TIMEOUT_MINUTES=${DISTRIBUTED_TIMEOUT_MINUTES:-10}
  SILENT_NODE_SECONDS=${SILENT_NODE_SECONDS:-600}
  DEVICE=${DEVICE:-cuda}
  PRECISION=${PRECISION:-$([[ $DEVICE == cpu ]] && echo fp32 || echo bf16)}
  MODEL_KIND=${MODEL_KIND:-gpt} # hybrid: the same model as Megatron's HybridModel (docs/hybrid.md)

  SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
  EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
  EVAL_ITERS=${EVAL_ITERS:-10}
  LOG_INTERVAL=${LOG_INTERVAL:-10}

  DATA=${DATA:-files} # mock: random tokens, no file is read
  DATA_DIR=${DATA_DIR:-data}
  TRAIN_DATA=${TRAIN_DATA:-$DATA_DIR/train_text_document}
  VALID_DATA=${VALID_DATA:-$DATA_DIR/valid_text_document}
  TOKENIZER_MODEL=${TOKENIZER_MODEL:-$DATA_DIR/tokenizer.model}
  RUN_DIR=${RUN_DIR:-runs/$NAME/$method}
  [[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
  # The folder of this start's logs in RUN_DIR/logs.
  local job=${SLURM_JOB_ID:+$SLURM_JOB_ID${SLURM_RESTART_COUNT:+.$SLURM_RESTART_COUNT}}
  LOG_ID=${LOG_ID:-${job:-$(date +%Y-%m-%d_%H-%M-%S)}}

  check_numbers NNODES GPUS_PER_NODE MASTER_PORT NODE_WAIT_SECONDS DISTRIBUTED_TIMEOUT_MINUTES
  ((MASTER_PORT < 65536)) || fail "MASTER_PORT=$MASTER_PORT: a port is less than 65536"
  is_one_of "$PRECISION" bf16 fp8 fp32 || fail "PRECISION=$PRECISION: choose bf16, fp8 or fp32"
  is_one_of "$MODEL_KIND" gpt hybrid || fail "MODEL_KIND=$MODEL_KIND: choose gpt or hybrid"
  is_one_of "$DATA" files mock || fail "DATA=$DATA: choose files or mock"
}

# Sets NODE_RANK, MASTER_ADDR, and rendezvous: torchrun's part of the command.
find_nodes() {
  [[ ${SLURM_LOCALID:-0} == 0 ]] ||
    fail "SLURM_LOCALID=$SLURM_LOCALID: start one launcher per node (srun --ntasks-per-node=1);" \
      "it starts the ranks of all GPUs itself"
  ((NNODES == 1)) || [[ -n $NODE_RANK ]] ||
    fail "NNODES=$NNODES needs NODE_RANK: 0 on the host of MASTER_ADDR, then 1 to $((NNODES - 1))," \
      "another on each node"
  NODE_RANK=${NODE_RANK:-0}
  [[ $NODE_RANK =~ ^[0-9]{1,6}$ && $NODE_RANK -lt $NNODES ]] ||
    fail "NODE_RANK=$NODE_RANK: nodes are numbered from 0, and NNODES=$NNODES"
  rendezvous=(--nproc-per-node "$GPUS_PER_NODE")
  if ((NNODES == 1)); then
    rendezvous+=(--standalone)
  else
    if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
      MASTER_ADDR=$(first_host)
    fi
    [[ -n ${MASTER_ADDR:-} ]] ||
      fail "NNODES=$NNODES needs MASTER_ADDR: the name or address of node 0, on all nodes"
    # Static: rank 0 is on node 0, whatever the order in which they come, and a run whose node is
    # lost ends on all nodes, to be started again from its checkpoint. --max-restarts stays 0: ranks
    # that torchrun restarted would have to find the same nodes, and a lost node does not come back.
    rendezvous+=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
      --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
      --rdzv-id "$NAME-$method" --rdzv-conf "timeout=$NODE_WAIT_SECONDS"
      --silent-node-seconds "$SILENT_NODE_SECONDS")
  fi
}

# hybrid_pattern: prints *- for each layer, cut where a stage of PP or a virtual stage of VPP ends.
hybrid_pattern() {
  local layer stages pattern=''
  check_numbers LAYERS PP VPP
  stages=$((PP * VPP))
  ((LAYERS % stages == 0)) ||
    fail "LAYERS=$LAYERS: they do not divide into PP=$PP times VPP=$VPP stages"
  for ((layer = 0; layer < LAYERS; layer++)); do
    ((layer == 0 || layer % (LAYERS / stages))) || pattern+='|'
    pattern+='*-'
  done
  echo "$pattern"
}

# ---- The command ---------------------------------------------------------------------------------

# build_command: sets command, from the settings.
build_command() {
  # 32000 pieces need no padding while this times TP divides them; Megatron's default is 128.
  local divisible=$((TP < 3 ? 128 : TP < 257 ? 256 / TP : 1)) norms warmup model training layout data pattern
  norms=(--norm-placement "$placement")
  ! is_one_of "$placement" scaled ds || norms=(--norm-placement pre --branch-init "$placement")
  warmup=(--prores-schedule "${schedule:-none}")
  if [[ $prores == prores && -n ${WARMUP_ITERS:-} ]]; then
    warmup+=(--prores-warmup-iters "$WARMUP_ITERS")
  elif [[ $prores == prores ]]; then
    warmup+=(--prores-warmup-iters-per-layer "$WARMUP_ITERS_PER_LAYER")
  fi
  if [[ $MODEL_KIND == hybrid ]]; then
    pattern=$(hybrid_pattern) || exit 2
    model=(--hybrid-layer-pattern "$pattern")
  else
    model=(--num-layers "$LAYERS")
  fi
  model+=(
    --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$HEADS" --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --make-vocab-size-divisible-by "$divisible"
  )
  training=(
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS" --lr "$LEARNING_RATE" --lr-warmup-iters "$LR_WARMUP_ITERS"
    --lr-wsd-decay-iters "$LR_DECAY_ITERS"
  )
  # shellcheck disable=SC2206 # the flags of every run, a string of the table
  training+=($recipe_flags)
  layout=(--device "$DEVICE" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable # for any layout, and for hybrid
    --distributed-timeout-minutes "$DISTRIBUTED_TIMEOUT_MINUTES")
  [[ $CP == 1 ]] || layout+=(--context-parallel-size "$CP")
  [[ $VPP == 1 || $MODEL_KIND == hybrid ]] || layout+=(--num-virtual-stages-per-pipeline-rank "$VPP")
  [[ $PRECISION == fp32 ]] || layout+=(--bf16)
  [[ $PRECISION != fp8 ]] || layout+=(--fp8-format hybrid --fp8-recipe tensorwise) # docs/fp8.md
  if [[ $DEVICE == cuda ]]; then
    # Megatron's own layers are the way out where Transformer Engine is missing.
    [[ -n ${TRANSFORMER_IMPL:-} ]] || ! lacks transformer_engine || TRANSFORMER_IMPL=local
    is_one_of "${TRANSFORMER_IMPL:-local}" local || layout+=(--transformer-impl "$TRANSFORMER_IMPL")
    choose_gpu_flags
    # shellcheck disable=SC2206 # flags, in a string
    layout+=($GPU_FLAGS)
  fi
  if [[ $DATA == mock ]]; then # the tokenizer adds one id
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$((VOCAB_SIZE - 1))")
  else # not quoted: Megatron takes several weighted data sets, "0.3 a 0.7 b"
    # shellcheck disable=SC2206
    data=(--train-data-path $TRAIN_DATA --valid-data-path $VALID_DATA
      --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER_MODEL")
  fi
  local logging=(
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --log-interval "$LOG_INTERVAL"
    --tensorboard-dir "$RUN_DIR/tensorboard" --log-throughput
  )
  [[ -z ${SAVE_RETAIN_INTERVAL:-} ]] || logging+=(--save-retain-interval "$SAVE_RETAIN_INTERVAL")
  [[ -z ${WANDB_PROJECT:-} ]] || logging+=(--wandb-project "$WANDB_PROJECT"
    --wandb-exp-name "${WANDB_NAME:-$NAME-$method}" --wandb-save-dir "$RUN_DIR")
  command=("$PYTHON" -m megatron_prores.launch "${rendezvous[@]}"
    --no-python bash "$repo/scripts/log_rank.sh" "$RUN_DIR/logs/$LOG_ID"
    "$PYTHON" "$repo/pretrain_gpt_prores.py" "${norms[@]}" "${warmup[@]}" "${model[@]}" "${training[@]}"
    "${layout[@]}" "${data[@]}" "${logging[@]}" "${flags[@]}")
}

# Sets GPU_FLAGS, the flags that make a run fast, unless the user has: megatron_prores/launch/gpu_flags.py.
choose_gpu_flags() {
  local without=()
  [[ -z ${GPU_FLAGS+set} ]] || return 0
  [[ ${TRANSFORMER_IMPL:-} != local ]] || without+=(transformer_engine)
  ! lacks fused_weight_gradient_mlp_cuda || without+=(apex)
  GPU_FLAGS=$(table gpu-flags "$((NNODES * GPUS_PER_NODE))" "$GPUS_PER_NODE" "$TP" "$PP" \
    "$PRECISION" "${without[*]}" -- "${flags[@]}") || exit 2
}

# This GPU machine's Python has no such module. Where there is no GPU either, the command is meant
# for another machine, whose container has everything.
lacks() {
  command -v nvidia-smi >/dev/null &&
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(bool(importlib.util.find_spec(sys.argv[1])))' "$1"
}

# Sets environment: NAME=VALUE of everything that the run gets beside the user's own variables. None
# of NCCL's is among them: those that a cluster needs are its own, and pass through.
build_environment() {
  local share=$(($(nproc) / GPUS_PER_NODE))
  environment=(
    "PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}"
    # The last words of a rank that is killed reach its log.
    "PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}"
    # Its share of the cores for each rank; torchrun would give it one.
    "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 8 ? 8 : share))}"
  )
  # Megatron insists on it before Blackwell: with one queue the communication of a tensor- or
  # context-parallel layer is issued before the computation that it is to overlap with.
  ((TP == 1 && CP == 1)) || environment+=("CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}")
  if [[ -n ${WANDB_PROJECT:-} ]]; then
    local mode=offline
    [[ -z ${WANDB_API_KEY:-} ]] && ! grep -qs wandb "${NETRC:-${HOME:-}/.netrc}" || mode=online
    environment+=("WANDB_MODE=${WANDB_MODE:-$mode}"
      "WANDB_RUN_ID=${WANDB_RUN_ID:-$(wandb_run_id)}" WANDB_RESUME=allow)
  fi
}

# The same for every start of a run and on all its nodes: made once, and kept beside its checkpoints.
wandb_run_id() {
  local file=$RUN_DIR/wandb_run_id mine=$RUN_DIR/wandb_run_id.$HOSTNAME.$$
  if [[ ! -f $file ]]; then
    if [[ $dry_run == yes ]]; then
      echo made-at-the-first-start
      return
    fi
    mkdir -p "$RUN_DIR"
    od -An -N5 -tx1 /dev/urandom | tr -d ' \n' >"$mine"
    ln "$mine" "$file" 2>/dev/null || true # another node may have been first
    rm -f "$mine"
  fi
  cat "$file"
}

# Prints what would be run, so that it can be pasted: variables, then one flag per line.
print_command() {
  local word line=env
  for word in "${environment[@]}" "${command[@]}"; do
    if [[ $word == --* || $word == "$PYTHON" ]]; then
      printf '%s \\\n' "$line"
      line=" "
    fi
    line+=" $(printf %q "$word")"
  done
  printf '%s\n' "$line"
}

# ---- An example's last line ----------------------------------------------------------------------

# launch WORDS AND FLAGS...: starts the run, or goes on with it. The shell becomes the launcher of
# the ranks: signals reach it, and its exit code is the run's (docs/launch.md).
launch() {
  local there tracker saved=''
  read_method "$@"
  read_settings
  find_nodes
  read_recipe
  if [[ $dry_run == yes ]]; then
    PYTHON=${PYTHON:-python3}
    build_environment
    build_command
    print_command
    return
  fi
  if [[ $DEVICE == cuda && -z ${CUDA_VISIBLE_DEVICES:-} ]] && command -v nvidia-smi >/dev/null; then
    there=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || there=$GPUS_PER_NODE
    ((there >= GPUS_PER_NODE)) || fail "GPUS_PER_NODE=$GPUS_PER_NODE, but $HOSTNAME has $there GPUs"
  fi
  PYTHON=${PYTHON:-$(bash "$repo/scripts/setup.sh")}
  build_environment
  build_command

  tracker=$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt
  [[ ! -f $tracker ]] || saved=$(<"$tracker")
  if [[ $saved =~ ^[0-9]+$ && " ${flags[*]} " != *" --train-"* ]] && ((saved >= TRAIN_ITERS)); then
    echo "$NAME $method is finished: iteration $saved of $TRAIN_ITERS is in $RUN_DIR/checkpoints"
    return
  fi
  echo "$NAME $method: ${saved:+resuming at iteration $saved of $TRAIN_ITERS, }node $NODE_RANK of $NNODES" \
    "($(hostname)), logs of its ranks in $RUN_DIR/logs/$LOG_ID"
  mkdir -p "$RUN_DIR/logs/$LOG_ID"
  export "${environment[@]}"
  exec "${command[@]}"
}
