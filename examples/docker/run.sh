#!/usr/bin/env bash
# Starts a command in the image of the Dockerfile, with what training needs: GPUs, shared memory,
# locked memory, and on more nodes than one the host's network and InfiniBand.
#
#   docker build --tag megatron-prores .
#   bash examples/docker/run.sh examples/pretrain_130m.sh post plain     # one node
#   bash examples/docker/run.sh python3 -m megatron_prores.doctor        # any command
#   bash examples/docker/run.sh --dry-run examples/pretrain_130m.sh      # prints the docker command
#
# Two nodes: the same on both, but for NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 bash examples/docker/run.sh examples/pretrain_1b.sh
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node1 bash examples/docker/run.sh examples/pretrain_1b.sh
#
# Started once per node by Slurm's srun, the three come from Slurm.
#
# The container has the numbers of the user who calls it, so what it writes is that user's. It runs
# in the foreground and ends with the exit code of the command: 75 means saved, start again
# (docs/checkpoints.md). A signal to this script, and `docker stop`, let the run save first.
#
# Settings (environment variables):
IMAGE=${IMAGE:-megatron-prores}
CONTAINER=${CONTAINER:-prores} # its name; docker refuses a second one of that name
GPUS=${GPUS:-all}              # all, none, or numbers such as 0,1
SHM_SIZE=${SHM_SIZE:-host}     # of /dev/shm, such as 16g; host: the machine's own
STOP_SECONDS=${STOP_SECONDS:-1800} # that docker stop waits for the run to save
NNODES=${NNODES:-${SLURM_NNODES:-1}}
#   DATA_DIR, RUN_DIR            Folders of this machine, at the same place in the container; else
#                                data and runs of the current folder.
#   MOUNTS                       More folders, joined by colons, at the same place as well.
# The settings of examples/launcher.sh and examples/quickstart.sh, and NCCL_*, GLOO_*, UCX_* and
# WANDB_*, go on to the container by name: no value, so no key either, is on the command line.

set -euo pipefail

# fail, first_host, default_port
# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launcher.sh"

dry_run=no
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
(($#)) || fail "give a command, such as examples/pretrain_130m.sh"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NNODES: give a whole number above 0"
[[ $STOP_SECONDS =~ ^[0-9]+$ ]] || fail "STOP_SECONDS=$STOP_SECONDS: give a number of seconds"
[[ $SHM_SIZE =~ ^(host|[0-9]+[bkmg]?)$ ]] || fail "SHM_SIZE=$SHM_SIZE: give host, or a size such as 16g"
[[ $GPUS =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || fail "GPUS=$GPUS: give all, none, or numbers such as 0,1"
command -v docker >/dev/null || fail "no docker command on this machine"

# --- The nodes ------------------------------------------------------------------------------------

if ((NNODES > 1)); then
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
    # The container has no scontrol.
    MASTER_ADDR=${MASTER_ADDR:-$(first_host)}
    MASTER_PORT=${MASTER_PORT:-$(default_port)}
  fi
  [[ ${NODE_RANK:-} =~ ^[0-9]+$ && ${NODE_RANK:-} -lt $NNODES ]] ||
    fail "NODE_RANK=${NODE_RANK:-}: with NNODES=$NNODES give this node's number, from 0 to $((NNODES - 1))"
  [[ -n ${MASTER_ADDR:-} ]] ||
    fail "MASTER_ADDR is not set: with NNODES=$NNODES give the address of node 0"
fi

# --- What of this machine the container sees ------------------------------------------------------

options=(--rm --init --name "$CONTAINER" --user "$(id -u):$(id -g)" --stop-timeout "$STOP_SECONDS")
# Slurm and others send SIGTERM; nothing has to be typed, so no terminal.
options+=(--ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=65536:65536)

if [[ $SHM_SIZE == host ]]; then options+=(--ipc host); else options+=(--shm-size "$SHM_SIZE"); fi

case $GPUS in
  none) ;;
  all) options+=(--gpus all) ;;
  *) options+=(--gpus "\"device=$GPUS\"") ;; # docker reads it as CSV, so a comma needs the quotes
esac

if ((NNODES > 1)); then
  options+=(--network host --cap-add IPC_LOCK)
  if [[ -d /dev/infiniband ]]; then options+=(--device /dev/infiniband); fi
fi

# mount FOLDER [PLACE]: here, and in the container there; else at the same place.
mount() {
  [[ $1 != *,* ]] || fail "$1: docker cannot mount a folder with a comma in its name"
  options+=(--mount "type=bind,source=$1,target=${2:-$1}")
}

# absolute VARIABLE: makes a setting the path of a folder that is there.
absolute() {
  [[ -d ${!1} ]] || fail "$1=${!1}: no such folder"
  printf -v "$1" '%s' "$(cd "${!1}" && pwd)"
}

inside=/opt/megatron-prores
if [[ -n ${DATA_DIR:-} ]]; then
  absolute DATA_DIR
  mount "$DATA_DIR"
elif [[ -d data ]]; then
  mount "$PWD/data" "$inside/data"
fi
if [[ -n ${RUN_DIR:-} ]]; then
  [[ $dry_run == yes || -d $RUN_DIR ]] || mkdir -p "$RUN_DIR" || fail "RUN_DIR=$RUN_DIR: cannot be made"
  [[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
  mount "$RUN_DIR"
else
  [[ $dry_run == yes || -d runs ]] || mkdir runs || fail "$PWD/runs: cannot be made; name a folder in RUN_DIR"
  mount "$PWD/runs" "$inside/runs"
fi
IFS=: read -r -a more <<<"${MOUNTS:-}"
for folder in ${more[@]+"${more[@]}"}; do
  [[ $folder == /* && -d $folder ]] || fail "MOUNTS: $folder is no absolute path of a folder"
  mount "$folder"
done

# --- The environment ------------------------------------------------------------------------------

# shellcheck disable=SC2034  # they go on to the container by name
export NNODES NODE_RANK MASTER_ADDR MASTER_PORT DATA_DIR RUN_DIR
launcher=(
  NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS_PER_NODE NODE_WAIT_SECONDS
  SILENT_NODE_SECONDS DISTRIBUTED_TIMEOUT_MINUTES DEVICE PRECISION TP PP CP VPP GPU_FLAGS MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE
  MODEL_KIND TRANSFORMER_IMPL RUN_DIR LOG_ID DATA DATA_DIR TRAIN_DATA VALID_DATA TOKENIZER_MODEL SAVE_INTERVAL
  SAVE_RETAIN_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE HEADS
  SEQ_LENGTH TRAIN_ITERS LEARNING_RATE LR_WARMUP_ITERS LR_DECAY_ITERS
  WARMUP_ITERS WARMUP_ITERS_PER_LAYER VOCAB_SIZE
  SLURM_JOB_ID SLURM_RESTART_COUNT OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS
)
# The container numbers the GPUs that it is given from 0 on.
[[ $GPUS != all ]] || launcher+=(CUDA_VISIBLE_DEVICES)
mapfile -t others < <(compgen -e | sort |
  grep -E '^(NCCL|GLOO|UCX|TORCH_NCCL|WANDB)_|^PRORES_(CORPUS|VOCAB|LAYERS|ITERS|SCHEDULE|WARMUP)')
for name in "${launcher[@]}" ${others[@]+"${others[@]}"}; do
  [[ -z ${!name:-} ]] || options+=(--env "$name")
done

command=("$@")
[[ $1 != *.sh ]] || command=(bash "$@")
command=(docker run "${options[@]}" "$IMAGE" "${command[@]}")

if [[ $dry_run == yes ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit
fi
exec "${command[@]}"
