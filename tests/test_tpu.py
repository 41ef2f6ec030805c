"""launch/tpu.sh against a stand-in for gcloud, which records calls and runs here what ssh would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TPU_SH = Path(__file__).parents[1] / "launch/tpu.sh"
WORKERS = 2

# Its state is in files beside it: state, and `fail W`: how often ssh to worker W still fails.
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

# Stands for the training program, which test_distributed.py tests: writes down its arguments, and
# ends as the plan of its worker says, with one line for each start.
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
    """A stand-in for the cloud: gcloud, the workers' home folders and the training program."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.write("gcloud", GCLOUD.format(python=sys.executable, workers=WORKERS))
        self.write("venv/bin/python", PROGRAM)
        self.environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "WORLD": str(folder),
            "VENV": str(folder / "venv"),
            **dict(TPU="pod", TYPE="v5litepod-16", ZONE="us-west4-a", POLL="0.1", RETRY="0.1"),
        }

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def tpu(self, *args: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess:
        """Run launch/tpu.sh, which must end with this status."""
        done = subprocess.run(
            ["bash", str(TPU_SH), *args], env=self.environment | environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done

    def plan(self, worker: int, *ends: str) -> None:
        self.write(f"home pod {worker}/plan", "\n".join(ends))

    def program(self, *lines: str) -> None:
        """Put these lines of a shell in place of the training program."""
        self.write("venv/bin/python", "\n".join(["#!/bin/sh", *lines]))

    def starts(self) -> list[int]:
        """Return how often the program was started on each worker."""
        homes = [self.folder / f"home pod {worker}" for worker in range(WORKERS)]
        return [int((home / "starts").read_text()) for home in homes]

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kinds(self) -> list[str]:
        """Return the calls in order, without those that only ask."""
        kinds = [" ".join(call[2:4]) for call in self.calls()]
        return [kind for kind in kinds if "describe" not in kind]


@pytest.fixture
def world(tmp_path):
    """A project without a slice."""
    return World(tmp_path)


@pytest.fixture
def pod(world):
    """A slice after create and setup, with two workers."""
    world.write("state", "ACTIVE")
    world.tpu("setup")
    (world.folder / "calls").unlink()
    return world


RUN = ("run", "--config=configs/pretrain.py:variant=L/16", "--workdir=gs://bucket/run")


def test_dry_run_prints_the_very_call_that_create_makes_and_makes_none(world):
    printed = world.tpu("create", "--dry-run", PROJECT="my project")
    assert not (world.folder / "calls").exists()
    world.tpu("create", PROJECT="my project")
    (call,) = (call for call in world.calls() if "create" in call)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {printed.stdout}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words == ["gcloud", *call]
    assert {"--spot", "--project=my project", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(words)
    assert "--accelerator-type=v5litepod-16" in words


def test_a_state_is_asked_for_in_a_dry_run_too(pod):
    asked = pod.tpu("status", "--dry-run").stdout
    assert "ACTIVE" in asked and asked == pod.tpu("status").stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TYPE": ""}, "set TYPE"),
        ({"TYPE": "h100"}, "TYPE=h100: write"),
        ({"TIER": "cheap"}, "write spot or on-demand"),
        ({"SLICES": "two"}, "SLICES=two"),
        ({"MAX_RESTARTS": "5O"}, "MAX_RESTARTS=5O: write a number"),
        ({"ZONE": ""}, "set ZONE"),
        ({"TPU": ""}, "set TPU"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_nothing_is_created_with_settings_that_cannot_work(world, environment, words, dry):
    assert words in world.tpu("create", *dry, status=1, **environment).stderr
    assert world.kinds() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("delete", "other", "--dry_run"), "delete takes nothing but --dry-run, not 'other'"),
        (("create", "--dryrun"), "create takes nothing but --dry-run, not '--dryrun'"),
        (("logs", "1", "2"), "logs takes the number of one worker, not also '2'"),
    ],
)
def test_an_argument_that_means_nothing_is_refused_before_any_call(pod, command, words):
    assert words in pod.tpu(*command, status=1).stderr
    assert pod.calls() == []


def test_an_unknown_preset_is_refused_before_a_slice_is_asked_for(pod):
    assert "XLA_PRESET=fast: there are" in pod.tpu(*RUN, status=2, XLA_PRESET="fast").stderr
    assert pod.calls() == []


def test_create_and_delete_are_idempotent(world):
    world.tpu("create", TIER="on-demand", SLICES="2")
    assert "is there already" in world.tpu("create").stderr
    world.tpu("delete")
    assert "nothing to delete" in world.tpu("delete").stderr
    assert world.kinds() == ["queued-resources create", "queued-resources delete"]
    create = next(call for call in world.calls() if "create" in call)
    assert "--spot" not in create
    assert {"--node-count=2", "--node-prefix=pod"} <= set(create)


@pytest.mark.parametrize("states", ["SUSPENDED", "DELETING DELETING SUSPENDED"])
def test_a_preempted_slice_is_deleted_before_it_is_asked_for_again(world, states):
    world.write("state", states)
    world.tpu("create")
    assert world.kinds() == ["queued-resources delete", "queued-resources create"]


def test_a_gcloud_that_cannot_tell_the_state_stops_everything(world):
    world.write("gcloud", "#!/bin/sh\necho 'ERROR: you are not logged in' >&2\nexit 1\n")
    error = world.tpu("create", status=1).stderr
    assert "you are not logged in" in error and "could not tell the state" in error


def test_arguments_reach_every_worker_as_they_were_given(pod):
    flags = ["--config.data.source=folder:/my photos", '--config.note=it\'s $HOME; `x` "*" ü']
    assert "finished" in pod.tpu(*RUN, *flags).stderr
    for worker in range(WORKERS):
        lines = (pod.folder / f"home pod {worker}/arguments").read_text().splitlines()
        assert lines == ["-m", "mae_jax", "train", *RUN[1:], *flags, "--distributed"]


def test_a_preempted_slice_is_made_set_up_and_started_again_until_the_run_is_done(pod):
    pod.plan(0, "75", "preempted")
    pod.plan(1, "75", "75")
    done = pod.tpu(*RUN)
    assert pod.starts() == [3, 3]
    changing = [kind for kind in pod.kinds() if kind != "tpu-vm ssh"]
    made = ["queued-resources delete", "queued-resources create"]
    assert changing == [*made, *["tpu-vm scp"] * WORKERS]
    assert "restart 2" in done.stderr and "PROVISIONING" in done.stderr


def test_an_error_of_one_worker_ends_the_run_and_names_it(pod):
    pod.plan(1, "2")
    error = pod.tpu(*RUN, status=1).stderr
    assert "pod worker 1: ended 2" in error and "'logs'" in error
    assert pod.starts()[1] == 1


def test_a_run_that_is_always_lost_is_given_up(pod):
    pod.plan(0, *["75"] * 9)
    assert "gave up after 2 restarts" in pod.tpu(*RUN, status=1, MAX_RESTARTS="2").stderr
    assert pod.starts()[0] == 3


def test_a_worker_whose_ssh_fails_at_times_is_tried_again(pod):
    pod.write("fail 1", "2")
    pod.tpu(*RUN)
    assert pod.starts() == [1, 1]


def test_a_run_that_cannot_start_on_one_worker_is_stopped_on_all(pod):
    pod.plan(0, "wait")
    pod.write("fail 1", "3")
    error = pod.tpu(*RUN, status=1).stderr
    assert "worker 1 of pod failed three times: ssh: connect to host" in error
    assert "stopped on all" in error
    assert (pod.folder / "home pod 0/mae_jax_run/exit").read_text() == "75\n"


def test_stop_ends_the_run_for_good_and_run_goes_on_with_it(pod):
    for worker in range(WORKERS):
        pod.plan(worker, "wait")
    watched = subprocess.Popen(
        ["bash", TPU_SH, *RUN], env=pod.environment, stderr=subprocess.PIPE, text=True
    )
    while "running" not in pod.tpu("status").stdout:
        assert watched.poll() is None
    assert "--worker=all" in pod.tpu("run", "--dry-run", "--workdir=gs://bucket/run").stdout
    stopped = pod.tpu("stop").stdout
    assert stopped.splitlines() == [f"pod worker {i}: stopped 75" for i in range(WORKERS)]
    assert "stopped, and saved" in watched.communicate()[1]
    assert watched.returncode == 75
    pod.tpu(*RUN)
    assert pod.starts() == [2, 2]


@pytest.mark.parametrize(
    ("run", "environment", "words"),
    [
        (("run", "--config=x", "--workdir=/data/run"), {}, "--workdir=gs://BUCKET/RUN is needed"),
        (RUN, {"TYPE": ""}, "TYPE"),  # needed to ask for the slice again
        (RUN, {"TIER": "cheap"}, "TIER"),
    ],
)
def test_a_run_that_would_not_survive_a_preemption_does_not_start(pod, run, environment, words):
    assert words in pod.tpu(*run, status=1, **environment).stderr
    assert pod.calls() == []


@pytest.mark.parametrize(
    ("when", "end"),
    [("", ""), ("sleep 1", "echo DELETING > $WORLD/state"), ("sleep 1", "rm -f $WORLD/state")],
)
def test_a_slice_that_is_deleted_under_a_run_ends_it_and_is_not_made_again(pod, when, end):
    pod.program(when, end, 'echo 99 > "$WORLD/fail 1"', "sleep 5")
    if not when:
        pod.write("fail 1", "99")
        pod.write("state", "ACTIVE DELETING")
    assert "pod was deleted" in pod.tpu(*RUN, status=1).stderr
    assert "queued-resources create" not in pod.kinds()


def fail_calls(pod: World, pattern: str) -> None:
    """Let calls of gcloud that match the pattern fail as often as the file `gone` says."""
    pod.write("gcloud.real", (pod.folder / "gcloud").read_text())
    pod.write(
        "gcloud",
        f"""#!/bin/bash
gone=$(cat "$WORLD/gone" 2> /dev/null || echo 0)
[[ $gone -gt 0 && $* == {pattern} ]] || exec "$WORLD/gcloud.real" "$@"
echo $((gone - 1)) > "$WORLD/gone"
echo "ERROR: no network" >&2
exit 1
""",
    )


@pytest.mark.parametrize(("times", "status"), [(2, 0), (3, 1)])
def test_the_code_is_copied_to_each_worker_in_three_tries(pod, times, status):
    fail_calls(pod, '*"tpu-vm scp"*worker=1*')
    pod.write("gone", str(times))
    error = pod.tpu("setup", status=status).stderr
    assert ("worker 1 of pod failed three times: ERROR: no network" in error) == (times == 3)


def test_a_run_is_watched_on_when_the_network_was_gone_for_a_while(pod):
    """For a while neither a worker nor the state of the slice can be reached."""
    fail_calls(pod, "*queued-resources*")
    gone = 'echo 4 > "$WORLD/gone"; echo 3 > "$WORLD/fail 1"'
    pod.program(f"case $HOME in *1) {gone} ;; esac", "sleep 1")
    assert "no network" in pod.tpu(*RUN).stderr


def test_a_restart_that_meets_workers_on_their_way_down_is_tried_again(pod):
    fail_calls(pod, '*"worker.sh start"*worker=1*')
    once = '[ ! -e "$HOME/once" ] || exit 0; touch "$HOME/once"'
    pod.program(once, 'case $HOME in *1) echo 3 > "$WORLD/gone" ;; esac', "exit 75")
    error = pod.tpu(*RUN).stderr
    assert "worker 1 of pod failed three times: ERROR: no network" in error
    assert "restart 2" in error


def test_a_slice_that_always_fails_is_given_up_and_says_why(world):
    gcloud = (world.folder / "gcloud").read_text()
    comes = '"WAITING_FOR_RESOURCES PROVISIONING ACTIVE"'
    assert comes in gcloud
    world.write("gcloud", gcloud.replace(comes, '"PROVISIONING FAILED"'))
    assert "gave up after 2 restarts" in world.tpu(*RUN, status=1, MAX_RESTARTS="2").stderr
    assert world.kinds().count("queued-resources create") == 3
    assert sum("--format=yaml(state)" in call for call in world.calls()) == 2


def test_a_run_whose_save_fails_at_stop_is_not_called_saved(pod):
    # As worker.sh stop does; then the save fails.
    pod.program("sleep 1", 'touch "$HOME/mae_jax_run/stopped"', "exit 1")
    error = pod.tpu(*RUN, status=1).stderr
    assert "pod worker 0: stopped 1" in error and "saved" not in error


def test_a_run_that_is_watched_a_second_time_says_that_it_runs_already(pod):
    until = 'until [ -e "$WORLD/home pod 0/began" ]; do sleep 0.1; done'  # the second start
    pod.program('touch "$HOME/began"', until, "sleep 3")
    home = pod.folder / "home pod 1"
    started = ["bash", "mae_jax/launch/worker.sh", "start"]
    subprocess.run(started, cwd=home, env=pod.environment | {"HOME": str(home)}, check=True)
    error = pod.tpu(*RUN).stderr
    assert "pod worker 1: running already" in error
    assert "pod worker 0: running already" not in error
