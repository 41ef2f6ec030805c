"""launch/tpu.sh against a stand-in for gcloud, which records calls and runs here what ssh would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TPU_SH = Path(__file__).parents[1] / "launch/tpu.sh"
WORKERS = 2

# Keeps its world in files beside it: state, fail (workers whose ssh fails, and how often).
GCLOUD = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

here, args = Path(__file__).parent, sys.argv[1:]
with open(here / "calls", "a") as file:
    print(json.dumps(args), file=file)
options = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
words = [arg for arg in args if not arg.startswith("--")]
assert words[:2] == ["compute", "tpus"] and "--quiet" in args, args
state, kind = here / "state", " ".join(words[2:4])

if kind == "queued-resources describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    states = state.read_text().split()
    print(states[0])
    if len(states) > 1:  # what comes next
        state.write_text(" ".join(states[1:]))
elif kind == "queued-resources create":
    state.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif kind == "queued-resources delete":
    state.unlink()
elif kind == "tpu-vm describe":
    print({workers})
elif kind == "tpu-vm scp":
    home = here / f"home {{words[-1].split(':')[0]}} {{options['worker']}}"
    home.mkdir(exist_ok=True)
    (home / "mae_jax.tar.gz").write_bytes(Path(words[4]).read_bytes())
elif kind == "tpu-vm ssh":
    worker, command = options["worker"], options["command"]
    broken = here / f"fail {{worker}}"
    if broken.exists() and (left := int(broken.read_text())):
        broken.write_text(str(left - 1))
        sys.exit("ssh: connect to host 10.0.0.7 port 22: Connection timed out")
    if "worker.sh setup" in command:  # packages: nothing to install them from here
        sys.exit(print("ready"))
    home = here / f"home {{words[4]}} {{worker}}"
    env = os.environ | {{"HOME": str(home)}}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode)
else:
    sys.exit(f"unknown call {{args}}")
"""

# Stands for the training program, whose own behaviour test_distributed.py shows: it writes down its
# arguments, and ends as the plan of its worker says, one line for each start.
PROGRAM = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/arguments"
starts=$(cat "$HOME/starts" 2> /dev/null || echo 0)
echo $((starts + 1)) > "$HOME/starts"
plan=$(sed -n "$((starts + 1))p" "$HOME/plan" 2> /dev/null)
case $plan in
  preempted) echo SUSPENDED > "$WORLD/state"; exit 75 ;;
  wait) trap 'exit 75' TERM; while true; do sleep 0.05; done ;;
  *) exit "${plan:-0}" ;;
