"""A language model as judge, behind any OpenAI-compatible endpoint: concurrent, retried, cached on disk, counted.

A question that the judge did not decide has no verdict. It is listed in the report and never silently left out.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax import heartbeat
from appo_jax.config import JudgeConfig
from appo_jax.errors import DataError
from appo_jax.reward.grade import Grade, final_answer
from appo_jax.reward.response import Response
from appo_jax.tools.arguments import decode
from appo_jax.tools.cache import going_on_without, open_shared
from appo_jax.tools.exchange import Fault, post, split_url
from appo_jax.tools.protocol import writable

PROMPT = """Decide whether an answer to a question is right. Compare it with the reference answer alone; do not solve the question.
Wording may differ, the meaning may not. {number_rule}

Question: {question}
Reference answer: {gold}
Answer: {answer}

Reply with one line: "correct: yes" or "correct: no"."""
EXACT = "A number may differ in form, not in value."  # the rule for numbers, unless a set has its own

# A verdict: "correct: yes", "correct": true; both words are none.
_VERDICT = re.compile(
    r"""\bcorrect["'*_`]*\s*[:：=-]?[\s"'*_`\[]*(yes|no|true|false)\b(?!["'*_`.\]]*\s*(?:[/|]|or\b))""", re.IGNORECASE
)
# A line that begins with a verdict: "correct: yes", "1. Answer: correct: no, it differs".
_ASKED = re.compile(
    rf"\W*(?:\d+[.)]\W*)?(?:(?:final )?(?:answer|verdict|judge?ment)\W+)?{_VERDICT.pattern}", re.IGNORECASE
)
# A line that is a verdict: "Correct.", "Verdict: incorrect", "Judgement: yes".
_WORD = re.compile(
    r"\W*(?:(?:(?:final )?(?:verdict|judge?ment)\W+)?(in)?correct|(?:final )?(?:verdict|judge?ment)\W+(?:yes|(no)))\W*",
    re.IGNORECASE,
)
# `decide` stops asking after so many answers in a row without a verdict: the endpoint is down, or refuses every request.
UNDECIDED_IN_A_ROW = 16


@dataclasses.dataclass(frozen=True)
class Decision:
    """The judge's decision on one answer."""

    correct: bool | None  # None: no verdict
    reason: str  # its words, or what went wrong


@dataclasses.dataclass
class Counts:
    """The cost of judging."""

    requests: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoVerdict(Exception):
    """The judge did not decide: the rollout has no reward."""


class LanguageJudge:
    """Decides answers; safe to use from several threads, and its cache by several processes."""

    def __init__(self, config: JudgeConfig, cache: Path):
        """Raises ConfigError for an invalid URL, DataError for a file that cannot be opened."""
        self.config, self.counts = config, Counts()
        self._url = config.url.rstrip("/") + "/chat/completions"
        split_url("reward.judge.url", config.url)
        self._lock, self._file = threading.Lock(), cache
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            self._cache = open_shared(cache)
            self._cache.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, correct INTEGER, reason TEXT)"
            )
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"reward.judge.cache = {cache}: cannot be opened as an SQLite file ({error}); give another file"
            ) from error

    def decide(self, questions: Sequence[tuple[str, Sequence[str], str]], number_rule: str = EXACT) -> list[Decision]:
        """The decision of each (question, golds, answer), in order. `number_rule`: the judge's rule for answers that are numbers.

        After `UNDECIDED_IN_A_ROW` answers in a row without a verdict, only the verdicts in the cache are used."""
        undecided = 0

        def decision(asked: tuple[str, Sequence[str], str]) -> Decision:
            nonlocal undecided
            if undecided >= UNDECIDED_IN_A_ROW:
                reason = f"not asked: the judge decided none of the last {UNDECIDED_IN_A_ROW} answers"
                return self._kept(self._prompt(*asked, number_rule)) or Decision(None, reason)
            found = self.verdict(*asked, number_rule)
            with self._lock:
                undecided = undecided + 1 if found.correct is None else 0
            return found

        decisions = []
        with concurrent.futures.ThreadPoolExecutor(self.config.concurrency) as pool:
            for found in pool.map(decision, questions):
                heartbeat.progress()
                decisions.append(found)
        return decisions

    def grade(self, response: Response) -> Grade:
        """Whether the final answer of a rollout is right. Raises NoVerdict."""
        answer = final_answer(response)
        if not answer or not answer.strip():
            return Grade(0.0, False)
        decision = self.verdict(response.question, response.golds, answer)
        if decision.correct is None:
            raise NoVerdict(decision.reason)
        return Grade(float(decision.correct), decision.correct)

    def take_counts(self) -> Counts:
        """The cost of judging since the last call of this method."""
        with self._lock:
            counts, self.counts = self.counts, Counts()
        return counts

    def close(self) -> None:
        self._cache.close()

    def verdict(self, question: str, golds: Sequence[str], answer: str, number_rule: str = EXACT) -> Decision:
        """The decision on one answer, from the cache if it was decided before."""
        prompt = self._prompt(question, golds, answer, number_rule)
        if (kept := self._kept(prompt)) is not None:
            return kept
        decision = self._ask(prompt)
        if decision.correct is None:
            self._count(failed=1)
            return decision
        with self._lock, going_on_without(self._file), self._cache:  # one transaction
            row = (self._key(prompt), decision.correct, decision.reason)
            self._cache.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", row)
        return decision

    @staticmethod
    def _prompt(question: str, golds: Sequence[str], answer: str, number_rule: str) -> str:
        return PROMPT.format(number_rule=number_rule, question=question, gold=" / ".join(golds), answer=answer)

    def _key(self, prompt: str) -> str:
        asked = [self.config.model, self.config.temperature, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _kept(self, prompt: str) -> Decision | None:
        """The decision in the cache."""
        row = None
        with self._lock, going_on_without(self._file):
            query = "SELECT correct, reason FROM verdicts WHERE key = ?"
            row = self._cache.execute(query, (self._key(prompt),)).fetchone()
        if row is None:
            return None
        self._count(cached=1)
        return Decision(bool(row[0]), row[1])

    def _ask(self, prompt: str) -> Decision:
        problem = ""
        for attempt in range(self.config.attempts):
            try:
                reply = self._request(prompt)
            except Fault as fault:
                problem, wait = f"{fault}: {fault.said}" if fault.said else str(fault)[:300], fault.wait
                if not fault.retry and fault.kind != "timeout":  # another request has a time limit of its own
                    break
            else:
                if (correct := read_verdict(reply)) is not None:
                    return Decision(correct, reply.strip()[:300])
                problem, wait = f"no verdict in its reply: {reply.strip()[:200]!r}", 0.0
            if attempt + 1 < self.config.attempts:
                time.sleep(max(min(2.0**attempt / 2, 8.0), min(wait, self.config.timeout)))
        return Decision(None, problem)

    def _request(self, prompt: str) -> str:
        """The text of one reply. The timeout and a size limit hold for the whole exchange. Raises Fault."""
        key = os.environ.get(self.config.key_variable)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body: dict[str, Any] = {"model": self.config.model, "messages": [{"role": "user", "content": prompt}]}
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        self._count(requests=1)
        deadline = time.monotonic() + self.config.timeout
        data = post(self._url, json.dumps(body).encode(), headers, deadline, allow_private=True, section="reward.judge")
        try:
            reply = json.loads(data)
            text = writable(str(reply["choices"][0]["message"]["content"]))
        except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
            raise Fault("garbage", f"its reply is no chat completion ({type(error).__name__}: {error})", True) from None
        usage = reply.get("usage")
        if isinstance(usage, dict):
            counted = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            self._count(**{name: number for name, number in counted.items() if isinstance(number, int)})
        return text

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)


def read_verdict(reply: str) -> bool | None:
    """The verdict of a reply: that of its lines that begin with one. None: there is no such line, or verdicts in them differ.

    A reasoning model's thoughts, which end with </think>, are left out: they may quote both verdicts."""
    found: set[bool] = set()
    for line in map(_stated, reply.rpartition("</think>")[2].splitlines()):
        if _ASKED.match(line):
            found.update(verdict.lower() in ("yes", "true") for verdict in _VERDICT.findall(line))
        elif word := _WORD.fullmatch(line):
            found.add(word[1] is None and word[2] is None)
    return found.pop() if len(found) == 1 else None


def _stated(line: str) -> str:
    """The line; of a JSON object, only its field `correct`, which may stand after the reasons."""
    fields = decode(line)
    found = [value for name, value in fields.items() if name.lower() == "correct"] if isinstance(fields, dict) else []
    return f"correct: {found[0]}" if found else line
