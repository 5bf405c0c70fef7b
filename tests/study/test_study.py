"""Studies: their plan, what is kept, what fails, and the report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from appo_jax.cli import main
from appo_jax.config import validate
from appo_jax.config_io import load_config
from appo_jax.errors import ConfigError, DataError, TrainingError
from appo_jax.study import report
from appo_jax.study.plan import Study, check_study, load_study
from appo_jax.study.run import finished, run_study

CONFIGS = Path(__file__).parents[2] / "configs" / "studies"


@pytest.fixture
def base():
    return load_config(CONFIGS.parent / "quickstart.py")


def study(base, out, **arms):
    return Study(str(out), {"appo": base} | arms, seeds=(0, 1), max_sampled_tokens=100)


def write_run(folder: Path, final: float, tokens: int = 120, sft: float = 0.4, evals: tuple = ()) -> None:
    folder.mkdir(parents=True)
    summary = {"accuracy_sft": sft, "accuracy_final": final, "sampled_tokens": tokens, "wall_s": 60.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": i, "rollout/sampled_tokens_total": t, "time/wall_s": t / 2, "eval/accuracy": a}
        for i, (t, a) in enumerate(evals, 1)
    ]
    lines.append({"step": 99, "rollout/sampled_tokens_total": tokens, "time/wall_s": 60.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["study", "ablations", "trees"])
def test_the_studies_of_configs_hold_together(name):
    found = load_study(CONFIGS / f"{name}.py")
    for arm in found.arms:
        for seed in found.seeds:
            config = found.config(arm, seed)
            validate(config)
            assert (config.seed, config.max_sampled_tokens) == (seed, found.max_sampled_tokens)
            assert config.init_from == found.cold_start(seed).run_dir
    directories = {found.config(arm, seed).run_dir for arm in found.arms for seed in found.seeds}
    assert len(directories) == len(found.arms) * len(found.seeds)


def test_what_cannot_be_a_study_is_named(base, tmp_path):
    (tmp_path / "s.py").write_text("study = 3")
    with pytest.raises(ConfigError, match="module-level `study = Study"):
        load_study(tmp_path / "s.py")
    with pytest.raises(ConfigError, match=r"missing\.py: no such file"):
        load_study(tmp_path / "missing.py")
    other = dataclasses.replace(base, sft=dataclasses.replace(base.sft, steps=7))
    with pytest.raises(ConfigError, match=r"'short' differs from 'appo' in sft\.steps"):
        check_study(study(base, tmp_path, short=other))
    with pytest.raises(ConfigError, match=r"arm 'bad': steps = 0"):
        check_study(study(base, tmp_path, bad=dataclasses.replace(base, steps=0)))
    with pytest.raises(ConfigError, match="max_sampled_tokens = 0"):
        check_study(dataclasses.replace(study(base, tmp_path), max_sampled_tokens=0))
    with pytest.raises(ConfigError, match="at least one arm"):
        check_study(dataclasses.replace(study(base, tmp_path), seeds=()))
    with pytest.raises(ConfigError, match="'a/b'"):
        check_study(study(base, tmp_path, **{"a/b": base}))


def test_a_run_is_kept_once_its_budget_is_used(base, tmp_path):
    s = study(base, tmp_path)
    assert not finished(s, "appo", 0)
    write_run(s.run_dir("appo", 0), 0.5, tokens=120)
    assert finished(s, "appo", 0)
    assert not finished(dataclasses.replace(s, max_sampled_tokens=200), "appo", 0)


def test_runs_that_fail_are_named_and_do_not_stop_the_report(base, tmp_path):
    """No data where it should be: both cold starts fail, and what was made before is still reported."""
    broken = dataclasses.replace(
        base, data=dataclasses.replace(base.data, source="gsm8k", path=str(tmp_path / "nothing"))
    )
    s = study(broken, tmp_path / "out")
    write_run(s.run_dir("appo", 0), 0.5)
    with pytest.raises(TrainingError, match=r"2 runs failed: see .*cold-0\.log, .*cold-1\.log"):
        run_study(s)
    assert "nothing" in (tmp_path / "out" / "runs" / "cold-0.log").read_text()
    assert "| appo | 1 |" in (tmp_path / "out" / "study.md").read_text()


def test_the_table_by_hand(base, tmp_path):
    s = study(base, tmp_path, grpo=dataclasses.replace(base, algorithm="grpo"), dapo=base)
    for seed, (appo, grpo) in enumerate([(0.8, 0.6), (0.9, 0.9)]):
        write_run(s.run_dir("appo", seed), appo)
        write_run(s.run_dir("grpo", seed), grpo)
    lines = report.write_report(s).splitlines()
    assert lines[2:] == [
        "| appo | 2 | 40.0 | 85.0 [80.0, 90.0] | +45.0 [+40.0, +50.0] |  |  |  | 120 | 1.0 |",
        "| grpo | 2 | 40.0 | 75.0 [60.0, 90.0] | +35.0 [+20.0, +50.0] | -10.0 [-20.0, +0.0] | 1.000 | 0.500 | 120 | 1.0 |",
        "| dapo | 0 | | | | | | | | |",
    ]  # differences −20 and 0: t = −1 with one degree of freedom, p = 1/2
    assert image.imread(tmp_path / "study.png")[..., :3].std() > 0.01
    kept = json.loads((tmp_path / "study.json").read_text())
    assert kept["grpo"]["1"]["final"] == 0.9


def test_curves_begin_at_the_cold_start_and_end_at_the_final_accuracy(base, tmp_path):
    s = study(base, tmp_path)
    write_run(s.run_dir("appo", 0), 0.8, evals=((40, 0.5), (80, 0.6)))
    run = report.load_outcomes(s)["appo"][0]
    assert run.tokens.tolist() == [0, 40, 80, 120]
    assert run.seconds.tolist() == [0, 20, 40, 60]
    assert run.accuracy.tolist() == [0.4, 0.5, 0.6, 0.8]


def test_curves_are_averaged_where_all_of_them_are():
    grid, mean = report.mean_curve(
        [np.array([0.0, 10.0]), np.array([0.0, 5.0, 6.0])], [np.array([0.0, 1.0]), np.ones(3)]
    )
    assert (grid[0], grid[-1]) == (0, 6)
    np.testing.assert_allclose(mean, (grid / 10 + 1) / 2)


def test_a_study_without_runs_says_so(base, tmp_path):
    with pytest.raises(DataError, match="no run of the study is finished"):
        report.write_report(study(base, tmp_path))


def test_an_arm_that_does_not_exist_is_named(capsys):
    assert main(["study", "--config", str(CONFIGS / "study.py"), "--arms", "ppo"]) == 2
    assert "--arms ppo: not an arm of" in capsys.readouterr().err
