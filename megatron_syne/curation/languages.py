"""The language of a text by its script: Chinese or not, which is what the mixture of Llama-3-SynE needs."""

from __future__ import annotations

import re

ENGLISH, CHINESE, UNKNOWN = "en", "zh", "unknown"
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")
_OTHER = re.compile("[\u0370-\u1fff\u3040-\u30ff\uac00-\ud7af]+")  # Greek to Georgian, kana, Hangul
_LOOKED_AT = 2000


def language_of(text: str) -> str:
    """``zh``, ``en`` or ``unknown``, from the first 2,000 characters.

    A Han character is worth about three Latin letters of a word, so Chinese pages full of English terms and
    addresses stay Chinese. Japanese, Korean, Russian and what has no letters are ``unknown``; other languages in
    Latin script are taken for English: name them in a field and pass ``--language-key``.
    """
    start = text[:_LOOKED_AT]
    han = 3 * sum(map(len, _HAN.findall(start)))
    latin = sum(map(len, _LATIN.findall(start)))
    other = 3 * sum(map(len, _OTHER.findall(start)))
    if other > (han + latin) / 10 and not latin > 2 * other:
        return UNKNOWN
    if han + latin == 0:
        return UNKNOWN
    return CHINESE if han >= latin else ENGLISH
