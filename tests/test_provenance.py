"""A workdir records its config and environment, and is refused to other runs."""

import json
from pathlib import Path

import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

from mae_jax import provenance
from mae_jax.configs import finetune, linprobe, pretrain
from mae_jax.errors import UserError


def config(**changes):
    base = ConfigDict(dict(log_every="50 steps", model=dict(width=8, remat=False)))
    base.update_from_flattened_dict(changes)
    return base


def test_a_workdir_holds_its_config_and_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    provenance.prepare_workdir("a/b", config())
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == config().to_dict()
    env = json.loads((tmp_path / "a/b/env.json").read_text())
    assert env["jax"] == jax.__version__
    assert env["device_count"] == 8
    assert {"python", "orbax-checkpoint", "grain", "device_kind", "process_count"} <= env.keys()


def test_another_config_is_refused_with_the_difference(tmp_path):
    provenance.prepare_workdir(tmp_path, config())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="was made with another config") as raised:
        provenance.prepare_workdir(tmp_path, config(**{"model.width": 9, "log_every": "9 steps"}))
    assert "model.width: 8 -> 9" in str(raised.value)
    assert "log_every" not in str(raised.value)
    assert f"another --workdir and --config.resume={tmp_path}" in str(raised.value)
    assert (tmp_path / "config.json").read_text() == before


def test_another_number_of_examples_is_refused(tmp_path):
    provenance.prepare_workdir(tmp_path, config(), 50)
    provenance.prepare_workdir(tmp_path, config(), 50)
    provenance.check_workdir(tmp_path, config())
    with pytest.raises(ValueError, match="a dataset of 50 examples, which has 1,070 now"):
        provenance.check_workdir(tmp_path, config(), 1070)


def test_a_workdir_is_refused_while_a_run_is_going_on_there(tmp_path):
    with provenance.only_run(tmp_path):
        refused = pytest.raises(UserError, match="another run is going on in")
        with refused, provenance.only_run(tmp_path):
            pass
        with provenance.only_run(tmp_path.parent):
            pass
    with provenance.only_run(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", refuse)
    with pytest.raises(ValueError, match="cannot be written to.*Permission denied"):
        provenance.check_workdir(tmp_path, config())


@pytest.mark.parametrize("name", ["", "checkpoints", "logs"])
def test_a_file_where_a_folder_is_needed_is_named(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match=f"cannot be written to: {path} is a file where a folder"):
        provenance.check_workdir(tmp_path / "run", config())
    assert path.is_file() and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("name", ["config.json", "env.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_of_a_workdir_is_named(tmp_path, name, content):
    provenance.prepare_workdir(tmp_path, config())
    (tmp_path / name).write_text(content)
    with pytest.raises(
        UserError, match=f"{name} is damaged: restore it from a copy, or start in another"
    ):
        provenance.prepare_workdir(tmp_path, config())


def test_keys_that_cannot_change_the_result_may_change(tmp_path):
    provenance.prepare_workdir(tmp_path, config())
    changed = config(**{"model.remat": True, "log_every": "9 steps"})
    provenance.prepare_workdir(tmp_path, changed)
    assert json.loads((tmp_path / "config.json").read_text()) == changed.to_dict()


def old_workdir(path, **flat):
    """Make the workdir of a run whose config.json is that of an older version of this code."""
    old = {"seed": 0, "masking": {"name": "random"}, "data": {"threads": 16, "prefetch": 4}}
    (path / "config.json").write_text(json.dumps(old | flat))


def today(**changes):
    base = ConfigDict(dict(seed=0, masking=dict(name="random", tokens_in_encoder=False)))
    base.data, base.hosts = ConfigDict(dict(resizer="pillow")), ConfigDict(dict(stall_seconds=600))
    base.online_probe = False
    base.update_from_flattened_dict(changes)
    return base


def test_an_old_run_resumes_although_the_recipe_gained_renamed_and_lost_keys(tmp_path):
    old_workdir(tmp_path, stall_seconds=60)
    provenance.prepare_workdir(tmp_path, today())
    assert json.loads((tmp_path / "config.json").read_text()) == today().to_dict()


def test_an_old_run_is_refused_another_value_than_the_behaviour_of_then(tmp_path):
    old_workdir(tmp_path)
    changed = today(**{"masking.tokens_in_encoder": True, "data.resizer": "fast"})
    with pytest.raises(ValueError, match="was made with another config") as raised:
        provenance.check_workdir(tmp_path, changed)
    differences = str(raised.value).splitlines()[1:-1]
    assert [line.strip() for line in differences] == [
        "data.resizer: 'pillow' -> 'fast'",
        "masking.tokens_in_encoder: False -> True",
    ]


@pytest.mark.parametrize("key", provenance.ADDED_KEYS)
def test_a_key_may_be_left_out_or_named_with_the_value_that_it_has_without(key):
    default = provenance.ADDED_KEYS[key]
    without, named, other = ({"seed": 0, "model": {"width": 8}} for _ in range(3))
    for config, value in ((named, default), (other, "another")):
        *parents, last = key.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[last] = json.loads(json.dumps(value))
    assert provenance.config_differences(without, named) == []
    assert provenance.config_differences(named, without) == []
    assert len(provenance.config_differences(without, other)) == 1
    assert len(provenance.config_differences(other, without)) == 1


def test_a_new_key_outside_the_table_is_refused(tmp_path):
    old_workdir(tmp_path)
    changed = today()
    changed.optim = ConfigDict(dict(blr=1.0))
    with pytest.raises(ValueError, match=r"optim.blr: 'none' -> 1.0"):
        provenance.check_workdir(tmp_path, changed)


@pytest.mark.parametrize("recipe", [pretrain, finetune, linprobe], ids=lambda x: x.__name__)
def test_recipes_gained_and_lost_no_key_that_the_tables_lack(recipe):
    """If this fails, add the key to ADDED_KEYS, RENAMED_KEYS or REMOVED_KEYS."""
    # What the recipes gave before config.hosts existed; their values may change, their keys not.
    old = json.loads((Path(__file__).parent / "data/first_configs.json").read_text())
    name = recipe.__name__.rpartition(".")[2]
    differences = provenance.config_differences(
        old[name], json.loads(recipe.get_config().to_json())
    )
    assert not [line for line in differences if "'none'" in line]


def test_a_renamed_key_keeps_its_value(tmp_path, monkeypatch):
    monkeypatch.setitem(provenance.RENAMED_KEYS, "old_name", "optim.new_name")
    old_workdir(tmp_path, old_name=3)
    changed = today()
    changed.optim = ConfigDict(dict(new_name=3))
    provenance.check_workdir(tmp_path, changed)
    changed.optim.new_name = 4
    with pytest.raises(ValueError, match="optim.new_name: 3 -> 4"):
        provenance.check_workdir(tmp_path, changed)


def test_another_environment_is_reported_once(tmp_path, capsys):
    provenance.prepare_workdir(tmp_path, config())
    env = json.loads((tmp_path / "env.json").read_text())
    (tmp_path / "env.json").write_text(json.dumps(env | {"jax": "0.0.1"}))
    provenance.prepare_workdir(tmp_path, config())
    provenance.prepare_workdir(tmp_path, config())
    (line,) = capsys.readouterr().out.splitlines()
    assert f"jax: '0.0.1' -> '{jax.__version__}'" in line


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written to"):
        provenance.prepare_workdir(tmp_path / "file/run", config())
