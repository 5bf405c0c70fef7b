"""A real pretrained policy on HotpotQA, with a search tool over the paragraphs of its questions: SmolLM2-135M-Instruct.

Sized for two CPU cores. docs/results.md has what it reaches, with the commands. `data.path` is the file whose questions become
traces of the cold start, `data.held_out` the other one; the tool searches the paragraphs of both.

    appo-jax convert smollm2 --out artifacts/smollm2
    appo-jax sft --config configs/smollm2_hotpotqa.py --data DIR_OF_HOTPOTQA
"""

import dataclasses
from pathlib import Path

from appo_jax.config import DataConfig, SearchToolConfig, ToolsConfig
from appo_jax.config_io import load_config

gsm8k = load_config(Path(__file__).parent / "smollm2_gsm8k.py")

config = dataclasses.replace(
    gsm8k,
    run_dir="runs/smollm2_hotpotqa",
    data=DataConfig(source="hotpotqa"),
    # One page an answer: pages have about 130 tokens, and a question needs two of them.
    tools=ToolsConfig(enabled=("search",), search=SearchToolConfig(top_k=1)),
    rollout=dataclasses.replace(
        gsm8k.rollout, max_prompt_tokens=256, max_response_tokens=768, max_result_tokens=256, max_tool_calls=4
    ),
    sft=dataclasses.replace(gsm8k.sft, max_tokens=768),
)
