"""The demo's shipped texts and tokenizer: what their documentation promises, checked on the files themselves."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"
SOURCES = ["en_web", "en_code", "en_math", "zh_web", "zh_book", "synth_qa"]
GENERATED = ["en_math", "zh_web", "zh_book", "synth_qa"]
PARTS = ["train", "valid"]

sys.path.insert(0, str(DEMO))

from phrasebook import PhrasebookError, Template, Writer, calculate, read_tables, show  # noqa: E402


def documents(source: str, part: str) -> list[str]:
    """Texts of one shipped file."""
    with (DEMO / "texts" / f"{source}.{part}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_line_is_a_text_of_its_source(source: str, part: str) -> None:
    raw = (DEMO / "texts" / f"{source}.{part}.jsonl").read_bytes()
    assert b"\\u" not in raw.replace(rb"\\u", b""), "non-ASCII characters are written as they are"
    lines = raw.decode("utf-8").splitlines()
    assert len(lines) >= 20
    for line in lines:
        row = json.loads(line)
        assert sorted(row) == ["source", "text"] and row["source"] == source
        assert len(row["text"].encode()) >= 60 and row["text"] == row["text"].strip("\n")


def test_sizes_stay_under_their_limits() -> None:
    sizes = {path.name: path.stat().st_size for path in (DEMO / "texts").glob("*.jsonl")}
    assert len(sizes) == 12
    assert max(sizes.values()) < 4_000_000 and sum(sizes.values()) < 7_000_000
    for name, size in sizes.items():
        if ".valid." in name:
            assert 40_000 <= size <= 60_000, name


@pytest.mark.parametrize("source", SOURCES)
def test_no_document_twice_and_none_in_both_parts(source: str) -> None:
    train, valid = documents(source, "train"), documents(source, "valid")
    assert len(set(train)) == len(train) and len(set(valid)) == len(valid)
    assert not set(train) & set(valid)


def pieces(source: str, part: str) -> list[str]:
    """The single questions, problems or passages that documents are put together from."""
    opening = {"en_math": "Problem: ", "synth_qa": r"Question: |问：", "zh_web": r".{20}"}[source]
    found = []
    for text in documents(source, part):
        found += [piece for piece in re.split(rf"\n\n(?={opening})", text) if re.match(opening, piece)]
    return found


@pytest.mark.parametrize("source", ["en_math", "zh_web", "synth_qa"])
def test_no_single_piece_of_a_document_is_in_both_parts(source: str) -> None:
    train, valid = pieces(source, "train"), pieces(source, "valid")
    assert len(valid) > 100
    assert not set(train) & set(valid)
    assert len(set(train)) == len(train)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("source", ["en_math", "zh_web", "zh_book"])
def test_no_slot_or_mark_of_a_template_is_left(source: str, part: str) -> None:
    for text in documents(source, part):
        found = re.search(r"[{}|@$~#]|。。|，，|，。|\.\.|  ", text)
        assert not found, f"{found} in {text}"


@pytest.mark.parametrize("source", ["zh_web", "zh_book"])
def test_chinese_texts_are_chinese(source: str) -> None:
    text = "".join(documents(source, "train"))
    chinese = sum("一" <= char <= "鿿" or char in "，。：“”！？、；《》\n" for char in text)
    assert chinese > 0.97 * len(text)


def test_synthetic_questions_have_nine_disciplines_and_two_languages() -> None:
    texts = documents("synth_qa", "train")
    english = [text for text in texts if text.startswith("Subject: ")]
    chinese = [text for text in texts if text.startswith("学科：")]
    assert len(english) + len(chinese) == len(texts)
    assert len({text.split("\n")[0] for text in english}) == 9
    assert len({text.split("\n")[0] for text in chinese}) == 9
    share = sum(len(text.encode()) for text in chinese) / sum(len(text.encode()) for text in texts)
    assert 0.25 < share < 0.4


_VALUE = r"\(?-?\d[\d./^]*\)?"
_EQUATION = re.compile(
    rf"(?<![\w^.)(/*])(?<![-+x×÷/*] )({_VALUE}(?: [-+x×÷/*] {_VALUE})+) = (-?\d[\d./]*+)(?! [-+x×÷/*])"
)


@pytest.mark.parametrize("source", ["en_math", "synth_qa"])
def test_every_worked_calculation_is_right(source: str) -> None:
    checked = 0
    for text in documents(source, "train") + documents(source, "valid"):
        for left, right in _EQUATION.findall(text):
            if left.count("(") > left.count(")"):
                left = left.replace("(", "", 1)  # a calculation inside brackets
            left = left.replace("x", "*").replace("×", "*").replace("÷", "/").replace("^", "**")
            right = right.rstrip("./")
            value, written = Fraction(calculate(left, {})), Fraction(right)
            rounding = Fraction(1, 2 * 10 ** len(right.partition(".")[2])) if "." in right else 0
            assert abs(value - written) <= rounding, f"{left} = {right} in {text}"
            checked += 1
    assert checked > 1500


@pytest.mark.parametrize("source", GENERATED)
def test_generated_files_are_made_again_byte_for_byte(source: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_texts.py", source, "--out", tmp_path], check=True)
    for part in PARTS:
        name = f"{source}.{part}.jsonl"
        assert digest(tmp_path / name) == digest(DEMO / "texts" / name), name


def digest(path: Path) -> str:
    """SHA-256 of a file; keeps a failing comparison short."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the library texts are those of Python 3.11.7")