esac
"""


class World:
    def __init__(self, folder: Path):
        self.folder = folder
        self.write("gcloud", GCLOUD.format(python=sys.executable, workers=WORKERS))
        self.write("venv/bin/python", PROGRAM)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def tpu(self, *args: str, **environment: str) -> subprocess.CompletedProcess:
        env = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "WORLD": str(self.folder),
            "VENV": str(self.folder / "venv"),
            **dict(TPU="pod", TYPE="v5litepod-16", ZONE="us-west4-a", POLL="0.1", RETRY="0.1"),
        }
        command = ["bash", str(TPU_SH), *args]
        return subprocess.run(
            command, env=env | environment, capture_output=True, text=True, timeout=120, check=False
        )

    def active(self) -> None:
        """As after create and setup."""
        self.write("state", "ACTIVE")
        done = self.tpu("setup")
        assert done.returncode == 0, done.stderr
        (self.folder / "calls").unlink()

    def plan(self, worker: int, *ends: str) -> None:
        self.write(f"home pod {worker}/plan", "\n".join(ends))

    def starts(self, worker: int) -> int:
        return int((self.folder / f"home pod {worker}/starts").read_text())

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kinds(self) -> list[str]:
        """The calls in order, without those that only ask."""
        kinds = [" ".join(call[2:4]) for call in self.calls()]
        return [kind for kind in kinds if "describe" not in kind]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


RUN = ("run", "--config=configs/pretrain.py:variant=L/16", "--workdir=gs://bucket/run")


def test_dry_run_prints_the_very_call_that_create_makes_and_makes_none(world):
    printed = world.tpu("create", "--dry-run", PROJECT="my project")
    assert printed.returncode == 0, printed.stderr
    assert not (world.folder / "calls").exists()
    made = world.tpu("create", PROJECT="my project")
    assert made.returncode == 0, made.stderr
    (call,) = (call for call in world.calls() if "create" in call)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {printed.stdout}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words == ["gcloud", *call]
    assert {"--spot", "--project=my project", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(words)
    assert "--accelerator-type=v5litepod-16" in words


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"TYPE": ""}, "set TYPE"),
        ({"TYPE": "h100"}, "TYPE=h100: write"),
        ({"TIER": "cheap"}, "write spot or on-demand"),
        ({"SLICES": "two"}, "SLICES=two"),
        ({"ZONE": ""}, "set ZONE"),
        ({"TPU": ""}, "set TPU"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_nothing_is_created_with_settings_that_cannot_work(world, environment, words, dry):
    refused = world.tpu("create", *dry, **environment)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert world.kinds() == []


def test_create_and_delete_are_idempotent(world):
    assert world.tpu("create", TIER="on-demand", SLICES="2").returncode == 0
    again = world.tpu("create")
    assert again.returncode == 0 and "is there already" in again.stderr
    assert world.tpu("delete").returncode == 0
    gone = world.tpu("delete")
    assert gone.returncode == 0 and "nothing to delete" in gone.stderr
    assert world.kinds() == ["queued-resources create", "queued-resources delete"]
    create = next(call for call in world.calls() if "create" in call)
    assert "--spot" not in create
    assert {"--node-count=2", "--node-prefix=pod"} <= set(create)


def test_a_slice_that_was_preempted_is_deleted_before_it_is_asked_for_again(world):
    world.write("state", "SUSPENDED")
    assert world.tpu("create").returncode == 0
    assert world.kinds() == ["queued-resources delete", "queued-resources create"]


def test_a_gcloud_that_cannot_tell_the_state_stops_everything(world):
    world.write("gcloud", "#!/bin/sh\necho 'ERROR: you are not logged in' >&2\nexit 1\n")
    done = world.tpu("create")
    assert done.returncode == 1
    assert "you are not logged in" in done.stderr and "could not tell the state" in done.stderr


def test_arguments_reach_every_worker_as_they_were_given(world):
    world.active()
    flags = ["--config.data.source=folder:/my photos", '--config.note=it\'s $HOME; `x` "*" ü']
    done = world.tpu(*RUN, *flags)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr
    for worker in range(WORKERS):
        lines = (world.folder / f"home pod {worker}/arguments").read_text().splitlines()
        assert lines == ["-m", "mae_jax", "train", *RUN[1:], *flags, "--distributed"]


def test_a_preempted_slice_is_made_set_up_and_started_again_until_the_run_is_done(world):
    world.active()
    world.plan(0, "75", "preempted")
    world.plan(1, "75", "75")
    done = world.tpu(*RUN)
    assert done.returncode == 0, done.stderr
    assert [world.starts(worker) for worker in range(WORKERS)] == [3, 3]
    changing = [kind for kind in world.kinds() if kind != "tpu-vm ssh"]
    made = ["queued-resources delete", "queued-resources create"]
    assert changing == [*made, *["tpu-vm scp"] * WORKERS]
    assert "restart 2" in done.stderr and "PROVISIONING" in done.stderr


def test_an_error_of_one_worker_ends_the_run_and_names_it(world):
    world.active()
    world.plan(1, "2")
    done = world.tpu(*RUN)
    assert done.returncode == 1
    assert "pod worker 1: ended 2" in done.stderr
    assert "'logs'" in done.stderr
    assert world.starts(1) == 1


def test_a_run_that_is_always_lost_is_given_up(world):
    world.active()
    world.plan(0, *["75"] * 9)
    done = world.tpu(*RUN, MAX_RESTARTS="2")
    assert done.returncode == 1
    assert "gave up after 2 restarts" in done.stderr
    assert world.starts(0) == 3


def test_a_worker_whose_ssh_fails_at_times_is_tried_again(world):
    world.active()
    world.write("fail 1", "2")
    done = world.tpu(*RUN)
    assert done.returncode == 0, done.stderr
    assert [world.starts(worker) for worker in range(WORKERS)] == [1, 1]


def test_a_run_that_cannot_start_on_one_worker_is_stopped_on_all(world):
    world.active()
    world.plan(0, "wait")
    world.write("fail 1", "3")
    done = world.tpu(*RUN)
    assert done.returncode == 1
    assert "worker 1 of pod failed three times: ssh: connect to host" in done.stderr
    assert "stopped on all" in done.stderr
    assert (world.folder / "home pod 0/mae_jax_run/exit").read_text() == "75\n"


def test_stop_ends_the_run_for_good_and_run_goes_on_with_it(world):
    world.active()
    for worker in range(WORKERS):
        world.plan(worker, "wait")
    env = dict(os.environ, PATH=f"{world.folder}:{os.environ['PATH']}", WORLD=str(world.folder))
    env |= dict(VENV=str(world.folder / "venv"), TPU="pod", TYPE="v4-8", ZONE="z")
    env |= dict(POLL="0.1", RETRY="0.1")
    watched = subprocess.Popen(["bash", TPU_SH, *RUN], env=env, stderr=subprocess.PIPE, text=True)
    while "running" not in world.tpu("status").stdout:
        assert watched.poll() is None
    again = world.tpu("run", "--dry-run", "--workdir=gs://bucket/run")
    assert "--worker=all" in again.stdout
    stopped = world.tpu("stop")
    assert stopped.returncode == 0
    assert stopped.stdout.splitlines() == [f"pod worker {i}: stopped 75" for i in range(WORKERS)]
    assert "stopped, and saved" in watched.communicate()[1]
    assert watched.returncode == 75
    assert world.tpu(*RUN).returncode == 0
    assert [world.starts(worker) for worker in range(WORKERS)] == [2, 2]


def test_a_workdir_that_dies_with_the_slice_is_refused(world):
    world.active()
    done = world.tpu("run", "--config=configs/pretrain.py", "--workdir=/data/run")
    assert done.returncode == 1
    assert "--workdir=gs://BUCKET/RUN is needed" in done.stderr
    assert world.calls() == []
