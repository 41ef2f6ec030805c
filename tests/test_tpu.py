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


@pytest.fixture
def slice_of_two(world):
    world.active()
    return world


@pytest.mark.parametrize(
    "when, end",
    [
        ("", ""),
        ("sleep 1", "echo DELETING > $WORLD/state"),
        ("sleep 1", "rm -f $WORLD/state"),
    ],
)
def test_a_slice_that_is_deleted_under_a_run_ends_it_and_is_not_made_again(slice_of_two, when, end):
    program = f'#!/bin/sh\n{when}\n{end}\necho 99 > "$WORLD/fail 1"\nsleep 5'
    slice_of_two.write("venv/bin/python", program)
    if not when:
        slice_of_two.write("fail 1", "99")
        slice_of_two.write("state", "ACTIVE DELETING")
    done = slice_of_two.tpu(*RUN)
    assert done.returncode == 1
    assert "pod was deleted" in done.stderr
    assert "queued-resources create" not in slice_of_two.kinds()


@pytest.mark.parametrize("name, value", [("TYPE", ""), ("TIER", "cheap")])
def test_a_run_that_could_not_ask_for_its_slice_again_does_not_start(slice_of_two, name, value):
    done = slice_of_two.tpu(*RUN, **{name: value})
    assert done.returncode == 1
    assert name in done.stderr
    assert slice_of_two.calls() == []


def test_create_waits_until_the_last_slice_is_deleted(world):
    world.write("state", "DELETING DELETING SUSPENDED")
    assert world.tpu("create").returncode == 0
    assert world.kinds() == ["queued-resources delete", "queued-resources create"]


def fail_calls(world: World, pattern: str) -> None:
    """Calls of gcloud that match fail as often as the file `gone` says."""
    world.write("gcloud.real", (world.folder / "gcloud").read_text())
    world.write(
        "gcloud",
        f"""#!/bin/bash
gone=$(cat "$WORLD/gone" 2> /dev/null || echo 0)
if [[ $gone -gt 0 && $* == {pattern} ]]; then
  echo $((gone - 1)) > "$WORLD/gone"
  echo "ERROR: no network" >&2
  exit 1
fi
exec "$WORLD/gcloud.real" "$@"
""",
    )


@pytest.mark.parametrize("times, status", [(2, 0), (3, 1)])
def test_the_code_is_copied_to_each_worker_in_three_tries(slice_of_two, times, status):
    fail_calls(slice_of_two, '*"tpu-vm scp"*worker=1*')
    slice_of_two.write("gone", str(times))
    done = slice_of_two.tpu("setup")
    assert done.returncode == status, done.stderr
    assert ("worker 1 of pod failed three times: ERROR: no network" in done.stderr) == (times == 3)


def test_a_run_is_watched_on_when_the_network_was_gone_for_a_while(slice_of_two):
    """Neither a worker nor the state of the slice is to be had, some times."""
    fail_calls(slice_of_two, "*queued-resources*")
    gone = 'echo 4 > "$WORLD/gone"; echo 3 > "$WORLD/fail 1"'
    program = f"#!/bin/sh\ncase $HOME in *1) {gone} ;; esac\nsleep 1"
    slice_of_two.write("venv/bin/python", program)
    done = slice_of_two.tpu(*RUN)
    assert done.returncode == 0, done.stderr
    assert "no network" in done.stderr


def test_a_restart_that_meets_workers_on_their_way_down_is_tried_again(slice_of_two):
    fail_calls(slice_of_two, '*"worker.sh start"*worker=1*')
    program = '#!/bin/sh\n[ ! -e "$HOME/once" ] || exit 0\ntouch "$HOME/once"'
    last = 'case $HOME in *1) echo 3 > "$WORLD/gone" ;; esac\nexit 75'
    slice_of_two.write("venv/bin/python", f"{program}\n{last}")
    done = slice_of_two.tpu(*RUN)
    assert done.returncode == 0, done.stderr
    assert "worker 1 of pod failed three times: ERROR: no network" in done.stderr
    assert "restart 2" in done.stderr


def test_a_slice_that_always_fails_is_given_up_and_says_why(world):
    gcloud = (world.folder / "gcloud").read_text()
    comes = '"WAITING_FOR_RESOURCES PROVISIONING ACTIVE"'
    assert comes in gcloud
    world.write("gcloud", gcloud.replace(comes, '"PROVISIONING FAILED"'))
    done = world.tpu(*RUN, MAX_RESTARTS="2")
    assert done.returncode == 1
    assert "gave up after 2 restarts" in done.stderr
    assert world.kinds().count("queued-resources create") == 3
    assert sum("--format=yaml(state)" in call for call in world.calls()) == 2


def test_a_run_whose_save_fails_at_stop_is_not_called_saved(slice_of_two):
    stop = 'touch "$HOME/mae_jax_run/stopped"; exit 1'  # as worker.sh stop; then the save fails
    slice_of_two.write("venv/bin/python", f"#!/bin/sh\nsleep 1\n{stop}")
    done = slice_of_two.tpu(*RUN)
    assert done.returncode == 1
    assert "pod worker 0: stopped 1" in done.stderr
    assert "saved" not in done.stderr


def test_a_run_that_is_watched_a_second_time_says_that_it_runs_already(slice_of_two):
    until = 'until [ -e "$WORLD/home pod 0/began" ]; do sleep 0.1; done'  # the second start
    slice_of_two.write("venv/bin/python", f'#!/bin/sh\ntouch "$HOME/began"\n{until}\nsleep 3')
    started = ["bash", "mae_jax/launch/worker.sh", "start"]
    env = os.environ | {"VENV": str(slice_of_two.folder / "venv"), "WORLD": slice_of_two.folder}
    home = slice_of_two.folder / "home pod 1"
    subprocess.run(started, cwd=home, env=env | {"HOME": str(home)}, check=True)
    done = slice_of_two.tpu(*RUN)
    assert done.returncode == 0, done.stderr
    assert "pod worker 1: running already" in done.stderr
    assert "pod worker 0: running already" not in done.stderr
