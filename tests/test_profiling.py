"""--profile writes a trace of the steps that it names, and refuses others."""

import gzip
import json

import pytest
from tiny import tiny_config

from mae_jax import profiling
from mae_jax.commands import running


@pytest.fixture
def config():
    config = tiny_config()
    config.train_for = "5 steps"
    config.evals.reconstruct.update(every="", split="test[:16]", images=16, batch_size=16)
    return config


def test_a_trace_of_these_steps_is_written_for_tensorboard_and_perfetto(config, tmp_path):
    running.run(config, tmp_path / "run", profile="2:3")
    (file,) = (tmp_path / "run/profile").glob("plugins/profile/*/*.xplane.pb")
    assert file.stat().st_size > 1000
    trace = json.loads(gzip.decompress((file.parent / "perfetto_trace.json.gz").read_bytes()))
    names = [event for event in trace["traceEvents"] if event.get("name") == "step"]
    assert {event["args"]["step_num"] for event in names} == {"2", "3"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", "write FIRST:LAST"),
        ("0:2", "write FIRST:LAST"),
        ("5:4", "write FIRST:LAST"),
        ("-1:4", "write FIRST:LAST"),
        ("8:11", "this run makes steps 1 to 10"),
    ],
)
def test_steps_that_a_run_does_not_make_are_refused(text, words):
    with pytest.raises(ValueError, match=f"--profile={text}: {words}"):
        profiling.window(text, 4, 10)


@pytest.mark.parametrize(("text", "left"), [("4:6", [5, 6]), ("2:4", []), ("9:9", [9]), ("", [])])
def test_a_run_that_goes_on_traces_what_is_left(text, left):
    assert list(profiling.window(text, 4, 10)) == left


def test_the_same_command_goes_on_after_its_profile(config, tmp_path):
    running.run(config, tmp_path / "run", profile="2:3")
    assert int(running.run(config, tmp_path / "run", profile="2:3").step) == 5


def test_a_trace_that_an_error_cuts_short_is_written(tmp_path):
    def fails_at_three(state, batch):
        if state == 2:
            raise FloatingPointError("step 3")
        return state + 1, {}

    lines = []
    with (
        pytest.raises(FloatingPointError),
        profiling.traced(fails_at_three, range(2, 6), 0, tmp_path, lines.append) as step,
    ):
        state = 0
        while True:
            state, _ = step(state, {})
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "trace of steps 2 to 3" in lines[0]


def test_a_refused_profile_leaves_nothing_behind(config, tmp_path):
    with pytest.raises(ValueError, match="this run makes steps 1 to 5"):
        running.run(config, tmp_path / "run", profile="11:12")
    assert not (tmp_path / "run").exists()
