"""Recipes are found and read by name and by path, in a checkout and from an installed package."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from absl import flags

from mae_jax.commands import recipes
from mae_jax.config import OPTIONAL_KEYS, leaves
from mae_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "configs/pretrain.py"
FORK = """from {package}.pretrain import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    {change}
    return config
"""


def parse(*argv):
    def define(values):
        flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)

    return recipes.parse(list(argv), define, "train")


def fork(folder, change, package="mae_jax.configs"):
    file = folder / "mine.py"
    file.write_text(FORK.format(package=package, change=change))
    return file


PATH = "--config=configs/pretrain.py"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([PATH, "--config.mask_ratoi=0.9"], "config.mask_ratoi: .*nearest: mask_ratio"),
        ([PATH, "--config.model.patch_siz=8"], "no such key; nearest: model.patch_size"),
        ([PATH, "--config.evals.knn.every=5"], "config.evals.knn.every: pretrain has no such key"),
        ([PATH, "--config.optim.nme=muon"], "config.optim.nme: .*nearest: optim.name"),
        (
            [PATH, "--config.model.image_size.x=3"],
            "config.model.image_size.x: pretrain has no such",
        ),
        ([PATH, "--config.mask_ratio=nan"], "config.mask_ratio=nan: give a number above 0"),
        ([PATH, "--config.mask_ratio=much"], "could not convert string to float"),
        ([PATH, "--config.seed=1.5"], "invalid literal for int"),
        ([PATH, "--config.masking.cell=two"], "write --config.masking.cell=VALUE, with a int"),
        ([PATH, "--config.masking.cell"], "write --config.masking.cell=VALUE, with a int"),
        ([PATH, "--config.masking.cell=0"], "config.masking.cell=0: give a whole number from 1"),
        ([PATH, "--nope=1"], "nope"),
        ([PATH, "stray"], "unexpected argument 'stray'"),
        ([PATH, "--config.connect_seconds=3"], "is now config.hosts.connect_seconds"),
        ([PATH, "--config.heartbeat_seconds=3"], "is now config.hosts.heartbeat_seconds"),
        ([PATH, "--config.data.threads=3"], "now the constant THREADS of mae_jax/data/workers.py"),
        ([PATH, "--config.data.prefetch=3"], "the constant PREFETCH of mae_jax/data/workers.py"),
        ([f"{PATH}:variant=Q/16"], "B/16"),
        ([f"{PATH}:size=3"], "variant"),
        ([f"{PATH}:epochs=many"], "wants a int"),
        (["--config=configs/pretrian.py"], "'configs/pretrian.py' in .*; nearest: pretrain"),
        (["--config=elsewhere/pretrain.py"], "no file 'elsewhere/pretrain.py'"),
        (["--config=common"], "no recipe of that name"),
        (["--workdir=DIR"], "--config=RECIPE is missing"),
    ],
)
def test_a_mistyped_recipe_argument_or_option_is_refused_with_what_was_meant(argv, words):
    with pytest.raises(ValueError, match=words):
        parse(*argv)


@pytest.mark.parametrize("package", ["configs", "mae_jax.configs"])
def test_recipes_take_arguments_overrides_and_lie_anywhere(tmp_path, package):
    mine = fork(tmp_path, "config.mask_ratio = 0.6", package)
    config, values, name = parse(
        f"--config={mine}:variant=L/16,epochs=1600",
        "--config.model.image_size=(224,448)",
        "--workdir=DIR",
    )
    assert (config.model.width, config.mask_ratio) == (1024, 0.6)
    assert config.train_for == "1600 epochs"
    assert config.model.image_size == (224, 448)
    assert config.is_locked
    assert (name, values.workdir) == ("mine", "DIR")


def test_a_key_that_no_recipe_names_can_be_given_all_the_same():
    block = ("--config.model.block.registers=4", "--config.model.block.rope=1e2")
    bands = "--config.data.value_range=(0, 10000)"
    config, *_ = parse(PATH, "--config.masking.roll=false", "--config.data.repeat=2", bands, *block)
    assert config.masking.roll is False
    assert config.data.value_range == (0, 10000)
    assert config.data.repeat == 2
    assert config.model.block.to_dict() == dict(registers=4, rope=100.0)
    assert not set(OPTIONAL_KEYS) & {key for key, _ in leaves(parse(PATH)[0])}


def test_the_last_value_of_a_key_counts_also_of_a_tuple():
    size = "--config.model.image_size"
    config, *_ = parse(PATH, f"{size}=64,64", "--config.seed=1", "--config.seed=2", f"{size}=32,32")
    assert (config.model.image_size, config.seed) == ((32, 32), 2)


@pytest.mark.parametrize(
    ("recipe", "key", "home"),
    [
        ("finetune", "masking.cell=4", "masking"),
        ("linprobe", "target.components=3", "target"),
        ("knn", "model.decoder_share=0.5", "model.decoder_width"),
    ],
)
def test_an_optional_key_of_a_part_that_the_recipe_lacks_is_refused(recipe, key, home):
    with pytest.raises(UserError, match=f"recipe {recipe} has no config.{home}: leave the key out"):
        parse(f"--config={recipe}", f"--config.{key}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("config.stall_seconds = 0", "config.hosts.stall_seconds"),
        ("config.data.update(threads=2)", "the constant THREADS"),
        ("import configs_of_nobody", "No module named 'configs_of_nobody'"),
    ],
)
def test_a_recipe_that_sets_an_old_key_or_misses_a_module_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        parse(f"--config={fork(tmp_path, change)}")


def test_a_file_that_is_no_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file before this one
    (tmp_path / "mine.py").write_text("config = 1\n")
    with pytest.raises(ValueError, match=r"mine.py: the file has no function get_config\(arg\)"):
        parse(f"--config={tmp_path / 'mine.py'}")


def test_a_file_comes_before_the_installed_recipe_and_a_name_is_always_installed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert recipes.find("configs/pretrain.py") == recipes.find("pretrain") == PRETRAIN
    (tmp_path / "configs").mkdir()
    fork(tmp_path, "config.mask_ratio = 0.6").rename(tmp_path / "configs/pretrain.py")
    assert parse("--config", "configs/pretrain.py")[0].mask_ratio == 0.6
    assert parse("--config=pretrain")[0].mask_ratio == 0.75


def test_help_lists_the_recipes_and_the_flags_of_the_command_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--config=configs/pretrain.py", "--nope", "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "mae-jax train --config=" in told and "pretrain, quickstart" in told
    assert "--workdir" in told and "--flagfile" not in told


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A copy of the checkout, and its wheel unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    checkout, wheel = folder / "checkout", folder / "wheel"
    for name in ("mae_jax", "configs", "weights"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    # A copy, because a build leaves files behind.
    source = shutil.copytree(checkout, folder / "source")
    subprocess.run([*pip, "--no-build-isolation", f"--wheel-dir={folder}", source], check=True)
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(wheel)
    return {"checkout": checkout, "wheel": wheel}


@pytest.mark.parametrize(
    ("place", "recipe"),
    [("wheel", "mae_jax/configs/pretrain.py"), ("checkout", "configs/pretrain.py")],
)
def test_a_recipe_is_imported_without_jax(places, tmp_path, place, recipe):
    code = (
        "import sys; from mae_jax.configs import finetune, pretrain;"
        "pretrain.get_config(), finetune.get_config();"
        "print(pretrain.__file__, 'jax' in sys.modules)"
    )
    found = run(places[place], tmp_path, "-c", code)
    assert found.stdout.split() == [str(places[place] / recipe), "False"]


@pytest.mark.parametrize("config", ["pretrain:variant=Ti/16", "configs/pretrain.py:variant=Ti/16"])
@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_train_finds_the_installed_recipe_from_any_folder(places, tmp_path, place, config):
    command = ["-m", "mae_jax", "train", f"--config={config}", "--config.mask_ratoi=0.9"]
    refused = run(places[place], tmp_path, *command)
    assert refused.returncode == 2, refused.stderr
    assert "pretrain has no such key; nearest: mask_ratio" in refused.stderr


def test_the_extra_tpu_brings_what_buckets_need(places):
    (metadata,) = places["wheel"].glob("*.dist-info/METADATA")
    required = [line for line in metadata.read_text().splitlines() if "gcsfs" in line]
    extras = [re.findall(r"extra == .(\w+)", line) for line in required]
    assert extras == [["tpu"], ["gcs"], ["test"]]


def test_the_wheel_has_every_recipe_and_data_file(places):
    shipped_files = (
        *(("configs", "*.py"), ("configs/ablations", "*.py"), ("mae_jax/data", "*.json")),
        *(("weights/cifar10-s", "*.safetensors"), ("weights/cifar10-s", "*config.json")),
    )
    for folder, files in shipped_files:
        inside = places["wheel"] / "mae_jax" / folder.removeprefix("mae_jax/")
        shipped = {path.name for path in inside.glob(files)}
        assert shipped == {path.name for path in (ROOT / folder).glob(files)} != set()


def run(place, cwd, *arguments):
    """Run Python in a folder, with the packages of another place."""
    environment = {"PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
