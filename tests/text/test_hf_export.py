"""Sentencepiece models written as Hugging Face folders: the tokenizers library reads the same ids from them.

`make parity` reads them with transformers itself.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.text.export import tokenizer_files
from appo_jax.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from appo_jax.text.train_tokenizer import train_tokenizer

WORDS = ["the", "tower", "of", "Babel", "is", "in", "Paris", "naïve", "été", "2024", "1/2", "print(x)", "数学"]
SENTENCES = [" ".join(WORDS[i % 13 :] + WORDS[: i % 7]) for i in range(300)]
TAGS = ("<think>", "</think>", "<python>", "</python>", "\n", "\\boxed{")
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# Text of a rollout; a literal control token would be one for transformers, whoever wrote it.
TEXT = st.lists(
    st.one_of(
        st.sampled_from([*TAGS, *WORDS, " ", "  ", "\t", "aa", "aaa", "0", "00", "12345", "<0x41>", "▁", "🙂"]),
        st.text(st.characters(codec="utf-8"), max_size=4),
    ),
    max_size=12,
).map("".join)


def train(path: Path, model_type: str, **options: object) -> Path:
    model = io.BytesIO()
    settings = {
        "vocab_size": 420, "byte_fallback": True, "control_symbols": ROLES, "user_defined_symbols": [*TAGS, "00"],
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "minloglevel": 2,
        "normalization_rule_name": "identity", "model_type": model_type,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **settings | options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module", params=["ours", "bpe", "char", "nfkc"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceTokenizer, tokenizers.Tokenizer, dict[str, str], Path]:
    """A tokenizer, the library's from the files written for it, their tokenizer_config.json, and their folder."""
    file = tmp_path_factory.mktemp("sp") / "some.model"
    if request.param == "ours":  # as `appo-jax data world` trains it
        train_tokenizer(SENTENCES, file, TAGS[2:4], vocab_size=512)
    elif request.param == "nfkc":
        train(file, "bpe", normalization_rule_name="nfkc")
    else:
        train(file, request.param)
    folder = tmp_path_factory.mktemp("hf")
    for name, content in tokenizer_files(file).items():
        (folder / name).write_bytes(content)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return SentencePieceTokenizer(file), theirs, config, folder


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_ids_are_the_same(both: tuple, text: str) -> None:
    ours, theirs, _, _ = both
    if any(control in text for control in (*ROLES, "<s>", "</s>", "<pad>", "<unk>")):
        return
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_special_tokens_and_prompts_are_the_same(both: tuple) -> None:
    ours, theirs, config, folder = both
    assert theirs.token_to_id(config["eos_token"]) == ours.eos_id
    assert theirs.token_to_id(config["pad_token"]) == ours.pad_id
    assert theirs.get_vocab_size() == ours.vocab_size
    template = jinja2.Environment().from_string(config["chat_template"])
    for system in ("Be brief. ", ""):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": " Who? "}]
        text = template.render(messages=messages, add_generation_prompt=True, eos_token=config["eos_token"])
        assert theirs.encode(text, add_special_tokens=False).ids == ours.render_prompt(system, " Who? ")
    messages += [{"role": "assistant", "content": "It is."}]
    text = template.render(messages=messages, add_generation_prompt=False, eos_token=config["eos_token"])
    assert theirs.encode(text).ids == [*ours.render_prompt("", " Who? "), *ours.encode("It is."), ours.eos_id]
    again = load_tokenizer(folder)  # our own reader takes the sentencepiece model of the folder
    assert isinstance(again, SentencePieceTokenizer)
    assert tokenizer_files(folder) == {name: (folder / name).read_bytes() for name in tokenizer_files(folder)}


def test_every_chat_template_of_a_folder_is_exported(tmp_path: Path) -> None:
    """An export has no folders, so templates by name are a list in tokenizer_config.json, which transformers reads, too."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tööls")
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "é", "chat_template": "older"}')
    files = tokenizer_files(tmp_path)
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tööls"}]
    assert files.keys() == {"tokenizer_config.json"}
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"].sort(key=lambda entry: entry["name"])
    assert config == {"eos_token": "é", "chat_template": templates}


@pytest.mark.parametrize("kind", ["word", "unigram"])
def test_a_model_without_an_equal_is_said(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sentencepiece's unigram models weigh their user-defined symbols against other pieces; the library cannot."""
    file = train(tmp_path / "w.model", kind, byte_fallback=False, vocab_size=60)
    assert tokenizer_files(file) == {"tokenizer.model": file.read_bytes()}
    assert f"w.model: a {kind} sentencepiece model has no equal in transformers" in caplog.text
