"""The exit-code contract: what a scheduler and a person get to see for each kind of error."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_syne import errors
from megatron_syne.errors import SyneError, run_cli

# The documented contract, written a second time on purpose: a changed number breaks people's schedulers.
CONTRACT = {
    "ConfigError": 64,
    "DataError": 65,
    "MissingInput": 66,
    "SyneError": 70,
    "CannotCreate": 73,
    "IOFault": 74,
    "StoppedCleanly": 75,
    "SecurityRefusal": 77,
}
RANK_VARIABLES = ("RANK", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As started by hand, whatever started the tests."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def raising(error: BaseException) -> Callable[[], int]:
    """A ``main`` that raises."""

    def main() -> int:
        raise error

    return main


def test_every_error_class_is_in_the_contract() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, SyneError)
    }
    assert found.pop("PeerFailed") == found["SyneError"] == 70  # the peer's own error has its own code
    assert found == CONTRACT
    assert len(set(CONTRACT.values())) == len(CONTRACT)
    assert not {16, 17} & set(CONTRACT.values())  # taken by the engine's rerun machine


@pytest.mark.parametrize("name", CONTRACT)
def test_one_line_and_the_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = getattr(errors, name)("model.num_layers: expected a number, found 'two'; give a number")
    assert run_cli(raising(error)) == CONTRACT[name]
    out, err = capsys.readouterr()
    word = "stopped" if name == "StoppedCleanly" else "error"
    assert out == ""
    assert err == f"{word}: model.num_layers: expected a number, found 'two'; give a number\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_normal_return(returned: int | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_found_behind_what_others_made_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        except OSError as error:
            raise RuntimeError("a writer failed") from error

    assert run_cli(main) == 74
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'shard'\n"


@pytest.mark.parametrize("variable", RANK_VARIABLES)
def test_only_rank_0_speaks(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "3")
    assert run_cli(raising(errors.ConfigError("said once"))) == 64
    assert capsys.readouterr().err == ""
    of_this_rank = errors.DataError("only here")
    of_this_rank.this_rank_only = True  # type: ignore[attr-defined]
    assert run_cli(raising(of_this_rank)) == 65
    assert capsys.readouterr().err == "error on rank 3: only here\n"
    monkeypatch.setenv(variable, "0")
    assert run_cli(raising(errors.ConfigError("said once"))) == 64
    assert capsys.readouterr().err == "error: said once\n"


def test_a_full_disk_is_74_wherever_it_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """A real ENOSPC, from the device that is always full."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")

    def main() -> None:
        with full.open("w") as stream:
            stream.write("x")

    assert run_cli(main) == 74
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "No space left" in err and "Traceback" not in err


def test_the_unforeseen_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (RuntimeError("a bug"), FileNotFoundError("an unguarded open")):
        assert run_cli(raising(error)) == 70
        err = capsys.readouterr().err
        assert "Traceback" in err and type(error).__name__ in err and str(error) in err


def test_ctrl_c_is_130() -> None:
    assert run_cli(raising(KeyboardInterrupt())) == 130


def test_the_code_reaches_the_shell(repository: Path) -> None:
    """The whole way: a process that wraps its main as the tools do."""
    code = (
        "import sys\n"
        "from megatron_syne.errors import MissingInput, run_cli\n"
        "def main(): raise MissingInput('corpus.jsonl: no such file')\n"
        "sys.exit(run_cli(main))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (66, "", "error: corpus.jsonl: no such file\n")
