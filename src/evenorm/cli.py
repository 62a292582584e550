"""The console script: runs a command, and turns what a user can mend into one line on stderr and status 2."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

MISSING = 'evenorm: the command line needs more packages than the layers do: pip install "evenorm[lab]"'
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 findings, 2 could not run, 130 by Ctrl-C, 143 by SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # of every command, wherever it stands
    with _terminated_as_interrupted() as terminated:
        status = _run([argument for argument in given if argument != "--debug"], debug)
    sys.exit(TERMINATED if terminated and status == INTERRUPTED else status)


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Make SIGTERM what Ctrl-C is, which shows the cursor and removes half a file; yield a list of those that came.

    A handler of the caller's own stays, and so does a SIGTERM that is ignored.
    """
    came: list[int] = []
    here = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:  # forked by a loader of the user's: it ends as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.append(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str], debug: bool) -> int:
    if sys.stdout is None:  # Python's way of saying that it was closed before it began
        print("evenorm: standard output is closed, and results go there; leave it open", file=sys.stderr)
        return 2
    try:
        from evenorm.commands import app

        # Not standalone: typer then reports what went wrong by raising it, and interruptions are ours.
        status = app(arguments, prog_name="evenorm", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:  # typer makes it of Ctrl-C, and says nothing
            print("\nevenorm: interrupted", file=sys.stderr)
        return int(status or 0)
    except KeyboardInterrupt:
        print("\nevenorm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as left:  # typer raises none: a module, a loader or a network of the user's did
        if debug or left.code == 1:  # or rich, which leaves with 1 where the reader of its pipe has gone
            raise
        print(f"evenorm: code that was called for left with exit({left.code})", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing is left to flush into
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as typer has it where it meets the closed pipe itself
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("evenorm"):
            raise
        print(MISSING, f"(there is no {error.name} here)", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """Say in a line what the user can mend and return 2; anything else is our own fault and raised again."""
    usage = getattr(error, "format_message", None)  # a usage error of typer's own
    if usage is not None:
        if usage():  # empty where no command was given: the help has been printed
            print(f"evenorm: {usage()}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        print(f"evenorm: {named}{error.strerror}", file=sys.stderr)
        return 2
    if isinstance(error, (ValueError, TypeError, OSError)):
        print(f"evenorm: {error}", file=sys.stderr)
        return 2
    raise error