def test_library_files_hold_what_this_python_has(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_texts.py", "en_code", "--out", tmp_path], check=True)
    name = "en_code.train.jsonl"
    assert digest(tmp_path / name) == digest(DEMO / "texts" / name)


def test_library_texts_name_no_other_owner_and_the_licence_is_there() -> None:
    for source in ("en_web", "en_code"):
        for text in documents(source, "train") + documents(source, "valid"):
            for notice in re.findall(r"(?im)^.*copyright\b.*(?:\(c\)|\d{4}).*$", text):
                assert "Python Software Foundation" in notice or "Licensed to PSF" in text, notice
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DEMO / "texts" / "PYTHON-LICENSE.txt").read_text()


def test_unknown_source_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DEMO / "make_texts.py", "zh_news", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "zh_news" in done.stderr and "zh_book" in done.stderr
    assert not list(tmp_path.iterdir())


# The phrasebook


def test_calculate_is_exact_and_knows_only_arithmetic() -> None:
    assert calculate("a * b // 2 + gcd(a, b)", {"a": 12, "b": 18}) == 114
    assert show(calculate("a / 8", {"a": 1})) == "0.125"
    assert show(calculate("100 * a / 3", {"a": 1}), 2) == "33.33"
    assert show(Fraction(-5, 2)) == "-2.5"
    for bad in ("__import__('os')", "open('x')", "a.__class__", "[1][0]", "1 if 2 else 3", "missing + 1"):
        with pytest.raises(PhrasebookError):
            calculate(bad, {"a": {"word": "1"}})
    with pytest.raises(PhrasebookError, match="exact decimal"):
        show(Fraction(1, 3))


def test_slots_keep_their_value_and_numbered_slots_differ(tmp_path: Path) -> None:
    path = tmp_path / "tables.txt"
    path.write_text("# city: name | dish\nA | a\nB | b\n# day\nmon | tue\n", encoding="utf-8")
    tables = read_tables(path)
    template = Template(
        "t", (), [("n", "2..9"), ("m", "n * 2")], ["{city}={city.dish} {city2} {day}{day} {n} {=m//2}"]
    )
    for seed in range(20):
        first, second, days, n, half = Writer(tables, random.Random(seed), "").write(template).split()
        name, dish = first.split("=")
        assert dish == name.lower() and second != name and days in ("monmon", "tuetue") and n == half


def test_faulty_tables_and_templates_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tables.txt"
    path.write_text("# city: name | dish\nA | a\nB\n", encoding="utf-8")
    with pytest.raises(PhrasebookError, match=r"tables\.txt:3"):
        read_tables(path)
    writer = Writer({"day": [{"word": "mon"}]}, random.Random(0), "")
    with pytest.raises(PhrasebookError, match=r"template t: slot \{town\}"):
        writer.write(Template("t", (), [], ["{town}"]))
    with pytest.raises(PhrasebookError, match="never held"):
        writer.write(Template("t", (), [("n", "1..3"), ("?", "n > 5")], ["{n}"]))


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    """The shipped tokenizer as transformers opens it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "base_model")


def test_tokenizer_has_llama3s_shape(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from transformers import GenerationConfig

    assert len(tokenizer) == 2560 and sorted(tokenizer.get_vocab().values()) == list(range(2560))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin_of_text|>", 2558)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end_of_text|>", 2559)
    assert tokenizer.model_max_length == 256
    assert tokenizer("Hello").input_ids[0] == 2558
    assert tokenizer.decode(tokenizer("Hello, 世界").input_ids, skip_special_tokens=True) == "Hello, 世界"
    generation = GenerationConfig.from_pretrained(DEMO / "base_model")
    assert (generation.bos_token_id, generation.eos_token_id) == (2558, 2559)


@pytest.mark.parametrize("source", SOURCES)
def test_held_out_texts_survive_the_round_trip(tokenizer, source: str) -> None:  # type: ignore[no-untyped-def]
    for text in [*documents(source, "valid"), " x\t\r\n\n  é 🜚 \x00 1234567 don't"]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        assert tokenizer.decode(ids) == text


def test_english_and_chinese_are_short_in_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    def tokens_per_character(source: str) -> float:
        texts = documents(source, "valid")
        tokens = sum(
            len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in texts
        )
        return tokens / sum(map(len, texts))

    assert tokens_per_character("en_web") < 1 / 2.8
    assert tokens_per_character("zh_web") < 1.5 and tokens_per_character("zh_book") < 1.5


def test_tokenizer_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_tokenizer.py", "--out", tmp_path], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert digest(tmp_path / name) == digest(DEMO / "base_model" / name), name
