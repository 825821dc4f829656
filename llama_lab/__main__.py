"""`python -m llama_lab` and the console script `llama-lab`: a verb, or Hydra."""

from __future__ import annotations

import io
import signal
import sys


def main() -> int:
    """Do what the command line says; the exit code: 0 done, 2 the user can mend it, 1 a fault, 130 interrupted."""
    from llama_lab import ranks
    from llama_lab.app import launch
    from llama_lab.cli import run_verb
    from llama_lab.error_report import report_error
    from llama_lab.process import signals_raise

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it does not have
    words = sys.argv[1:]
    is_verb = bool(words) and "=" not in words[0] and words[0][:1] not in ("-", "+", "~")
    try:
        if not ranks.is_first():
            return 0 if is_verb else ranks.follow()
        if is_verb:
            with signals_raise(signal.SIGTERM, signal.SIGHUP):
                return run_verb(words)
        code = launch(words)
        ranks.tell(None)
        return code
    except KeyboardInterrupt as stop:
        again = "The same command begins anew." if is_verb else "Go on with: python -m llama_lab resume=RUN"
        print(f"\nllama_lab: interrupted. {str(stop) or again}", file=sys.stderr)
        return 130
    except Exception as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
