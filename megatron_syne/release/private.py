"""Finds what must not be published in text files: keys, paths and names of the machine where they were made.

Told by form (a token's prefix, an absolute path) and by value (the keys in this process's environment). What
is found is never repeated in a message, only its file, line and kind.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
"""Files whose entries may be any text, ``/usr/bin`` as well: only searched for keys."""

_KEYS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a Weights & Biases key": r"wandb_v1_\w{20,}|(?i:wandb)\w*\W{1,6}[0-9a-f]{40}\b",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|(?i:aws_secret_access_key)\W{1,6}[A-Za-z0-9/+=]{40}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an API key": r"(?<![\w-])sk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a signed token (JWT)": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
    "an authorisation header": r"(?i:authorization)\W{1,6}(?i:bearer|basic|token)\s+\S{8,}",
    "a URL with a password": r"://[^\s/:@\"']*:[^\s/@\"']+@",
    "a signed URL": r"[?&](?i:X-Amz-Signature|X-Goog-Signature|access_token|sig)=\S{8,}",
}
_BEFORE = r"(?:^|(?<=[\s\"'`(\[{=:,;|>]))"
_PATHS = {
    "a home directory": _BEFORE + r"(?:/(?:home|Users|root)/[\w.-]+|~[\w.-]*/[\w.-])"
    r"|\b[A-Za-z]:[\\/]{1,2}(?i:users|documents and settings)[\\/]",
    "an absolute path": _BEFORE + r"/[\w.@+-]+(?:/[\w.@+-]+)+" + r"|\bfile://",
}
_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:token|secret|password|passwd|key|credentials?)(?:_|$)")
_PLAIN_HOSTS = ("localhost", "localhost.localdomain")


def find_private(
    name: str, content: bytes, environment: Mapping[str, str] = os.environ, host: str | None = None
) -> list[str]:
    """``file:line: kind`` of all that must not be published; a file that is not text gives nothing.

    ``host``: this machine's name, not given = asked of the system.
    """
    try:
        text = content.decode("utf-8").replace("\\/", "/")  # JSON may write a slash so
    except UnicodeDecodeError:
        return []
    patterns = dict(_KEYS)
    for key, value in environment.items():
        if _SECRET_NAME.search(key) and len(value) >= 8:
            patterns[f"the value of ${key}"] = re.escape(value)
    if name not in VOCABULARIES:
        patterns |= _PATHS
        home = str(Path.home())
        if len(home) > 1:
            patterns["this machine's home directory"] = rf"(?<![\w./-]){re.escape(home)}(?![\w-])"
        host = socket.gethostname() if host is None else host
        if len(host) >= 4 and host not in _PLAIN_HOSTS:
            patterns["this machine's name"] = rf"(?<![\w-]){re.escape(host)}(?![\w-])"
    found = {
        (text.count("\n", 0, match.start()) + 1, kind)
        for kind, pattern in patterns.items()
        for match in re.finditer(pattern, text, re.MULTILINE)
    }
    return [f"{name}:{line}: {kind}" for line, kind in sorted(found)]
