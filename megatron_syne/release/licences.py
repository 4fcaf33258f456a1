"""What a licence asks of a release: its text, an attribution, a line to show, how the name begins. Data and rules.

Sections are those of the licences themselves, in the files LICENSE of meta-llama's repositories (Llama 3 of
18 April 2024, 3.1 of 23 July 2024, 3.2 of 25 September 2024, 3.3 of 6 December 2024, 2 of 18 July 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

LICENCE_FILES = ("LICENSE", "LICENSE.txt")
NOTICE = "NOTICE"


@dataclass(frozen=True)
class Terms:
    """A licence whose terms a release can break."""

    title: str
    notice: str
    """Attribution that must stand in a "Notice" text file (section 1.b.iii)."""
    banner: str | None = None
    """To be displayed prominently (section 1.b.i)."""
    name_begins: str | None = None
    """How the name of a model made with it must begin (section 1.b.i)."""


def _llama(version: str, family: str, banner: str, begins: str) -> Terms:
    """Meta's licences from 3 on have the same wording; what they call the model differs."""
    title = f"{family} {version} Community License"
    rights = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Terms(title, f"{family} {version} is licensed under the {title}, {rights}", banner, begins)


TERMS = {
    "llama2": Terms(
        "LLAMA 2 Community License",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
    ),
    "llama3": _llama("3", "Meta Llama", "Built with Meta Llama 3", "Llama 3"),
    "llama3.1": _llama("3.1", "Llama", "Built with Llama", "Llama"),
    "llama3.2": _llama("3.2", "Llama", "Built with Llama", "Llama"),
    "llama3.3": _llama("3.3", "Llama", "Built with Llama", "Llama"),
}
"""By the identifier that the hub has for them in ``license:``."""


def licence_of_text(text: str) -> str | None:
    """The identifier of a licence's text, where it is one of :data:`TERMS`."""
    match = re.search(r"\bllama (2|3(?:\.\d)?) community license", text[:2000], re.IGNORECASE)
    return f"llama{match[1]}" if match else None


def licence_of_base(base_model: str) -> str | None:
    """The identifier of the licence of a model of meta-llama's, by its hub id."""
    match = re.fullmatch(r"meta-llama/(?:Meta-)?Llama-(2|3(?:\.\d)?)-.+", base_model)
    return f"llama{match[1]}" if match else None


def choose(
    licence: str | None, base_model: str | None, documents: Mapping[str, bytes]
) -> tuple[str | None, list[str]]:
    """The licence's identifier, and what contradicts it: given, by the text that travels, by the base model."""
    problems = []
    said = {} if licence is None else {"given": licence}
    for name in LICENCE_FILES:
        if found := licence_of_text(documents.get(name, b"").decode("utf-8", "replace")):
            said[f"the text in {name}"] = found
    if base_model is not None and (found := licence_of_base(base_model)):
        said[f"of {base_model}"] = found
    if len(set(said.values())) > 1:
        told = ", ".join(f"{found} ({where})" for where, found in said.items())
        problems.append(f"licence: {told}: these contradict each other")
    if licence is None and not said:
        problems.append(
            "licence: not given, and the folder has no text that tells it; give it (llama3, apache-2.0, ...)"
        )
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        problems.append(
            f"licence: {licence!r} is no identifier of the hub; for example llama3, apache-2.0, mit, other"
        )
    return licence or next(iter(said.values()), None), problems


def broken_terms(licence: str | None, name: str, documents: Mapping[str, bytes]) -> list[str]:
    """What a release of this name with these files would break."""
    terms = TERMS.get(licence or "")
    if terms is None:
        return []
    problems = []
    if not any(file in documents for file in LICENCE_FILES):
        problems.append(
            f"licence: the {terms.title} must travel with the weights (section 1.b.i), but there is no "
            f"{' or '.join(LICENCE_FILES)}; give the file of its text"
        )
    begins = terms.name_begins
    # a hub name has no spaces: "Llama-3-..." is how the "Llama 3" that is asked for is written there
    if begins and not re.match(begins.replace(" ", "[ _-]?"), name, re.IGNORECASE):
        problems.append(
            f"name: {name!r}: the {terms.title} asks for a name that begins with “{begins}” "
            f"(section 1.b.i), for example {begins.replace(' ', '-')}-{name}"
        )
    return problems


def with_notice(licence: str | None, documents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The documents with the attribution in NOTICE, added to what stands there."""
    terms = TERMS.get(licence or "")
    found = documents.get(NOTICE, b"")
    if terms is None or terms.notice.encode() in found:
        return dict(documents)
    return {**documents, NOTICE: found + (b"\n" if found else b"") + terms.notice.encode() + b"\n"}
