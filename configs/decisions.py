"""The world with decisions: long chains of look-ups in which a few words decide (appo_jax/data/sources/decisions.py).

Eight mini-batches a step, as in the paper, so that the policy moves between them and Ω differs from 1.
Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax data world --config configs/decisions.py && appo-jax train --config configs/decisions.py
"""

import dataclasses
from pathlib import Path

from appo_jax.config import BranchingConfig, DataConfig, EvalConfig, OptimizerConfig, PolicyConfig
from appo_jax.config_io import load_config

quickstart = load_config(Path(__file__).parent / "quickstart.py")

config = dataclasses.replace(
    quickstart,
    run_dir="runs/decisions",
    steps=8,
    checkpoint_every=2,
    prompts_per_minibatch=2,
    policy=PolicyConfig(architecture=quickstart.policy.architecture, tokenizer="artifacts/decisions/tokenizer.model"),
    data=DataConfig(source="decisions"),
    rollout=dataclasses.replace(quickstart.rollout, max_prompt_tokens=40, max_response_tokens=352, max_tool_calls=10),
    branching=BranchingConfig(num_branch_points=3),
    optimizer=OptimizerConfig(learning_rate=1e-4, b2=0.98),
    sft=dataclasses.replace(quickstart.sft, max_tokens=384, steps=200),
    eval=EvalConfig(num_prompts=300, every=2),
)
