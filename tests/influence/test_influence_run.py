"""`appo-jax influence` on a real run, the smallest there is."""

import json

from matplotlib import image

from appo_jax.cli import main
from appo_jax.config import Config
from appo_jax.train import train


def test_the_report_of_a_run(tiny: Config, tmp_path) -> None:
    train(tiny)
    out = tmp_path / "influence"
    sizes = ["--questions", "2", "--rollouts", "2", "--positions", "2", "--continuations", "2"]
    assert main(["influence", tiny.run_dir, "--out", str(out), *sizes]) == 0
    figures = json.loads((out / "influence.json").read_text())
    assert figures["rollouts"] == 4
    assert set(figures["scores"]) == {"product", "entropy", "future", "additive", "random", "turn start"}
    assert set(figures["scatter"]["variance"]) == {"per_rollout", "proportional"}
    text = (out / "influence.md").read_text()
    assert "4 rollouts of" in text
    assert "Variance of A_base" in text
    assert image.imread(out / "influence.png")[..., :3].std() > 0.01
