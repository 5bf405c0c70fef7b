"""The process in which math-verify runs: a line of JSON [answer, gold] in, a line true or false out.

SIGALRM keeps its default action, which ends the process even inside a long computation of C code.
Usage: python -m appo_jax.reward.math_worker SECONDS
"""

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 2 << 30


def main() -> None:
    import math_verify

    logging.disable()  # it warns that its own time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    seconds = float(sys.argv[1])

    def parse(text: str) -> list:
        return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    parse("1")  # builds its regular expressions
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            equal = bool(math_verify.verify(parse(gold), parse(answer), timeout_seconds=None))
        except Exception:  # whatever it cannot read is not equal
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
