"""What the commands of this room share: names between commas, and what they say."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from megatron_syne.errors import ConfigError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def patterns(text: str) -> list[str]:
    """``loss,validation/*`` -> its parts; ConfigError where there is none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ConfigError("--metrics: give names between commas, such as loss,validation/*")
    return found


def readable(text: str) -> str:
    """A name of the file system with ``?`` for bytes that are no UTF-8: neither JSON nor a picture takes those."""
    return text.encode("utf-8", "replace").decode()


def say(text: str) -> None:
    """Print; control characters, and what the terminal's encoding cannot show, are written out.

    A reader that has seen enough (head, less) changes no exit code.
    """
    shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_problems(problems: Sequence[str]) -> None:
    """What could not be read, on stderr."""
    for problem in problems:
        print(f"note: {_CONTROL.sub('?', problem)}", file=sys.stderr, flush=True)
