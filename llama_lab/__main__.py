"""`python -m llama_lab` and the console script `llama-lab`: a verb, or Hydra."""

from __future__ import annotations

import io
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    """Do what the command line says.

    Returns:
        0 done, 2 the user can mend it, 1 a fault, 130 interrupted; 141 of a verb whose output nobody reads to its end.
    """
    from llama_lab.unread import flush, watch_output

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it does not have
    watch_output()
    try:
        return _do(sys.argv[1:])
    finally:
        flush()


def _do(words: list[str]) -> int:
    from llama_lab import ranks
    from llama_lab.app import launch
    from llama_lab.cli import run_verb
    from llama_lab.error_report import report_error
    from llama_lab.process import signals_raise, told_to_end
    from llama_lab.unread import go_on_unread

    is_verb = bool(words) and "=" not in words[0] and words[0][:1] not in ("-", "+", "~")
    if not is_verb:
        go_on_unread()
    try:
        ranks.check_variables()
        if not ranks.is_first():
            return 0 if is_verb else ranks.follow()
        if is_verb:
            with signals_raise(signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                return run_verb(words)
        code = launch(words)
        ranks.tell(None)
        return code
    except KeyboardInterrupt as stop:
        return _interrupted(str(stop))
    except Exception as error:
        ended = told_to_end()  # what a signal raises inside of a library may come out of it as another error
        if ended is None:
            return report_error(error)
        return _interrupted("") if ended == INTERRUPTED else ended


def _interrupted(how_to_go_on: str) -> int:
    print(f"\nllama_lab: interrupted. {how_to_go_on}".rstrip(), file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
