"""Package metadata of megatron_syne, all of it.

A plain ``pip install .`` works on a laptop: no GPU library among the requirements. The versions the tests ran
with stand in ``constraints.txt``: ``pip install -c constraints.txt -e .[dev]`` repeats them.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """The version out of ``megatron_syne/__init__.py``, read as text: nothing is imported to build."""
    text = (HERE / "megatron_syne" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_syne/__init__.py: no line __version__ = "..."')
    return match.group(1)


def read_description() -> str:
    """The README, or nothing in a checkout that has none yet."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


REQUIRES = [
    "megatron-core==0.16.1",  # exact: platform/cpu.py bridges this version's internals
    "blake3>=1",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "orjson>=3.10",
    "packaging>=24",
    "plotly>=6",
    "psutil>=6",
    "PyYAML>=6",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tensorboard>=2.19",
    "tiktoken>=0.9",
    "tokenizers>=0.22",
    "torch>=2.8",
    "tqdm>=4.66",
    "zstandard>=0.23",
]

# Preparing data beyond JSONL: parquet files, the topic classifier.
DATA = ["pyarrow>=17", "scikit-learn>=1.5"]
HUGGING_FACE = ["huggingface_hub>=0.34", "transformers>=4.55,<6"]

EXTRAS = {
    # transformers: the demo's last step, the judge of verify --logits and of the tests; the hub: its ids.
    "hf": HUGGING_FACE,
    # Builds against the installed torch: install a CUDA torch first, then this with --no-build-isolation.
    # Never on a machine without CUDA libraries: there it breaks `import megatron.core` itself. No extra
    # includes it for that reason.
    "te": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12; sys_platform == 'linux'"],
    "data": DATA,
    # Evaluation during training: the harness, and what its transformers model imports.
    "eval": [*HUGGING_FACE, "lm_eval>=0.4.11,<0.5", "accelerate>=1"],
    "wandb": ["wandb>=0.19"],
    "dali": ["nvidia-dali-cuda130>=2.0; sys_platform == 'linux'"],
    "dev": [
        *DATA,
        *HUGGING_FACE,
        "hypothesis>=6.100",
        "mypy>=2.4",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.17",
        "types-PyYAML",
    ],
}

setup(
    name="megatron_syne",
    version=read_version(),
    description="Continual pre-training of Llama-3 on megatron-core, from Hugging Face weights and back",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    author="The megatron_syne authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_syne", "megatron_syne.*"]),
    package_data={"megatron_syne.curation": ["templates/*.txt"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
