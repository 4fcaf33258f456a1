"""Who may import whom, which heavy package is reached from where, and what nobody may call.

Read from the sources alone (AST): an import inside a function counts like one at the top. A new room or a
new reach of megatron-core is a line in a table here, and so a decision.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_syne"

# What of models is plain values: no torch, open to the login node.
LIGHT_MODELS = tuple(
    f"models.{name}"
    for name in (
        "config",
        "families",
        "family",
        "flops",
        "hf_config",
        "hf_rope",
        "json_file",
        "parameter_names",
    )
)

# Room or module -> what of ours it may import, beside itself and errors. The longest matching key counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "command_line": (),
    "config": (),
    "fp8": ("config", "platform", "models.gpt", "training.callback", "training.forward"),
    "fp8.choice": ("config",),
    "fp8.layers": (),
    "platform": ("config", "fp8", "parallel.context"),
    "parallel": ("config", "platform"),
    "parallel.topology": ("config",),
    "models": ("config", "platform", "parallel.context"),
    **{name: ("config", "models") for name in LIGHT_MODELS},
    "convert": ("config", "models", "parallel.topology"),
    "release": ("config", "models", "convert", "data.mixture"),
    "parity": ("config", "platform", "parallel", "models", "convert"),
    "data": ("config",),
    "data.documents": (),
    "data.tokenizers": ("data.tokens",),
    "data.preparation": ("data.documents", "data.tokens", "data.tokenizer"),
    "data.mixture": ("config",),
    "data.tokens": ("config", "data.mixture.ledger"),
    "curation": ("command_line", "config", "platform.base", "data.documents", "data.tokenizer"),
    "curation.perplexity_parallel": ("config", "platform", "parallel", "models", "curation", "training"),
    "pictures": (),
    "planner": (
        "command_line",
        "config",
        *LIGHT_MODELS,
        "parallel.topology",
        "data.mixture",
        "fp8.choice",
        "pictures",
        "preflight",
        "runs",
    ),
    "planner.hardware": (),
    "planner.timeline": (),
    "runs": ("command_line", "pictures"),
    "inspection": ("config", *LIGHT_MODELS, "data", "preflight.manifests", "checkpoint.folder", "pictures"),
    "preflight": (
        "config",
        *LIGHT_MODELS,
        "parallel.topology",
        "data.mixture",
        "fp8.choice",
        "evaluation.tasks",
    ),
    "evaluation": (
        "command_line",
        "config",
        "convert",
        "checkpoint.folder",
        "resilience.signals",
        "training.callback",
    ),
    "evaluation.tasks": ("config",),
    "training": ("config", "platform", "parallel", "models", "fp8.layers"),
    "checkpoint": (
        "config",
        "platform",
        "parallel",
        "models.gpt",
        "fp8.layers",
        "monitor.step",
        "training.callback",
        "training.state",
    ),
    "monitor": (
        "config",
        "platform",
        "parallel",
        "models.flops",
        "planner.hardware",
        "training.callback",
        "training.state",
    ),
    "resilience": ("config", "platform", "parallel", "training.callback", "training.state"),
    "curriculum": ("config", "data", "training.callback"),
    "legs": ("config", "models", "data", "convert.weights", "training.state"),
    "assembly": ("",),
    "train": ("",),  # the assemblers
    "score": ("",),
}
ROOT_NAMES = ("", "__version__")  # the package itself costs nothing and is open to all

# Named in annotations alone, below ``if TYPE_CHECKING``: the callbacks' events get the trainer.
MAY_ANNOTATE: dict[str, tuple[str, ...]] = {
    "checkpoint": ("training.trainer",),
    "monitor": ("training.trainer",),
    "resilience": ("training.trainer",),
    "curriculum": ("training.trainer",),
    "fp8": ("training.trainer",),
    "evaluation": ("training.trainer",),
}
LAUNCH_MAY_IMPORT = (
    "command_line",
    "config",
    "preflight",
    "parallel.topology",
    "data.documents.inputs",
    *LIGHT_MODELS,
)

# Heavy package -> the only rooms and modules that may import it.
HEAVY: dict[str, tuple[str, ...]] = {
    "megatron": (
        "platform.cpu",
        "platform.cpu_attention",
        "platform.cpu_gloo",
        "platform.cuda",
        "platform.cuda_fp8",
        "platform.cuda_kernels",
        "parallel.setup",
        "models.gpt",
        "models.engine_options",
        "models.loss",
        "models.chunked_loss",
        "models.embedding_noise",
        "fp8",
        "training",
        "checkpoint",
        "parity",
        "curation.perplexity_parallel",
    ),
    "transformer_engine": ("platform.cuda", "platform.cuda_fp8", "platform.cuda_kernels"),
    "apex": ("platform.cuda",),
    "safetensors": ("parity",),  # elsewhere convert/formats/safetensors.py reads and writes the format
    "tokenizers": ("data.tokenizers", "convert.surgery"),
    "sentencepiece": ("data.tokenizers", "convert.surgery"),
    "tiktoken": ("data.tokenizers",),
    "pyarrow": ("data.documents",),
    "zstandard": ("data.documents", "curation.records"),
    "sklearn": ("curation",),
    "matplotlib": ("pictures",),
    "plotly": ("pictures",),
    "tensorboard": ("monitor", "runs"),
    "wandb": ("monitor",),
    "lm_eval": ("evaluation.harness",),
    "transformers": ("evaluation.harness", "parity", "curation.encoder", "curation.perplexity_hf"),
    "huggingface_hub": ("convert.hub",),
    "nvidia": ("data.dali",),
}

# What runs on a login node, or must start in a moment: neither these nor anything that they import reaches torch.
TORCH_FREE = (
    "errors",
    "command_line",
    "config",
    "preflight",
    *LIGHT_MODELS,
    "data",
    "curation",
    "pictures",
    "planner",
    "runs",
    "inspection",
    "parallel.topology",
    "convert",
    "release",
)
NEEDS_TORCH = (  # hand tensors to a model, or run one
    "convert.weights",
    "data.loader",
    "data.dali",
    "curation.encoder",
    "curation.perplexity_hf",
    "curation.perplexity_parallel",
)

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# torch_dist keeps its index as a pickle: one reader is torch's classes by an allow-list, for the engine; the other
# makes inert values, for conversion, of which the third writes its like out of opcodes.
RESTRICTED_UNPICKLERS = ("megatron_syne/checkpoint/folder.py", "megatron_syne/convert/formats/pickles.py")
PICKLE_WRITER = "megatron_syne/convert/formats/dcp_pickle.py"
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "numpy.fromfile",
    "tempfile.mktemp",
}
UNSAFE_METHODS = {"extractall", "unsafe_load"}
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


class Source:
    """One Python file: its dotted name within the package or repository, and its tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = path.relative_to(ROOT).as_posix()
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        self.is_room = parts[-1] == "__init__"
        self.module = ".".join(parts[:-1] if self.is_room else parts)
        self.tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))

    @property
    def inner(self) -> str:
        """Name within the package: ``megatron_syne.data.dataset`` -> ``data.dataset``."""
        return self.module.removeprefix(PACKAGE).lstrip(".")

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, absolute dotted name) of everything imported; ``from a import b`` is ``a.b``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.module.split(".")
                    up = node.level - (1 if self.is_room else 0)
                    base = ".".join([*parents[: len(parents) - up], *([base] if base else [])])
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"

    def annotation_lines(self) -> set[int]:
        """Lines below ``if TYPE_CHECKING``."""
        return {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            for statement in node.body
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
        }

    def aliases(self) -> dict[str, str]:
        """Local name -> what it stands for: ``import numpy as np`` gives ``np: numpy``."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    names[local] = alias.name if alias.asname else local
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return names


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files below the folders."""
    return tuple(Source(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """``np.load`` -> ``numpy.load``; empty where the expression is no dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    parts.append(aliases.get(node.id, node.id))
    return ".".join(reversed(parts))


def within(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the allowed ones or lies below one ("" allows all)."""
    return any(not one or name == one or name.startswith(one + ".") for one in allowed)


def rule_of(inner: str) -> tuple[str, ...] | None:
    """The table's line for a module: its own where it has one, else its room's; always with itself."""
    for key in sorted(MAY_IMPORT, key=len, reverse=True):
        if within(inner, (key,)):
            return (*MAY_IMPORT[key], key, "errors")
    return None


def is_torch_free(source: Source) -> bool:
    """Whether torch is out of bounds here: listed, the launcher, or a room's ``__init__``."""
    light = within(source.inner, TORCH_FREE) and not within(source.inner, NEEDS_TORCH)
    return source.is_room or light or source.where.startswith("launch/")


def test_the_walk_finds_the_house() -> None:
    """Guards the guards: every other test here passes on an empty list."""
    found = {source.inner for source in sources(PACKAGE)}
    assert {"errors", "config.schema", "platform.cpu", "models.gpt", "training.trainer"} <= found
    gpt = next(source for source in sources(PACKAGE) if source.inner == "models.gpt")
    names = [name for _, name in gpt.imports()]
    assert "torch" in names, names
    assert any(name.startswith("megatron.core.models.gpt") for name in names), "imports in functions count"


def test_every_room_has_a_rule() -> None:
    rooms = {source.inner.partition(".")[0] for source in sources(PACKAGE)} - {""}
    assert rooms <= {key.partition(".")[0] for key in MAY_IMPORT}, "add the new room to MAY_IMPORT"


def test_import_directions() -> None:
    wrong = []
    for source in sources(PACKAGE):
        if not source.inner:
            continue  # the package's own __init__: see test_rooms_import_nothing
        allowed = rule_of(source.inner)
        assert allowed is not None, source.where
        annotations, room = source.annotation_lines(), source.inner.partition(".")[0]
        for line, name in source.imports():
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                inner = name.removeprefix(PACKAGE).lstrip(".")
                also = MAY_ANNOTATE.get(room, ()) if line in annotations else ()
                if inner not in ROOT_NAMES and not within(inner, (*allowed, *also)):
                    wrong.append(f"{source.where}:{line}: {name}")
            elif name.partition(".")[0] in ("tools", "launch", "examples", "benchmarks", "tests"):
                wrong.append(f"{source.where}:{line}: {name} (the library never imports what stands on it)")
    assert not wrong, "\n".join(["imports against the directions:", *wrong])


def test_launcher_imports_only_the_light_rooms() -> None:
    wrong = [
        f"{source.where}:{line}: {name}"
        for source in sources("launch")
        for line, name in source.imports()
        if name.startswith(f"{PACKAGE}.")
        and not within(name.removeprefix(f"{PACKAGE}."), (*LAUNCH_MAY_IMPORT, "errors", *ROOT_NAMES[1:]))
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_import_nothing() -> None:
    """``__init__.py`` is a docstring (the package's also the version): importing a room costs nothing."""
    for source in sources(PACKAGE):
        if not source.is_room:
            continue
        assert ast.get_docstring(source.tree), f"{source.where}: no docstring"
        rest = source.tree.body[1:]
        if not source.inner:
            assert len(rest) == 1 and isinstance(rest[0], ast.Assign), f"{source.where}: the version alone"
        else:
            assert not rest, f"{source.where}: more than a docstring"


def test_every_folder_of_the_package_is_a_room() -> None:
    """Without ``__init__.py`` a folder would not be installed."""
    folders = {source.path.parent for source in sources(PACKAGE)}
    missing = [folder.name for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, missing


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_package_is_reached_only_from(package: str) -> None:
    wrong = [
        f"{source.where}:{line}: {name}"
        for source in sources(PACKAGE, "launch")
        for line, name in source.imports()
        if name.partition(".")[0] == package
        and (source.where.startswith("launch/") or not within(source.inner, HEAVY[package]))
    ]
    assert not wrong, "\n".join([f"{package} may be imported only in {HEAVY[package]}:", *wrong])


def test_torch_free_modules_do_not_import_torch() -> None:
    wrong = [
        f"{source.where}:{line}: {name}"
        for source in sources(PACKAGE, "launch")
        if is_torch_free(source)
        for line, name in source.imports()
        if (package := name.partition(".")[0]) == "torch"
        or (package in HEAVY and not within(source.inner, HEAVY[package]))
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_modules_load_without_torch() -> None:
    """For real, in a process where importing torch fails: the way there must be free of it too."""
    modules = [source.module for source in sources(PACKAGE) if is_torch_free(source)]
    blocked = ["torch", *HEAVY]
    code = (
        "import importlib, sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def unsafe_uses(source: Source) -> Iterator[str]:
    """``file:line: what`` for each call or import that can run code out of a file."""
    aliases = source.aliases()
    for line, name in source.imports():
        known = name == "pickle" and source.where in (*RESTRICTED_UNPICKLERS, PICKLE_WRITER)
        if (name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS) and not known:
            yield f"{source.where}:{line}: import of {name}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, aliases)
        if name in UNSAFE_CALLS:
            yield f"{source.where}:{node.lineno}: {name}()"
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS:
            yield f"{source.where}:{node.lineno}: .{node.func.attr}()"
        for keyword in node.keywords:
            plainly_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in UNSAFE_KEYWORDS and not plainly_off:
                yield f"{source.where}:{node.lineno}: {keyword.arg}="


def test_nothing_unsafe_is_called() -> None:
    """Weights, tokenizers, configurations and caches come from strangers: nothing of them is executed."""
    wrong = [use for source in sources(PACKAGE, "tools", "launch", "examples") for use in unsafe_uses(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load as read",
        "import torch as t\nt.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "archive.extractall('x')",
        "eval('1')",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_unsafe_is_recognised(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "x.py").write_text(code)
    assert list(unsafe_uses(Source(tmp_path / "x.py")))


@pytest.mark.parametrize("where", [*RESTRICTED_UNPICKLERS, PICKLE_WRITER])
def test_unpicklers_are_restricted(where: str) -> None:
    """Of pickle they use the class to derive from and the names of opcodes, nothing else; each derived class says
    what may be found."""
    source = Source(ROOT / where)
    aliases = source.aliases()
    classes = {"pickle.Unpickler", "pickle._Unpickler"}
    derived = [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and any(dotted(base, aliases) in classes for base in node.bases)
    ]
    assert bool(derived) is (where != PICKLE_WRITER)
    for node in derived:
        assert any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body)
    for node in ast.walk(source.tree):
        called = isinstance(node, ast.Call) and dotted(node.func, aliases)
        assert not (called and called.startswith("pickle.")), f"{where}:{node.lineno}: {called}()"
        if isinstance(node, ast.Attribute):
            name = dotted(node, aliases)
            base, _, last = name.rpartition(".")
            if base == "pickle":
                assert name in classes | {"pickle.UnpicklingError"} or last.isupper(), f"{where}: {name}"


def test_only_the_platform_asks_cuda_or_cpu() -> None:
    """``torch.cuda`` and comparisons with "cpu" and "cuda" live in platform/; preflight knows the names,
    and so does the arithmetic of a configuration, since both speak before anything starts."""
    wrong = []
    for source in sources(PACKAGE):
        if within(source.inner, ("platform",)):
            continue
        aliases = source.aliases()
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and dotted(node, aliases) == "torch.cuda":
                wrong.append(f"{source.where}:{node.lineno}: torch.cuda")
            if isinstance(node, ast.Attribute) and node.attr == "is_cuda":
                wrong.append(f"{source.where}:{node.lineno}: .is_cuda")
            if isinstance(node, ast.Compare | ast.MatchValue) and not within(
                source.inner, ("preflight", "config.arithmetic", "fp8.choice")
            ):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and part.value in ("cpu", "cuda"):
                        wrong.append(f"{source.where}:{node.lineno}: asks for {part.value!r}")
        for line, name in source.imports():
            if name == "torch.cuda" or name.startswith("torch.cuda."):
                wrong.append(f"{source.where}:{line}: import {name}")
    assert not wrong, "\n".join(wrong)


def repository_files() -> list[Path]:
    """Files of the repository: tracked, and new ones that are not ignored."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_one_machine() -> None:
    """What only exists where this was written would break everywhere else."""
    machine = re.compile(
        r"(?<![\w./$}])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "tmp/v" + "e"]) + r")(?![\w-])"
    )
    wrong = []
    for path in repository_files():
        raw = path.read_bytes()
        if b"\0" in raw[:8192]:
            continue  # weights and the like
        for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), 1):
            if machine.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not wrong, "\n".join(wrong)
