"""A workdir knows whose it is, and is refused to others."""

import json

import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

from mae_jax import provenance


def config(**changes):
    base = ConfigDict(dict(log_every="50 steps", model=dict(width=8, remat=False)))
    base.update_from_flattened_dict(changes)
    return base


def test_a_workdir_holds_its_config_and_environment(tmp_path):
    provenance.prepare_workdir(tmp_path / "a/b", config())
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
    assert (tmp_path / "config.json").read_text() == before


def test_another_number_of_examples_is_refused(tmp_path):
    provenance.prepare_workdir(tmp_path, config(), 50)
    provenance.prepare_workdir(tmp_path, config(), 50)
    provenance.check_workdir(tmp_path, config())
    with pytest.raises(ValueError, match="a dataset of 50 examples, which has 1,070 now"):
        provenance.check_workdir(tmp_path, config(), 1070)


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", refuse)
    with pytest.raises(ValueError, match="cannot be written to.*Permission denied"):
        provenance.check_workdir(tmp_path, config())


def test_keys_that_cannot_change_the_result_may_change(tmp_path):
    provenance.prepare_workdir(tmp_path, config())
    changed = config(**{"model.remat": True, "log_every": "9 steps"})
    provenance.prepare_workdir(tmp_path, changed)
    assert json.loads((tmp_path / "config.json").read_text()) == changed.to_dict()


def test_another_environment_is_said_once(tmp_path, capsys):
    provenance.prepare_workdir(tmp_path, config())
    env = json.loads((tmp_path / "env.json").read_text())
    (tmp_path / "env.json").write_text(json.dumps(env | {"jax": "0.0.1"}))
    provenance.prepare_workdir(tmp_path, config())
    provenance.prepare_workdir(tmp_path, config())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f"jax: '0.0.1' -> '{jax.__version__}'" in said[0]


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written to"):
        provenance.prepare_workdir(tmp_path / "file/run", config())
