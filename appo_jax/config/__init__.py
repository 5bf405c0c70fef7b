"""All settings of a run, as frozen dataclasses; one module for each subject. `Config` holds all parts; each package of
the program receives only its own part. Defaults are the paper's where the paper gives a number. A field's docstring
gives its meaning, its unit and the source of its default; its type gives the bounds of a number. Rules between fields
are in `rules`. `config_io.check` checks a config against all of them.
"""

from appo_jax.config.data import ColumnsConfig, DataConfig, DataPart, OnMalformed
from appo_jax.config.judge import JudgeConfig
from appo_jax.config.learning import OptimizerConfig, Remat, SFTConfig
from appo_jax.config.method import AdvantageConfig, BranchingConfig, LossConfig, Std
from appo_jax.config.policy import Adaptable, Architecture, LoRAConfig, PolicyConfig, RopeScaling, YarnScaling
from appo_jax.config.rollout import RolloutConfig
from appo_jax.config.run import Config, EvalConfig, EvalSetConfig, MeshConfig, RewardConfig
from appo_jax.config.tools import PythonToolConfig, SearchToolConfig, ToolsConfig

__all__ = [
    "Adaptable",
    "AdvantageConfig",
    "Architecture",
    "BranchingConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "DataPart",
    "EvalConfig",
    "EvalSetConfig",
    "JudgeConfig",
    "LoRAConfig",
    "LossConfig",
    "MeshConfig",
    "OnMalformed",
    "OptimizerConfig",
    "PolicyConfig",
    "PythonToolConfig",
    "Remat",
    "RewardConfig",
    "RolloutConfig",
    "RopeScaling",
    "SFTConfig",
    "SearchToolConfig",
    "Std",
    "ToolsConfig",
    "YarnScaling",
]
