"""Pickles are read as data and written by hand: nothing runs, nothing hangs, and torch's own objects fit."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.convert.formats.dcp_pickle import Call, Global, Items, Object, Persistent, write_pickle
from megatron_syne.convert.formats.pickles import (
    LEGACY_NAMES,
    METADATA_NAMES,
    TENSOR_NAMES,
    Inert,
    Storage,
    Tensor,
    read_pickle,
)
from megatron_syne.errors import DataError, SecurityRefusal, SyneError


class Evil:
    """Unpickled in earnest it makes a file."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def test_what_runs_code_is_refused_by_name(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = {
        "system": Evil(os.system, f"touch {canary}"),
        "eval": Evil(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(canary)!r}, 'w')"),
        "getattr": Evil(getattr, {}, "clear"),
        "open": Evil(open, str(canary), "w"),
    }
    for name, value in evil.items():
        for protocol in (2, 4):
            with pytest.raises(SecurityRefusal, match=rf"file\.pt: holds \w+\.{name}, which"):
                read_pickle(pickle.dumps([1, value], protocol), LEGACY_NAMES, "file.pt")
    assert not canary.exists()
    pickle.loads(pickle.dumps(evil["open"]))
    assert canary.exists()  # the bait is alive


def test_names_are_matched_whole() -> None:
    for module, name in [
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("argparse", "Namespace.__init__"),
    ]:
        content = (
            pickle.PROTO + b"\4" + b"".join(_short(x) for x in (module, name)) + pickle.STACK_GLOBAL + b"."
        )
        for allowed in (METADATA_NAMES, TENSOR_NAMES, LEGACY_NAMES):
            with pytest.raises(SecurityRefusal, match=name.replace(".", r"\.")):
                read_pickle(content, allowed, "x")


