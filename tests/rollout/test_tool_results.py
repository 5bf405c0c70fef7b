"""The tokens of a tool's result in the rollout: complete if it fits, else cut once, in the middle."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

from appo_jax.errors import ConfigError
from appo_jax.rollout.tool_results import CUT_MARK, ToolResults
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.tools.format import make_format

MARK = CUT_MARK.strip()
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "json":
        shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
        shutil.copyfile(GOLDEN / "templates/chatml.jinja", folder / "chat_template.jinja")
        ends = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    else:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["line 7 of many", "a page, a word", "KeyError: the rows", "step in a file"] * 9),
            model_prefix=str(folder / "tokenizer"), vocab_size=320, byte_fallback=True, hard_vocab_limit=False, pad_id=3,
            control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], minloglevel=2,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        )  # fmt: skip
        shutil.move(folder / "tokenizer.model", folder / "world.model")
        return load_tokenizer(folder / "world.model")
    return load_tokenizer(folder)


@pytest.fixture(params=["tags", "json"])
def call_format(request):
    return make_format(request.param)


def read(tokenizer, call_format, text, max_tokens):
    """(what the policy reads between the marks, number of tokens)."""
    ids = ToolResults(tokenizer, call_format, max_tokens).encode(text)
    head, tail = call_format.result_marks
    whole = tokenizer.decode(ids)
    assert whole.strip().startswith(head.strip())
    assert whole.strip().endswith(tail.strip())
    return whole.strip().removeprefix(head.strip()).removesuffix(tail.strip()).strip("\n"), len(ids)


def test_a_short_result_is_left_alone(tokenizer, call_format):
    assert read(tokenizer, call_format, "4\nthe answer", 60)[0] == "4\nthe answer"


def test_white_space_at_the_end_is_left_out_before_anything_is_cut(tokenizer, call_format):
    for text in ("42", "4\nthe answer"):
        shown, length = read(tokenizer, call_format, text + "\n \t" * 200, 60)
        assert shown == text
        assert length <= 60
    assert read(tokenizer, call_format, "\n" * 500, 60)[0] == ""


LINES = [f"line {i} of many" for i in range(900)]
TRACE = "Traceback (most recent call last):\n" + "".join(
    f'  File "<call {i}>", line {i}, in step\n    step({i})\n' for i in range(200)
)
ERROR = "ValueError: the number of rows must be 12, not 7"


@pytest.mark.parametrize("max_tokens", [200, 300, 700])
@pytest.mark.parametrize(
    ("result", "first", "last"),
    [
        ("\n".join(LINES), "line 0", "line 899 of many"),
        ("\n".join(LINES) + "\n\n", "line 0", "line 899 of many"),
        ("printed\n" * 500 + TRACE + ERROR, "printed", ERROR),
        (TRACE + ERROR, "Traceback", ERROR),
        ("a page, a word. " * 900 + "\nPage 3: the end", "a page", "Page 3: the end"),
        ("7" * 5000 + "\n42", "777", "42"),
        ("1 2 3 " * 100_000 + "\ndone", "1 2 3", "done"),
    ],
)
def test_a_long_result_keeps_its_beginning_and_its_last_line(tokenizer, call_format, result, first, last, max_tokens):
    shown, length = read(tokenizer, call_format, result, max_tokens)
    assert shown.count(MARK) == 1
    assert shown.startswith(first)
    assert shown.endswith(last)
    assert max_tokens - 3 <= length <= max_tokens  # the room is used


def test_a_single_long_line_keeps_both_ends(tokenizer, call_format):
    words = " ".join(f"w{i}" for i in range(2000))
    shown, length = read(tokenizer, call_format, words, 200)
    assert shown.startswith("w0 w1 ")
    assert shown.endswith("w1999")
    assert shown.count(MARK) == 1
    assert length <= 200


def test_a_last_line_that_does_not_fit_is_what_is_kept(tokenizer, call_format):
    text = "printed\n" * 500 + "KeyError: " + " ".join(f"key{i}" for i in range(900))
    shown, length = read(tokenizer, call_format, text, 200)
    assert shown.startswith("KeyError: key0")
    assert shown.endswith("key899")
    assert length <= 200


def test_no_result_is_ever_too_long(tokenizer, call_format):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            draw.choice(["word ", "\n", "é", "7", "  ", "</result>", "日本", "x" * 40])
            for _ in range(draw.randrange(400))
        )
        max_tokens = draw.randrange(60, 200)
        assert len(ToolResults(tokenizer, call_format, max_tokens).encode(text)) <= max_tokens


def test_the_marks_alone_must_fit(tokenizer, call_format):
    with pytest.raises(ConfigError, match=r"rollout\.max_result_tokens = 5: a result's own marks take"):
        ToolResults(tokenizer, call_format, 5)
