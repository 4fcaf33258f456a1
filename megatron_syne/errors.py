"""The errors a user can meet, each with its documented exit code (sysexits numbers).

A command-line entry point wraps its ``main`` in :func:`run_cli`: a :class:`SyneError` becomes one line on
stderr and its exit code, anything else is an internal error (70) with its traceback.
16 and 17 are left alone: Megatron-LM's rerun machine uses them.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

EXIT_OK = 0
EXIT_CONFIG = 64
EXIT_DATA = 65
EXIT_NO_INPUT = 66
EXIT_INTERNAL = 70
EXIT_CANNOT_CREATE = 73
EXIT_IO = 74
EXIT_REQUEUE = 75
EXIT_SECURITY = 77


class SyneError(Exception):
    """Base of all errors meant for the user: says what, where, expected against found, and the remedy."""

    exit_code = EXIT_INTERNAL


class ConfigError(SyneError):
    """A configuration, layout or option that cannot run (exit 64)."""

    exit_code = EXIT_CONFIG


class DataError(SyneError):
    """A corrupt, truncated or inconsistent input file (exit 65)."""

    exit_code = EXIT_DATA


class MissingInput(SyneError):
    """An input that does not exist (exit 66)."""

    exit_code = EXIT_NO_INPUT


class CannotCreate(SyneError):
    """An output that exists already, is held by another run, or cannot be made (exit 73)."""

    exit_code = EXIT_CANNOT_CREATE


class IOFault(SyneError):
    """The disk said no: full, over quota, I/O error (exit 74)."""

    exit_code = EXIT_IO


class StoppedCleanly(SyneError):
    """Asked to stop; everything is saved; start the same command again to go on (exit 75)."""

    exit_code = EXIT_REQUEUE


class PeerFailed(SyneError):
    """Another rank failed first, and has said why (exit 70)."""

    exit_code = EXIT_INTERNAL


class SecurityRefusal(SyneError):
    """An input that tries to leave its folder or to run code (exit 77)."""

    exit_code = EXIT_SECURITY


def run_cli(main: Callable[[], int | None]) -> int:
    """Run ``main``; print a :class:`SyneError` as one line and return its exit code.

    An OSError for a full disk or an I/O fault is reported as 74, as it means the same to a scheduler
    wherever it is raised. Everything unforeseen keeps its traceback and returns 70.
    """
    try:
        return main() or EXIT_OK
    except SyneError as error:
        # With several ranks the same line once per rank is soup: rank 0 speaks, or the one that failed first.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if getattr(error, "this_rank_only", rank == "0"):
            word = "stopped" if isinstance(error, StoppedCleanly) else "error"
            who = f" on rank {rank}" if rank != "0" else ""
            print(f"{word}{who}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except SystemExit:
        raise
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # torch's CheckpointException is no Exception
        fault = disk_fault(error)
        if fault is None:
            traceback.print_exc()
            return EXIT_INTERNAL
        print(f"error: {fault}", file=sys.stderr, flush=True)
        return EXIT_IO


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""What a disk answers that is full, over quota or failing, and a limit on the size of files."""


def disk_fault(error: BaseException) -> OSError | None:
    """The disk's refusal (full, over quota, I/O error) that an error is or was caused by, or None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRNOS:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def exit_code_of(error: BaseException) -> int:
    """The exit code that :func:`run_cli` gives for an error."""
    if isinstance(error, SyneError):
        return error.exit_code
    return EXIT_INTERNAL if disk_fault(error) is None else EXIT_IO
