#!/usr/bin/env bash
# Trains on a plain list of hosts, over ssh. Nothing is installed: every host has
# this directory, with its virtual environment, under the same path (a shared file
# system, or copies), and the run directory lies on a file system that all share.
#
#   launch/ssh.sh --hosts gpu0,gpu1 -- experiments/lm.py --workdir /shared/lm
#
# Ctrl-C lets the run save and leave; the same command resumes. When a host is
# lost all processes end, and all are started again.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/ssh.sh --hosts HOST,HOST,... [options]
           -- FILE [words for `jaxformers train`]

  --hosts HOST,...  one process each; the first is the coordinator
  --port PORT       of the coordinator; free, and open to the others (default: 7777)
  --address ADDR    of the coordinator as the others see it (default: first host)
  --directory DIR   of this checkout on the hosts (default: the current one)
  --python PYTHON   there (default: .venv/bin/python)
  --restarts N      how often to start again after a loss (default: 20)
  --dry-run         print the commands and run none
END
}

die() {
  echo "ssh.sh: $*" >&2
  exit 2
}

hosts=() port=7777 address='' directory=$PWD python=.venv/bin/python
restarts=20 dry=''
while (($#)); do
  case $1 in
    --hosts) IFS=, read -ra hosts <<<"$2" && shift ;;
    --port) port=$2 && shift ;;
    --address) address=$2 && shift ;;
    --directory) directory=$2 && shift ;;
    --python) python=$2 && shift ;;
    --restarts) restarts=$2 && shift ;;
    --dry-run) dry=1 ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) die "unknown option $1; --help lists them, and -- comes before FILE." ;;
  esac
  shift
done
((${#hosts[@]})) || die 'needs --hosts HOST,HOST,...'
(($#)) || die 'needs -- and the experiment file after the options.'
address=${address:-${hosts[0]#*@}}

# The command of one process, as its host shall run it.
remote() {
  local index=$1 && shift
  local words=(-m jaxformers train --compile-cache build/programs "$@"
    --coordinator "$address:$port" --processes "${#hosts[@]}"
    --process "$index" --left-status 75)
  echo "cd ${directory@Q} && exec ${python@Q} ${words[*]@Q}"
}

# Starts all processes. Ctrl-C in this terminal must not reach the ssh that run
# here: it is typed over there instead, through a pipe that is their keyboard.
start() {
  local index words keyboard
  pids=() keyboards=()
  for index in "${!hosts[@]}"; do
    words=(ssh -tt -o BatchMode=yes -o ServerAliveInterval=30
      "${hosts[index]}" "$(remote "$index" "$@")")
    echo "+ ${words[*]@Q}" >&2
    [[ $dry ]] && continue
    mkfifo "$pipes/$index"
    exec {keyboard}<>"$pipes/$index"
    keyboards+=("$keyboard")
    setsid "${words[@]}" <"$pipes/$index" &
    pids+=($!)
  done
}

# Waits for all processes; the status says most about whether to start again.
finish() {
  local pid one keyboard
  status=0
  for pid in "${pids[@]}"; do
    # A trap ends a wait before its time.
    while one=0 && { wait "$pid" || one=$?; } && kill -0 "$pid" 2>/dev/null; do
      :
    done
    if ((status == 0 || one == 1 || one == 2)); then status=$one; fi
  done
  for keyboard in "${keyboards[@]}"; do exec {keyboard}>&-; done
  rm -f "$pipes"/*
}

# Types Ctrl-C on the first host: one process is enough, since they agree.
leave() {
  leaving=1
  echo 'ssh.sh: asking the run to save and leave' >&2
  if ((${#keyboards[@]})); then printf '\003' >&"${keyboards[0]}"; fi
}

pipes=$(mktemp -d)
trap 'rm -r "$pipes"' EXIT
leaving='' keyboards=()
trap leave INT TERM
for ((attempt = 0; ; attempt++)); do
  start "$@"
  finish
  # 0: done. 1 and 2: it would fail the same way again.
  if ((status <= 2 || attempt == restarts)) || [[ $leaving ]]; then break; fi
  echo "ssh.sh: status $status; starting again" >&2
  sleep "${POLL_SECONDS:-20}"
done
exit "$status"
