#!/usr/bin/env bash
# Trains on Cloud TPU machines: one host or a whole slice, on demand or spot.
#
#   launch/tpu_vm.sh --name lm --zone us-west4-a --type v5litepod-16 --spot \
#       --nfs 10.0.0.2:/runs -- experiments/lm.py --set batch_size=64
#
# Asks for the machine (a queued resource), waits for it, installs this checkout
# on every host, trains on all of them, and deletes the machine however this ends.
# A spot machine that is taken away is asked for again, and the run goes on from
# its newest checkpoint.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [options]
           -- FILE [words for `jaxformers train`]

  --name NAME        of the machine and of the run
  --zone ZONE        such as us-west4-a
  --type TYPE        accelerator type, such as v5litepod-16 or v6e-8
  --runtime VERSION  software of the machine (default: that for TYPE)
  --project PROJECT  (default: that of gcloud)
  --spot             cheaper, may be taken away at any time; needs --nfs
  --nfs HOST:/PATH   file share for runs, mounted on every host as /mnt/runs;
                     needed for several hosts, which all write one directory.
                     Without it the run directory is copied here in the end
  --restarts N       how often to start again after a loss (default: 20)
  --reuse            use the machine NAME that is there, and leave it there
  --dry-run          print the commands and run none
END
}

die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

name='' zone='' type='' runtime='' nfs='' restarts=20 reuse='' dry=''
project=() spot=()
while (($#)); do
  case $1 in
    --name) name=$2 && shift ;;
    --zone) zone=$2 && shift ;;
    --type) type=$2 && shift ;;
    --runtime) runtime=$2 && shift ;;
    --project) project=(--project="$2") && shift ;;
    --nfs) nfs=$2 && shift ;;
    --restarts) restarts=$2 && shift ;;
    --spot) spot=(--spot) ;;
    --reuse) reuse=1 ;;
    --dry-run) dry=1 ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) die "unknown option $1; --help lists them, and -- comes before FILE." ;;
  esac
  shift
done
[[ $name && $zone ]] || die 'needs --name and --zone.'
[[ $type || $reuse ]] || die 'needs --type, or --reuse of a machine.'
(($#)) || die 'needs -- and the experiment file after the options.'
if ((${#spot[@]})) && [[ ! $nfs ]]; then
  die 'the disk of a spot machine goes with it: give --nfs HOST:/PATH.'
fi
# What is sent there is what git knows of.
if [[ $1 == /* ]] || ! git ls-files --error-unmatch -- "$1" &>/dev/null; then
  die "$1 would be missing on the machine, which gets what git tracks here: \
name a file of this checkout, and run 'git add' on it."
fi
if [[ ! $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi

where=(--zone="$zone" "${project[@]}")
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
if [[ $nfs ]]; then runs=/mnt/runs; else runs=/var/tmp/runs; fi
workdir=$runs/$name

# Prints a command, and runs it unless this is a dry run.
run() {
  echo "+ ${*@Q}" >&2
  [[ $dry ]] || "$@"
}

# Runs a command on every host. Having a terminal there (-tt) it ends when the
# connection is lost, and can be started again.
on_all() {
  run "${vm[@]}" ssh "$name" "${where[@]}" --worker=all --ssh-flag=-tt \
    --ssh-flag='-o ServerAliveInterval=30' --command="$1"
}

state() {
  run "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
}

create() {
  run "${queue[@]}" create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
  local found
  while found=$(state) && [[ $found != ACTIVE && ! $dry ]]; do
    if [[ $found == FAILED || $found == SUSPEND* ]]; then
      echo "tpu_vm.sh: the machine is $found and will not come" >&2
      return 1
    fi
    sleep "${POLL_SECONDS:-20}"
  done
}

delete() {
  run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
}

install() {
  local archive changed=''
  archive=$(mktemp --suffix=.tgz)
  [[ $dry ]] || changed=$(git stash create) # A commit of what is not yet in one.
  run git archive --output="$archive" "${changed:-HEAD}"
  run "${vm[@]}" scp "$archive" "$name:jaxformers.tgz" "${where[@]}" --worker=all
  rm "$archive"
  on_all 'set -e
mkdir -p jaxformers && tar -xzf jaxformers.tgz -C jaxformers && cd jaxformers
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d ~/venv ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -c requirements.lock -e ".[tpu]"'
  if [[ $nfs ]]; then
    on_all "set -e
mountpoint -q /mnt/runs && exit
sudo apt-get -qq install -y nfs-common
sudo mkdir -p /mnt/runs
sudo mount ${nfs@Q} /mnt/runs
sudo chmod 1777 /mnt/runs"
  fi
}

# The processes find each other by themselves on Cloud TPU.
train() {
  local words=(train --compile-cache "$runs/.programs" "$@"
    --workdir "$workdir" --left-status 75)
  on_all "cd jaxformers && exec ~/venv/bin/python -m jaxformers ${words[*]@Q}"
}

# Brings home what is only there, and gives back what was taken.
finish() {
  trap - EXIT INT TERM
  if [[ ! $nfs && $installed ]]; then
    run mkdir -p runs
    run "${vm[@]}" scp --recurse "$name:$workdir" runs "${where[@]}" --worker=0 ||
      echo "tpu_vm.sh: could not copy $workdir" >&2
  fi
  [[ $reuse ]] || delete
}

installed=''
trap finish EXIT
trap 'exit 130' INT TERM
[[ $reuse ]] || create
install
installed=1
for ((attempt = 0; ; attempt++)); do
  status=0
  train "$@" || status=$?
  # 0: done. 1 and 2: it would fail the same way again.
  ((status > 2 && attempt < restarts)) || break
  echo "tpu_vm.sh: status $status; starting again" >&2
  sleep "${POLL_SECONDS:-20}"
  if [[ ! $reuse && $(state) != ACTIVE ]]; then
    delete
    create
    install
  fi
done
exit "$status"
