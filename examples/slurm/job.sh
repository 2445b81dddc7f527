# shellcheck shell=bash
# What all sbatch files of this folder share: one launcher per node, the warning before the time
# limit handed on, and the answer to how the run ended. docs/slurm.md explains it.
#
# A sbatch file finds the clone, sources this file, sets what is its own, and calls
#
#   run_job SCRIPT [words and flags of the script]      # such as examples/pretrain_7b.sh post
#
#   srun_flags    its own flags of srun (an array)
#   enter         words in front of the command of each node, such as those of a container (an array)
#
# Settings (environment variables; those of the script, see docs/launch.md, pass through):
#   PRORES_HOME   the clone, on a file system of all nodes; else the directory of the submission
#   MAX_RESTARTS  restarts in a row that may bring no new checkpoint, else 3
#   DRY_RUN=1     prints the command of srun and starts nothing; needs no Slurm

srun_flags=()
enter=()
container=no
PRORES_HOME=$(cd "$PRORES_HOME" && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf 'slurm: %s\n' "$*"; }

# ---- Before the start ----------------------------------------------------------------------------

check_settings() {
  MAX_RESTARTS=${MAX_RESTARTS:-3}
  [[ $MAX_RESTARTS =~ ^[0-9]{1,6}$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: give a whole number"
  (($#)) || fail "no script to run: sbatch FILE.sbatch examples/pretrain_130m.sh [words and flags]"
  [[ -f $PRORES_HOME/$1 || -f $1 ]] ||
    fail "$1: no such script, neither here ($PWD) nor in PRORES_HOME=$PRORES_HOME"
  [[ ${DRY_RUN:-0} != 1 ]] || return 0
  [[ -n ${SLURM_JOB_ID:-} ]] ||
    fail "not in a Slurm job: submit this file by sbatch, or see with DRY_RUN=1 what it would do"
  [[ -f /proc/$$/fd/1 ]] ||
    fail "the job's output has to be a file (sbatch --output): it tells the next start what happened"
}

# Sets command: what runs on each node.
build_node_command() {
  local script=$1
  shift
  [[ ! -f $PRORES_HOME/$script ]] || script=$PRORES_HOME/$script
  command=(bash "$script")
  # In a job array each task is a run of its own: the script gets its number, and so does RUN_DIR.
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    command+=(--job "$SLURM_ARRAY_TASK_ID")
    [[ -z ${RUN_DIR:-} ]] || RUN_DIR=$RUN_DIR/$SLURM_ARRAY_TASK_ID
  fi
  command+=("$@")
  command=(bash "$PRORES_HOME/examples/slurm/node.sh" "${enter[@]}" "${command[@]}")
}

# What a script cannot ask Slurm for inside of a container.
export_settings() {
  # The address by which Slurm itself reaches the first node: it need not be a name that resolves.
  local first
  if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} && ${DRY_RUN:-0} != 1 ]]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(field_of NodeAddr node "$first")
    MASTER_ADDR=${MASTER_ADDR:-$first}
  fi
  [[ ${DEVICE:-cuda} != cuda ]] || GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  local variable
  for variable in PRORES_HOME MASTER_ADDR GPUS_PER_NODE RUN_DIR; do
    [[ -z ${!variable:-} ]] || export "${variable?}"
  done
}

# container_settings: checks CONTAINER_IMAGE, and sets mounts: what the container has to see, at the
# same places, and what CONTAINER_MOUNTS adds; with commas between, as pyxis and apptainer want it.
container_settings() {
  container=yes
  [[ -n ${CONTAINER_IMAGE:-} ]] || fail "CONTAINER_IMAGE is not set: give the container image"
  [[ -z ${DATA_DIR:-} || -d $DATA_DIR ]] || fail "DATA_DIR=$DATA_DIR: no such directory"
  mounts=$PRORES_HOME:$PRORES_HOME
  local place
  for place in "$PWD" "${RUN_DIR:-}" "${DATA_DIR:-}"; do
    [[ -z $place || $place == /* ]] || place=$PWD/$place
    [[ -n $place && $place != "$PRORES_HOME" && $place != "$PRORES_HOME"/* ]] || continue
    [[ ,$mounts, == *,"$place:$place",* ]] || mounts+=,$place:$place
  done
  mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
}

# ---- What Slurm knows ----------------------------------------------------------------------------

# field_of FIELD KIND NAME: one field of what scontrol shows of a job or a node.
field_of() {
  scontrol show "$2" "$3" --oneliner 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# The job as scontrol means just this one: the number of a job array's first task is the array's too.
this_job() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# ---- The warning before the time limit -----------------------------------------------------------

# srun hands the signal on to all processes of the run; the ranks save and end. A run that hangs, or
# saves for longer than that, is killed while there is time to queue it again.
hand_on() {
  local end left
  say "SIGUSR1, $(date '+%F %T'): the run is told to save"
  kill -USR1 "$srun_pid" 2>/dev/null || true
  [[ -z $watchdog_pid ]] || return 0
  end=$(date -d "$(field_of EndTime job "$(this_job)")" +%s 2>/dev/null) || return 0
  left=$(((end - $(date +%s)) * 4 / 5))
  watch_the_save "$((left > 0 ? left : 0))" &
  watchdog_pid=$!
}

watch_the_save() {
  trap - USR1 TERM
  sleep "$1"
  say "not saved within $1 s: killed, before the time limit does it"
  scancel --signal=KILL "$(this_job).0" # its only step; without the number, the job would be cancelled
}

# ---- How it ended --------------------------------------------------------------------------------

# Wrong input, Megatron's check of results, Ctrl-C: again would be no better.
final_codes='^(2|16|17|130)$'

# The job's output, to which every start appends, is also the memory of the job. Prints
#   <restarts in a row without a new checkpoint> <a checkpoint in this start: 0 or 1> <bad code>
# The ranks of other nodes fail within moments of the first, of its absence, and their launchers may be
# sooner gone: a code that no such absence brings about counts before theirs, else the first does.
# A program that was ended in the middle of a line has left it open: what follows may stand behind it.
read_output() {
  awk -v final="$final_codes" '
       function number_after(words) { return substr($0, index($0, words) + length(words)) + 0 }
       /slurm: start [0-9]+ of job / { saved = code = 0 }
       /successfully saved checkpoint from iteration/ { saved = 1; futile = 0 }
       /slurm: node [0-9]+ .*\) ended with code [0-9]+/ {
         this = number_after(") ended with code ")
         if (!code || this ~ final && code !~ final) code = this
       }
       /slurm: restarts in a row without a new checkpoint: / {
         futile = number_after("without a new checkpoint: ")
       }
       END { print futile + 0, saved + 0, code + 0 }' "/proc/$$/fd/1"
}

# finish CODE: CODE is srun's, the highest of all nodes: where one node's failure ended the others,
# that of the signal that ended them. What the nodes themselves have said is nearer to the reason.
finish() {
  local code=$1 futile saved first
  read -r futile saved first < <(read_output)
  ((first == 0)) || code=$first
  if ((code == 0)); then
    say "finished, $(date '+%F %T')"
    exit 0
  fi
  if [[ $code =~ $final_codes ]]; then
    say "failed with code $code, not queued again: see the lines above"
    exit "$code"
  fi
  # Cancelled by its user; or it lost a node or its place, and Slurm queues it again by itself.
  # SIGNALING: still running, and the signal that it has answered is still on its way elsewhere.
  if [[ ! $(field_of JobState job "$(this_job)") =~ ^(RUNNING|SIGNALING)$ ]]; then
    say "ended with code $code, as Slurm ends the job"
    exit "$code"
  fi
  # Anything else may pass: a GPU, the network, the file server. What does not pass is told by
  # restarts that bring nothing; as long as there is a new checkpoint, their number is not limited.
  if ((saved)); then
    futile=0
  elif ((futile < MAX_RESTARTS)); then
    futile=$((futile + 1))
  else
    say "failed with code $code, not queued again: $futile restarts brought no new checkpoint (MAX_RESTARTS=$MAX_RESTARTS)"
    exit "$code"
  fi
  say "ended with code $code ($([[ $code == 75 ]] && echo saved || echo failed)), queued again, $(date '+%F %T')"
  say "restarts in a row without a new checkpoint: $futile"
  if ! scontrol requeue "$(this_job)"; then
    say "Slurm refuses to queue the job again; submit it anew, and the run goes on where it was saved"
    exit "$code"
  fi
  sleep 60 # Slurm ends this script, as part of queueing it again
  exit "$code"
}

# ---- All of it -----------------------------------------------------------------------------------

run_job() {
  check_settings "$@"
  build_node_command "$@"
  export_settings
  local command_line=(srun --nodes="${SLURM_NNODES:-1}" --ntasks="${SLURM_NNODES:-1}"
    --ntasks-per-node=1
    # One node that fails ends all, at once; one that is done waits for the others.
    --kill-on-bad-exit=1 --wait=0
    # The launcher starts ranks and data loaders on all cores.
    --cpu-bind=none
    "${srun_flags[@]}" "${command[@]}")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command_line[@]}"
    printf '\n'
    return
  fi
  if [[ $container == yes ]]; then
    [[ -z ${RUN_DIR:-} ]] || mkdir -p "$RUN_DIR" # only what is there can be mounted
  else
    # Made once, and not by all nodes at the same time.
    export PYTHON=${PYTHON:-$(bash "$PRORES_HOME/scripts/setup.sh")}
  fi
  say "start ${SLURM_RESTART_COUNT:-0} of job $(this_job) on $SLURM_JOB_NODELIST, $(date '+%F %T')"

  local code=0
  watchdog_pid=''
  "${command_line[@]}" </dev/null &
  srun_pid=$!
  trap hand_on USR1
  trap : TERM # Slurm sends it to srun and the ranks as well
  # A signal ends the waiting, not srun.
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
  wait "$srun_pid" || code=$?
  trap - TERM
  trap '' USR1 # too late: it has ended
  [[ -z $watchdog_pid ]] || kill "$watchdog_pid" 2>/dev/null || true
  finish "$code"
}
