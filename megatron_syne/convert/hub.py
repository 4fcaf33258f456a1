"""Weights by their hub id: the folder of a Hugging Face model on this machine, downloaded where need be.

``huggingface_hub`` does the downloading, into the cache that all its users share, so nothing is fetched twice;
it is imported when an id is asked for, and no requirement of the package. Only what a conversion reads is
fetched: safetensors, JSON, tokenizer and licence, never pickles or code. No torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_syne.errors import MissingInput, disk_fault

# Of the files at the repository's root. Pickles and code are not in this list, and so never fetched.
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer*",
    "*.model",
    "LICENSE*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY.md",
]
# Sub-folders hold the same weights in other formats (Meta's original/), consolidated.* (Mistral) does as well.
_UNWANTED = ["*/*", "consolidated*", "*.py", "*.bin", "*.pt", "*.pth"]

_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


def resolve_hub_id(name: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Folder of a local model or of a hub id such as ``meta-llama/Meta-Llama-3-8B``; local folders win.

    ``revision`` is a branch, tag or commit (not given: ``main``); what it was resolved to is in the folder's
    name, see :func:`hub_origin`. ``cache_dir``: not given = where ``huggingface_hub`` keeps its cache.
    Raises MissingInput: nothing of that name, gated, no network and not in the cache, no safetensors.
    """
    if Path(name).exists():
        return Path(name)
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise MissingInput(
            f"{name}: no such folder; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    what = name if revision is None else f"{name} at revision {revision}"
    try:
        if "/" not in name:
            raise errors.HFValidationError("expected organisation/model")
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except errors.HFValidationError:
        raise MissingInput(
            f"{name}: no such folder, and no hub id either (organisation/model, as meta-llama/Meta-Llama-3-8B)"
        ) from None
    except errors.GatedRepoError:
        raise MissingInput(
            f"{what}: gated: accept its licence at {constants.ENDPOINT}/{name}, then log in with "
            f"`hf auth login` or set HF_TOKEN to a token of the account that accepted"
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingInput(f"{what}: the hub has the model but no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise MissingInput(
            f"{what}: no such folder, and no such model on the hub; if it is private, log in with "
            f"`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise MissingInput(
            f"{what}: not in the hub's cache on this machine, and the hub cannot be reached "
            f"({_reason(error)}). Download it where there is a network "
            f"(hf download {name}) and give the folder, or copy the cache here (HF_HOME)"
        ) from None
    except Exception as error:  # its HTTP library's own errors: another one in each major version
        if disk_fault(error):
            raise
        raise MissingInput(f"{what}: cannot be downloaded: {_reason(error)}") from None
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise MissingInput(
            f"{what}: has no safetensors at its root (pickles are never fetched); look for a copy or a revision "
            f"that has them"
        )
    return folder


def hub_origin(folder: Path) -> dict[str, str] | None:
    """``{"id", "revision"}`` of a folder in the hub's cache, the revision as a commit; None for any other.

    Read from the path alone, as the cache has it: ``models--<organisation>--<model>/snapshots/<commit>``.
    """
    match = _SNAPSHOT.search(folder.resolve().as_posix())
    if match is None:
        return None
    return {"id": match["id"].replace("--", "/", 1), "revision": match["revision"]}


def _reason(error: BaseException) -> str:
    """What lies at the bottom of a chain of errors, in one line and without the token."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    text = " ".join(str(error).split()) or type(error).__name__
    token = _token()
    return (text.replace(token, "***") if token else text)[:300]


def _token() -> str | None:
    from huggingface_hub import get_token

    token: Any = get_token()
    return str(token) if token else None
