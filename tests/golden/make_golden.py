"""Makes the golden arrays of this folder with transformers, so that tests can hold parity on machines without torch.

    python tests/golden/make_golden.py        (needs the `bench` extra: torch, transformers, peft)

Weights and conversations are not stored: `tiny_weights` and `conversations` draw them again from a seed, with
generators whose streams are frozen (numpy's RandomState, Python's Random). benchmarks/parity.py shares these functions.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
FAMILIES = ("qwen2", "qwen3", "llama3", "smollm2", "qwen2_yarn", "qwen3_yarn")
ADAPTED = ("qwen2", "qwen3")  # with adapters, too
TEMPLATES = ("chatml", "headers", "thinking")
TOOL_TEMPLATES = ("tools", "tools_thinking")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
        },
    }
    for name, description, key in (
        ("python", "Runs Python code", "code"), ("search", "Finds pages, “best” first; naïve", "query"),
    )
]  # fmt: skip
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, but not special (as in Qwen3)
NUM_CONVERSATIONS = 50


def tiny_config(family: str, seed: int) -> dict[str, Any]:
    """A small random config.json of a family. Head width, grouping and tying vary where the family lets them."""
    draw = random.Random(f"{family} {seed}")
    kv_heads = draw.choice((1, 2))
    heads = kv_heads * draw.choice((1, 2, 3))
    head_dim = draw.choice((8, 16))
    config: dict[str, Any] = {
        "vocab_size": draw.choice((61, 97)),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw.choice((2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw.choice((24, 56)),
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": draw.choice((1e-5, 1e-6)),
        "tie_word_embeddings": family == "smollm2" or (family != "llama3" and draw.random() < 0.5),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family.startswith("qwen2"):
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6}
    elif family.startswith("qwen3"):  # head_dim is free of hidden_size
        config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6}
        config |= {"hidden_size": 40, "head_dim": head_dim}
    elif family == "llama3":  # transformers 5's spelling; wavelengths on both sides of the scaling's two bounds
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": draw.choice((32, 64)), "rope_theta": 5e3}
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": scaling}
    else:
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 1e5}
    if family == "qwen2_yarn":  # in the spelling of Qwen2.5's model card; frequencies on both sides of its two bounds
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}
        config |= {"rope_theta": 100.0, "rope_scaling": yarn, "max_position_embeddings": 64}
    elif family == "qwen3_yarn":  # Qwen3's own numbers
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        config |= {"rope_scaling": yarn, "max_position_embeddings": 32768}
    return config


def tiny_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors by Hugging Face name, large enough that every part of the model moves the logits."""
    c, draw = config, np.random.RandomState(seed)
    width, mlp = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim", width // c["num_attention_heads"])
    queries, keys = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = (draw.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = (mean + 0.3 * draw.standard_normal(size)).astype(np.float32)

    matrix("model.embed_tokens", c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        vector(layer + "input_layernorm.weight", width, 1.0)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            matrix(f"{layer}self_attn.{name}_proj", rows, width)
            if c["model_type"] == "qwen2":
                vector(f"{layer}self_attn.{name}_proj.bias", rows, 0.0)
        if c["model_type"] == "qwen3":
            vector(layer + "self_attn.q_norm.weight", head_dim, 1.0)
            vector(layer + "self_attn.k_norm.weight", head_dim, 1.0)
        matrix(layer + "self_attn.o_proj", width, queries)
        vector(layer + "post_attention_layernorm.weight", width, 1.0)
        matrix(layer + "mlp.gate_proj", mlp, width)
        matrix(layer + "mlp.up_proj", mlp, width)
        matrix(layer + "mlp.down_proj", width, mlp)
    vector("model.norm.weight", width, 1.0)
    if not c["tie_word_embeddings"]:
        matrix("lm_head", c["vocab_size"], width)
    return tensors


def tiny_adapter(
    config: dict[str, Any], weights: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random LoRA adapter of most matrices, as peft stores it: adapter_config.json and tensors by name."""
    rank, draw = 3, np.random.RandomState(7)
    names = [f"{name}_proj" for name in ("q", "k", "o", "up", "down")]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 5.0,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    settings |= {"base_model_name_or_path": None, "target_modules": names}
    tensors = {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if array.ndim == 2 and module.split(".")[-1] in names:
            rows, columns = array.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                key = f"base_model.model.{module}.lora_{part}.weight"
                tensors[key] = (0.3 * draw.standard_normal(shape)).astype(np.float32)
    return settings, tensors


def tiny_tokens(config: dict[str, Any], seed: int) -> np.ndarray:
    """[2, 40] int64 token ids."""
    return np.random.RandomState(seed + 1).randint(0, config["vocab_size"], (2, 40))


def conversations(seed: int = 0, count: int = NUM_CONVERSATIONS) -> list[list[dict[str, str]]]:
    """Conversations of one to five turns, with and without a system message, over awkward but honest text."""
    draw = random.Random(seed)
    pieces = (
        "What is 12 + 7?", "Who wrote “Emma”?", "naïve café — déjà vu", "数学は楽しい", "🙂👩\u200d🚀",
        "x = [1, 2]\n\tfor i in x:", "<python>\nprint(2 ** 10)\n</python>", " <result>\n1024\n</result>", "\n\n",
        "<search>Eiffel Tower</search>", "\\boxed{42}", "e\u0301 is not \u00e9", "I'LL", "a < b > c | d <| e |>",
        "1234567", "\u00a0", "   ", "it's 3, isn't it?",
    )  # fmt: skip

    def text() -> str:
        return draw.choice(("", " ")).join(draw.choice(pieces) for _ in range(draw.randint(1, 5)))

    chats = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for turn in range(draw.randint(1, 5)):
            thought = f"<think>\n{text()}\n</think>\n\n" if turn % 2 and draw.random() < 0.5 else ""
            chat.append({"role": ("user", "assistant")[turn % 2], "content": thought + text()})
        chats.append(chat)
    return chats


def tool_conversations(seed: int = 0, count: int = NUM_CONVERSATIONS) -> list[list[dict[str, Any]]]:
    """Conversations that end in an answer after none to three calls, one a turn, over the text of `conversations`."""
    draw = random.Random(seed)
    awkward = [message["content"].strip() for chat in conversations(seed + 1) for message in chat]
    simple = ["What is 12 + 7?", "print(12 + 7)", "19", "Who wrote Emma", "Jane Austen wrote it", "It is \\boxed{19}"]
    chats: list[list[dict[str, Any]]] = []
    for _ in range(count):
        texts = draw.choice((awkward, simple))
        chat: list[dict[str, Any]] = [{"role": "system", "content": draw.choice(texts)}] if draw.random() < 0.5 else []
        chat.append({"role": "user", "content": draw.choice(texts)})
        for _ in range(draw.randint(0, 3)):
            name, key = draw.choice((("python", "code"), ("search", "query")))
            call = {"type": "function", "function": {"name": name, "arguments": {key: draw.choice(texts)}}}
            chat.append({"role": "assistant", "content": draw.choice(("", draw.choice(texts))), "tool_calls": [call]})
            chat.append({"role": "tool", "name": name, "content": draw.choice(texts)})
        chat.append({"role": "assistant", "content": draw.choice(texts)})
        chats.append(chat)
    return chats


def special_tokens(template: str) -> dict[str, str]:
    """The special token fields of tokenizer_config.json that go with a template."""
    if template == "headers":
        return {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def train_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 tokens with Qwen2's normaliser and pre-tokeniser pattern."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = [message["content"] for chat in conversations(seed=1, count=200) for message in chat]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(PLAIN_ADDED))
    return tokenizer


def hf_model(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """transformers' model of a config with these weights; every name and shape must match."""
    import torch
    import transformers

    model = (
        getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config)).float().eval()
    )
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model


def peft_model(model: Any, folder: Path) -> Any:
    """peft's model of transformers' `model` and an adapter's folder; every name and shape must match."""
    import peft

    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    found = {name.replace(".default", "") for name in adapted.state_dict() if "lora_" in name}
    with safe_open(folder / "adapter_model.safetensors", "np") as stored:
        assert found == set(stored.keys())
    return adapted.eval()


def write_adapter(folder: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """The folder that peft loads."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def hf_chat_ids(tokenizer: Any, chats: list[list[dict[str, Any]]], **options: Any) -> list[list[int]]:
    """transformers' ids of each conversation, with the date our rendering prints."""
    defaults = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "date_string": "26 Jul 2024"}
    return [tokenizer.apply_chat_template(chat, **(defaults | options)) for chat in chats]


def chat_arrays() -> dict[str, np.ndarray]:
    """transformers' ids of the conversations: with the generation prompt, and with tools up to the answer's end."""
    import transformers

    arrays: dict[str, np.ndarray] = {}
    for template in (*TEMPLATES, *TOOL_TEMPLATES):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(HERE / "tokenizer.json"),
            chat_template=(HERE / "templates" / f"{template}.jinja").read_text(),
            **special_tokens(template),
        )
        if template in TEMPLATES:
            ids = hf_chat_ids(tokenizer, conversations(), add_generation_prompt=True)
        else:
            ids = hf_chat_ids(tokenizer, tool_conversations(), add_generation_prompt=False, tools=TOOLS)
        arrays[f"chat/{template}/ids"] = np.concatenate(ids).astype(np.int16)
        arrays[f"chat/{template}/lengths"] = np.array([len(row) for row in ids], np.int16)
    return arrays


def main() -> None:
    import torch

    golden: dict[str, np.ndarray] = {}
    for seed, family in enumerate(FAMILIES):
        config = tiny_config(family, seed)
        with torch.no_grad():
            tokens = torch.from_numpy(tiny_tokens(config, seed))
            weights = tiny_weights(config, seed)
            golden[f"logits/{family}"] = hf_model(config, weights)(tokens).logits.numpy()
            if family in ADAPTED:
                with tempfile.TemporaryDirectory() as scratch:
                    folder = write_adapter(Path(scratch) / "adapter", *tiny_adapter(config, weights))
                    golden[f"adapted/{family}"] = peft_model(hf_model(config, weights), folder)(tokens).logits.numpy()

    train_tokenizer().save(str(HERE / "tokenizer.json"), pretty=False)
    np.savez_compressed(HERE / "golden.npz", **golden, **chat_arrays())
    for file in ("golden.npz", "tokenizer.json"):
        print(f"{file}: {(HERE / file).stat().st_size} bytes")


if __name__ == "__main__":
    main()