def _short(text: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


HOSTILE = {
    "string longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "extension": b"\x80\x02\x82\x01.",
    "text persistent id": b"\x80\x02Pstorage\n.",
    "proto 0": b"(lp0\nI1\na.",
    "byte array": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "empty": b"",
    "stack underflow": b"\x80\x02R.",
    "build on a class": b"\x80\x02ctorch\nSize\n}b.",
    "attributes of a function of ours": b"\x80\x02ctorch\nSize\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.",
    "attributes of a class": b"\x80\x02cargparse\nNamespace\n}(X\x01\x00\x00\x00aK\x01ub.",
    "a key that hashes for ever": b"\x80\x02}N" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "unhashable key": b"\x80\x02}]Ns.",
    "items of a list": b"\x80\x02]K\x00Ns.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_damaged_and_hostile_bytes_are_one_error(content: bytes) -> None:
    with pytest.raises(DataError, match="file"):
        read_pickle(content, LEGACY_NAMES, "file")


def test_a_large_memo_index_costs_nothing() -> None:
    """Python's unpickler in C takes an array of 32 GiB for it."""
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\xff.", LEGACY_NAMES, "file") is None


def test_every_cut_and_many_changes_end_in_an_error_of_ours() -> None:
    value = Call(Global("torch._utils", "_rebuild_tensor_v2"), (_STORAGE, 0, (2, 3), (3, 1), False, None))
    whole = write_pickle({"a": [1, 2.5, None, True], "b": ("x",) * 3, "c": value})
    assert read_pickle(whole, TENSOR_NAMES, "x")["c"].shape == (2, 3)
    for length in range(len(whole)):
        with pytest.raises(SyneError):  # a name that is cut short is another name
            read_pickle(whole[:length], TENSOR_NAMES, "x")
    dice = random.Random(0)
    for _ in range(3000):
        changed = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(len(whole))] = dice.randrange(256)
        with contextlib.suppress(SyneError):
            read_pickle(bytes(changed), TENSOR_NAMES, "x")


_STORAGE = Persistent(("storage", Global("torch", "BFloat16Storage"), "0", "cpu", 6))


@pytest.mark.parametrize(
    "args",
    [
        (_STORAGE, -1, (2, 3), (3, 1)),
        (_STORAGE, 0, (2, 3), (3,)),
        (_STORAGE, 0, (2, "3"), (3, 1)),
        (_STORAGE, 0, (2, True), (3, 1)),
        ("not a storage", 0, (2, 3), (3, 1)),
        (Persistent(("storage", Global("torch", "BFloat16Storage"), "../0", "cpu", 6)), 0, (2, 3), (3, 1)),
        (Persistent(("storage", Global("torch", "BFloat16Storage"), "0", "cpu", -6)), 0, (2, 3), (3, 1)),
        (Persistent(("module", Global("torch", "BFloat16Storage"), "0", "cpu", 6)), 0, (2, 3), (3, 1)),
    ],
)
def test_impossible_tensors(args: tuple[Any, ...]) -> None:
    content = write_pickle(Call(Global("torch._utils", "_rebuild_tensor_v2"), (*args, False, None)))
    with pytest.raises(DataError):
        read_pickle(content, TENSOR_NAMES, "x")


def test_a_checked_tensor_cannot_be_changed_afterwards() -> None:
    made = write_pickle(Call(Global("torch._utils", "_rebuild_tensor_v2"), (_STORAGE, 0, (2, 3), (3, 1))))
    assert read_pickle(made, TENSOR_NAMES, "x").offset == 0
    with pytest.raises(DataError, match="a state for Tensor"):
        read_pickle(made[:-1] + write_pickle({"offset": -7})[2:-1] + b"b.", TENSOR_NAMES, "x")


def test_tensors_are_described_not_made() -> None:
    content = write_pickle(
        Call(Global("torch._utils", "_rebuild_tensor_v2"), (_STORAGE, 2, (2,), (1,), False, None))
    )
    assert read_pickle(content, TENSOR_NAMES, "x") == Tensor(
        Storage("0", "torch.BFloat16Storage", 6), 2, (2,), (1,)
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_plain_values_come_back_and_python_agrees(value: Any) -> None:
    content = write_pickle(value)
    assert pickle.loads(content) == value
    assert read_pickle(content, TENSOR_NAMES, "x") == value
    for protocol in (2, 3, 4):
        assert read_pickle(pickle.dumps(value, protocol), TENSOR_NAMES, "x") == value


def test_objects_are_those_that_python_makes() -> None:
    made = Call(Global("collections", "OrderedDict"))
    state = Object(Global("argparse", "Namespace"), {"a": 1, "b": made})
    found = pickle.loads(write_pickle(Items([(Call(Global("fractions", "Fraction"), (1, 2)), state)])))
    ((key, namespace),) = found.items()
    assert (key, namespace.a, namespace.b) == (0.5, 1, collections.OrderedDict())
    inert = read_pickle(write_pickle(state), LEGACY_NAMES, "x")
    assert isinstance(inert, Inert)
    assert (inert.origin, inert.state) == ("argparse.Namespace", {"a": 1, "b": {}})


def test_what_a_training_run_saves_is_let_through() -> None:
    import argparse

    import numpy as np
    import torch

    state = {
        "args": argparse.Namespace(params_dtype=torch.bfloat16, save=Path("/x"), numbers={1, 2}),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "tensor": torch.nn.Parameter(torch.ones(3)),
        "dict": collections.defaultdict(dict, a=torch.zeros(2, dtype=torch.int64)),
        "module": torch.nn.Linear(2, 2).state_dict(),
        "raw": io.BytesIO(b"abc"),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    stream = io.BytesIO()
    torch.save(state, stream)
    import zipfile

    content = zipfile.ZipFile(stream).read("archive/data.pkl")
    found = read_pickle(content, LEGACY_NAMES, "x")
    assert found.keys() == state.keys()
    assert found["size"] == (1, 2)
    assert set(found["module"]) == {"weight", "bias"}
    assert found["tensor"].shape == (3,)
    assert found["args"].state["params_dtype"].origin == "torch.bfloat16"
