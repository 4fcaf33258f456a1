"""``examples/data``: its commands are those of the tools, run on the first lines of the demo's texts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_syne.config.loader import load_config

REPOSITORY = Path(__file__).resolve().parents[3]
LINES = 60


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example script in a copy of the checkout, started from elsewhere."""
    return subprocess.run(
        [str(folder / "examples" / "data" / script), *arguments],
        cwd="/", capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy with the scripts, in which ``runs`` is nobody's."""
    for name in ("tools", "launch", "megatron_syne"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "examples" / "data", tmp_path / "examples" / "data")
    return tmp_path


def test_curate_sh_runs_to_its_end(checkout: Path) -> None:
    demo = checkout / "examples" / "demo"
    (demo / "texts").mkdir(parents=True)
    (demo / "base_model").symlink_to(REPOSITORY / "examples" / "demo" / "base_model")
    for file in (REPOSITORY / "examples" / "demo" / "texts").glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (demo / "texts" / file.name).write_text("".join(lines[:LINES]), encoding="utf-8")
    recipe = checkout / "examples" / "data" / "curated.yaml"
    text, count = re.subn(r"tokens: (\d+)0_000", r"tokens: \g<1>00", recipe.read_text())
    assert count == 2  # as little text as there is here
    recipe.write_text(text)

    done = run(checkout, "curate.sh")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = checkout / "runs" / "data"
    for name in ("zh_web", "en_math", "synthetic", "synthetic_valid"):
        assert all(
            (made / f"{name}.{end}").exists() == (name[-5:] != "valid") for end in ("bin", "idx", "json")
        )
    assert (made / "en_math.perplexity.npy").exists()
    assert not list(made.glob("*.shard-*"))
    for picture in ("lengths.png", "mixture.png"):
        assert (made / picture).read_bytes().startswith(b"\x89PNG")
    assert "sample 0 of" in done.stdout and "source zh_web, epoch 0" in done.stdout


def test_curated_yaml_reads_what_curate_sh_makes() -> None:
    config = load_config(str(REPOSITORY / "examples" / "data" / "curated.yaml"), [])
    script = (REPOSITORY / "examples" / "data" / "curate.sh").read_text()
    for source in config.data.sources.values():
        assert Path(source.path).parent == REPOSITORY / "runs" / "data"
        assert f'--output-prefix "$OUT/{Path(source.path).name}"' in script


def test_syne_corpus_sh_prepares_what_syne_yaml_reads(checkout: Path) -> None:
    data = yaml.safe_load((REPOSITORY / "examples" / "llama3_8b" / "syne.yaml").read_text())["data"]
    (checkout / "weights" / "Meta-Llama-3-8B").mkdir(parents=True)
    for name in data["sources"]:
        (checkout / "corpus" / name).mkdir(parents=True)
        (checkout / "corpus" / name / "a.jsonl").write_text('{"text": "some words"}\n')
    done = run(checkout, "syne_corpus.sh", "--print", "--partition", "cpu")
    assert done.returncode == 0, done.stderr
    prefixes = set(re.findall(r"--(?:output|valid)-prefix (\S+)", done.stdout))
    names = {
        Path(source["path"]).name for kind in ("sources", "validation") for source in data[kind].values()
    }
    assert names <= {Path(prefix).name for prefix in prefixes}
    assert prefixes == {f"{checkout}/data/{name}{end}" for name in data["sources"] for end in ("", "_valid")}
    assert done.stdout.count("#SBATCH --partition=cpu") == 2 * len(data["sources"])
    assert not (checkout / "data").exists()
