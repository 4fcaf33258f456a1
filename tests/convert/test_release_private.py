"""What must not be published is found, and what only looks like it is let through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.release.licences import TERMS, broken_terms, choose, licence_of_base, licence_of_text
from megatron_syne.release.private import VOCABULARIES, find_private

HEX = "0123456789abcdef" * 2 + "01234567"
A30 = "aB3" * 10


def kinds(text: str, name: str = "config.json", **environment: str) -> list[str]:
    return find_private(name, text.encode(), environment, host="node17")


# Put together here: no line of this file is a key itself.
PLANTED = [
    ("a Hugging Face token", "hf_" + A30),
    ("a Weights & Biases key", "WANDB_API_KEY=" + HEX),
    ("a Weights & Biases key", '"wandb": "' + HEX + '"'),
    ("a Weights & Biases key", "wandb" + "_v1_" + A30),
    ("an AWS key", "AK" + "IA" + "ABCDEFGH01234567"),
    ("an AWS key", "aws_secret_access_key = " + "aB3/" * 10),
    ("a GitHub token", "gh" + "p_" + "a" * 36),
    ("a GitHub token", "github" + "_pat_" + "a1" * 12),
    ("a GitLab token", "gl" + "pat-" + "a1" * 12),
    ("an API key", "sk" + "-proj-" + "a1" * 12),
    ("an API key", "AI" + "za" + "a1_-x" * 7),
    ("a Slack token", "xox" + "b-1234567890-abc"),
    ("a private key", "-----BEGIN " + "PRIVATE KEY-----"),
    ("a signed token (JWT)", "eyJ" + "a" * 20 + ".eyJ" + "b" * 20 + ".c"),
    ("an authorisation header", '"Authorization": "Bearer abcdefgh"'),
    ("a URL with a password", "https://" + "user:secret@host.org/x"),
    ("a URL with a password", "https://" + ":token@host.org/x"),
    ("a signed URL", "https://bucket/x?X-Amz-Signature=0123456789"),
    ("a home directory", "see /home/someone"),
    ("a home directory", '"/Users/someone/x"'),
    ("a home directory", "path=~/models"),
    ("a home directory", "~someone/models"),
    ("a home directory", '"C:\\\\Users\\\\someone"'),
    ("an absolute path", "/data/models"),
    ("an absolute path", "(/mnt/a-b/c.d)"),
    ("an absolute path", "file:///x"),
    ("this machine's name", "made on node17."),
]


@pytest.mark.parametrize(("kind", "text"), PLANTED)
def test_found(kind: str, text: str) -> None:
    assert f"config.json:3: {kind}" in kinds(f"{{\n\n {text}\n}}")


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(PLANTED),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5),
    st.data(),
)
def test_found_anywhere(planted: tuple[str, str], lines: list[str], data: st.DataObject) -> None:
    """Whatever stands in the lines around it."""
    at = data.draw(st.integers(0, len(lines)))
    text = "\n".join([*lines[:at], planted[1], *lines[at:]])
    assert any(found.endswith(planted[0]) for found in kinds(text))


def test_values_of_the_environment() -> None:
    secret = "correct-horse"
    assert kinds(f"a\n{secret}", MY_TOKEN=secret) == ["config.json:2: the value of $MY_TOKEN"]
    assert kinds(f"a\n{secret}", "tokenizer.json", DB_PASSWORD=secret) != []
    assert kinds(f"a\n{secret}", TOKENIZER=secret, KEYBOARD=secret) == [], "no secrets by their names"
    assert kinds("a true b", MY_TOKEN="true") == [], "too short to tell"


def test_home_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv_me")
    assert kinds("in /srv_me/x") == [
        "config.json:1: an absolute path",
        "config.json:1: this machine's home directory",
    ]
    assert kinds("in /srv_me2 and https://host/srv_me") == []


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/meta-llama/Meta-Llama-3-8B",
        "and/or, 1/2, zh/en, </s>, <|/think|>, {{ '/think' }}",
        '"revision": "' + HEX + '"',
        "sha256 " + "ab" * 32,
        "task-specific-and-very-long-hyphenated-word",
        "Q:\\nA: and system:\\n\\n",
        "a@b.org, http://host:8080/x, 12:30@noon",
        "https://www.cs.edu/~someone/x",
        "node170 and mynode17",
        "hf_transfer, wandb: offline",
    ],
)
def test_let_through(text: str) -> None:
    assert kinds(text) == []


def test_vocabularies_may_hold_paths() -> None:
    text = json.dumps({"/usr/bin": 1, "/home/user": 2})
    assert all(kinds(text, name) == [] for name in VOCABULARIES)
    assert kinds(text) != []


def test_binary_files_give_nothing() -> None:
    assert find_private("tokenizer.model", b"\xff\xfe/home/someone", {}, "node17") == []


def test_real_tokenizers_and_licences_are_clean(shared_data: Path, repository: Path) -> None:
    folders = [
        shared_data / "llama3-tokenizer",
        shared_data / "stories260k",
        repository / "examples/demo/base_model",
    ]
    files = [path for folder in folders for path in folder.iterdir() if path.suffix != ".safetensors"]
    assert len(files) > 8
    assert [line for path in files for line in find_private(path.name, path.read_bytes())] == []


def test_licence_of_metas_text(shared_data: Path) -> None:
    assert licence_of_text((shared_data / "llama3-tokenizer" / "LICENSE").read_text()) == "llama3"
    assert licence_of_text("**LLAMA 3.3 COMMUNITY LICENSE AGREEMENT**\n") == "llama3.3"
    assert licence_of_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT\n") == "llama2"
    assert licence_of_text("Apache License\nVersion 2.0") is None


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama3.1"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("org/Llama-3-8B", None),
    ],
)
def test_licence_of_base(base: str, licence: str | None) -> None:
    assert licence_of_base(base) == licence
    assert choose(None, base, {})[0] == licence


@pytest.mark.parametrize(
    ("licence", "name", "good"),
    [
        ("llama3", "Llama-3-SynE", True),
        ("llama3", "llama3-syne", True),
        ("llama3", "Llama_3.1x", True),
        ("llama3", "Llama-SynE", False),
        ("llama3", "Meta-Llama-3-SynE", False),
        ("llama3.1", "Llama-SynE", True),
        ("llama3.3", "Llama3-SynE", True),
        ("llama3.2", "SynE-Llama", False),
        ("llama2", "SynE", True),
        ("apache-2.0", "SynE", True),
    ],
)
def test_names(licence: str, name: str, good: bool) -> None:
    documents = {"LICENSE": b""}
    assert (broken_terms(licence, name, documents) == []) is good
    if licence in TERMS:
        assert any("must travel" in problem for problem in broken_terms(licence, name, {}))
