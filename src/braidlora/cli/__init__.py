"""The `braidlora` command: one file per verb, each a thin wrapper. Heavy imports are deferred to keep `--help` fast."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from braidlora import __version__
from braidlora.cli import (
    _add_client,
    _advise,
    _analyze,
    _compare,
    _data,
    _demo,
    _evaluate,
    _export,
    _federate,
    _generate,
    _init,
    _plan,
    _predict,
    _preview,
    _recipes,
    _serve,
    _site,
    _train,
    _verify,
)
from braidlora.cli._words import check_options, parse_overrides, unknown_verb, verb_parsers
from braidlora.errors import BraidloraError, ConfigError, TrainingError, is_out_of_memory
from braidlora.noise import plain_warnings, quiet_libraries
from braidlora.processes import launched
from braidlora.terminal import say

__all__ = ["build_parser", "main", "parse_overrides", "parse_words"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM)
_LAUNCHED = (
    "train",
    "federate",
)  # torchrun and `accelerate launch` may start several processes of these verbs
EPILOG = """\
A recipe is a YAML file (`braidlora init data.csv` writes one) or a name from `braidlora recipes`. Override any key of a
recipe on the command line by its dotted name, with quotes around * and [ for the shell:
--training.learning_rate=1e-4, --tasks.snli.train.limit=50, '--tasks.*.train.limit=50'.
Exit codes: 0 success, 2 recipe or usage, 3 data, 4 training, 5 checkpoint, 6 federation, 130 stopped by Ctrl-C,
143 stopped by SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="braidlora",
        description="Fine-tune one language model with several LoRAs that share a matrix.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"braidlora {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    for module in (
        _demo, _init, _train, _evaluate, _predict, _generate, _federate, _add_client, _site, _advise, _compare,
        _analyze, _export, _serve, _plan, _preview, _recipes, _data, _verify,
    ):  # fmt: skip
        module.add(verbs)
    return parser


def parse_words(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line into known arguments and the remaining words, which should be overrides."""
    parser, words = build_parser(), list(words)
    if words[:2] == ["federate", "add-client"]:  # a two-word verb
        words[:2] = [" ".join(words[:2])]
    return parser.parse_known_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. Errors and warnings for users go to stderr, one message each."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    verbs = verb_parsers(parser)
    if not words:
        parser.print_help(sys.stderr)
        return ConfigError.exit_code
    if problem := unknown_verb(words, [name for name in verbs if " " not in name]):
        say(f"braidlora: {problem}", file=sys.stderr)
        return ConfigError.exit_code
    for stream in (sys.stdout, sys.stderr):  # escape characters that the terminal cannot encode
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args, unknown = parse_words(words)
    args.command = shlex.join(["braidlora", *words])
    quiet_libraries()
    formatwarning = warnings.formatwarning

    def failed(why: object, code: int) -> int:
        say(f"braidlora {args.verb}: {why}", file=sys.stderr)
        return code

    plain_warnings(f"braidlora {args.verb}")
    try:
        overrides = parse_overrides(unknown)
        check_options(verbs[args.verb], overrides, takes_overrides=args.takes_overrides)
        _check_launch(args.verb)
        args.run(args, overrides)
    except BraidloraError as error:
        return failed(error, error.exit_code)
    except BrokenPipeError:
        # The reader (`head`, for example) closed the pipe. Redirect stdout so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return failed(
                f"{error.filename}: file name too long; choose a shorter one.", ConfigError.exit_code
            )
        message = _exhausted(error)
        if message is None:
            raise
        return failed(message, TrainingError.exit_code)
    except KeyboardInterrupt:
        return failed("stopped.", 130)
    finally:
        warnings.formatwarning = formatwarning
    return 0


def _check_launch(verb: str) -> None:
    """Reject commands that several processes would do several times, into the same folder.

    Raises:
        ConfigError: torchrun or `accelerate launch` started several.
    """
    _, processes = launched()
    if processes > 1 and verb not in _LAUNCHED:
        raise ConfigError(
            f"{processes} processes were launched, but only `train` and `federate` use more than one. Start {verb} "
            "without torchrun and accelerate launch."
        )


def _exhausted(error: Exception) -> str | None:
    """Message for an out-of-memory or disk error that nothing else handled; None for a bug."""
    first = str(error).strip().split("\n")[0] or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory: {first} Files saved before this are intact. Free memory, or use a smaller base, fewer "
            "rows (`limit`), or a smaller batch_size or cutoff."
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        forbidden = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "Fix the permissions" if forbidden else "Free space on that disk or make it writable,"
        return f"{where}{error.strerror}. Files saved before this are intact. {remedy} and run the command again."
    return None
