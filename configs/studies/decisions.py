"""The paper's claims on the world with decisions: APPO, its ablations, and other algorithms, at equal sampled tokens.

All arms have the step size of configs/decisions.py; configs/studies/decisions_rates.py says which suits each algorithm.
Hardware: 2 CPU cores, 8 GB. Command:
    appo-jax study --config configs/studies/decisions.py --jobs 2 [--arms appo arpo ...] [--seeds 0 1 ...]
If it is interrupted, the same command continues it. It ends in runs/studies/decisions/study.md, study.json and study.png.
"""

from pathlib import Path

from appo_jax.config_io import load_config, with_fields
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "decisions.py")
ARMS = {
    "appo": {},
    "grpo": {"algorithm": "grpo"},
    "arpo": {"algorithm": "arpo", "rollout.num_initial": 8},  # half of the budget at once, as in its paper
    "entropy": {"branching.score": "entropy"},  # BS → entropy
    "without_a_fut": {"advantage.future_weight": 0.0},
    "without_dual_groups": {"advantage.base": "joint"},
    "appo_all": {"algorithm": "appo_all"},  # branches are trained on as well: ours
    # What the branches are worth: the four rollouts that APPO trains on, without the twelve branches. It makes more steps.
    "grpo_m4": {"algorithm": "grpo", "rollout.num_initial": 4, "rollout.budget": 4},
    # the step size that was best for GRPO with two seeds, by decisions_rates.py
    "grpo_2e4": {"algorithm": "grpo", "optimizer.learning_rate": 2e-4},
    # the paper's tree shapes at the same M = 16; `appo` has N = 4, B = 3
    "n8_b1": {"rollout.num_initial": 8, "branching.num_branch_points": 1},
    "n2_b7": {"rollout.num_initial": 2, "branching.num_branch_points": 7},
    # other baselines
    "aepo": {"algorithm": "aepo", "rollout.num_initial": 8},
    "tree_grpo": {"algorithm": "tree_grpo"},
    "dapo": {"algorithm": "dapo"},
    "reinforce_pp": {"algorithm": "reinforce_pp"},
}

study = Study(
    out="runs/studies/decisions",
    arms={name: with_fields(base, fields) for name, fields in ARMS.items()},
    seeds=tuple(range(16)),
    max_sampled_tokens=50_000,
    cold_starts=("runs/cold/decisions-0", "runs/cold/decisions-1"),
)
