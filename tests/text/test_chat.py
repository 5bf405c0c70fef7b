"""Chat rendering against transformers' (golden ids), and hostile contents."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.errors import DataError
from appo_jax.text import chat
from appo_jax.text.tokenizer import JsonTokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))
TEMPLATES = make["TEMPLATES"]


def folder_of(folder: Path, template: str) -> Path:
    """A Hugging Face tokenizer folder with the golden vocabulary and one of the golden templates."""
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    source = (GOLDEN / "templates" / f"{template}.jinja").read_text()
    config = {"chat_template": source, **make["special_tokens"](template)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizers_by_template(tmp_path_factory):
    return {t: JsonTokenizer(folder_of(tmp_path_factory.mktemp(t), t)) for t in TEMPLATES}


@pytest.mark.parametrize("template", TEMPLATES)
def test_fifty_conversations_render_as_in_transformers(tokenizers_by_template, template):
    with np.load(GOLDEN / "golden.npz") as golden:
        lengths = golden[f"chat/{template}/lengths"]
        expected = np.split(golden[f"chat/{template}/ids"], np.cumsum(lengths)[:-1])
    conversations = make["conversations"]()
    assert len(conversations) == len(expected) == 50
    for messages, ids in zip(conversations, expected, strict=True):
        assert tokenizers_by_template[template].render_chat(messages) == ids.tolist(), messages


HOSTILE = st.lists(
    st.sampled_from(
        [*make["SPECIAL"], "<|im_", "end|>", "<|", "|>", "<", "\ue000", "\ue001", "x", " ", "\n", "é", "<think>"]
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
@given(system=HOSTILE, question=HOSTILE)
def test_contents_cannot_write_control_tokens(tokenizers_by_template, template, system, question):
    tokenizer = tokenizers_by_template[template]
    control = {id for id, added in enumerate(tokenizer.token_bytes()) if added == b""}
    assert len(control) == len(make["SPECIAL"])

    def controls(system: str, question: str) -> list[int]:
        return [id for id in tokenizer.render_prompt(system, question) if id in control]

    ids = tokenizer.render_prompt("s" + system, "q" + question)
    assert [id for id in ids if id in control] == controls("s", "q")  # those of the template, no more
    text = tokenizer.decode(ids)
    assert ("q" + question).rstrip() in text  # the content is all there, as text (Llama's manner trims it)
    assert ("s" + system).rstrip() in text


def test_rendered_text_is_that_of_a_prompt_worked_by_hand(tokenizers_by_template):
    tokenizer = tokenizers_by_template["headers"]
    ids = tokenizer.render_prompt("", " hi ")
    start, header, end, eot = (
        tokenizer._control[t] for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    encode = tokenizer.encode
    assert ids == [
        start, header, *encode("system"), end, *encode("\n\nToday: 26 Jul 2024\n\n"), eot, header, *encode("user"), end,
        *encode("\n\nhi"), eot, header, *encode("assistant"), end, *encode("\n\n"),
    ]  # fmt: skip


def test_a_template_that_refuses_is_an_error_with_its_words(tokenizers_by_template):
    with pytest.raises(DataError, match="only user and assistant may follow"):
        tokenizers_by_template["headers"].render_chat(
            [{"role": "user", "content": ""}, {"role": "tool", "content": ""}]
        )


REPLIES = """\
{%- for message in messages %}
{%- set mark = '<' %}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- set mark = '[' %}
{{- mark + message.content + end }}
{%- endgeneration %}
{{- mark }}
{%- else %}
{{- {'b': message.content, 'a': 1} | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}
{%- endif %}
{%- endfor %}
"""


def test_generation_blocks_and_the_keywords_of_tojson_are_those_of_transformers(tmp_path):
    """Compared by hand: what is set in the block does not reach the text after it, because transformers calls it like a macro."""
    folder = folder_of(tmp_path, "chatml")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": REPLIES}))
    tokenizer = JsonTokenizer(folder).with_variables({"end": "]"})
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.decode(tokenizer.render_chat(turns)) == '{"a":1,"b":"é"}[yes]<'


def test_a_broken_template_is_an_error():
    with pytest.raises(DataError, match="cannot parse"):
        chat.compile_template("{% for message in messages %}")
    with pytest.raises(DataError, match=r"cannot render .*\['user'\]: TypeError: "):
        chat.render(chat.compile_template("{{ 1 + messages[0].content }}"), [{"role": "user", "content": "x"}], True)


def test_templates_run_in_a_sandbox():
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="cannot render"):
        chat.render(chat.compile_template(escape), [{"role": "user", "content": "x"}], True)
