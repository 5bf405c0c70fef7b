"""Logits against transformers', from golden arrays (tests/golden/make_golden.py). `make parity` compares live."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from appo_jax.policy import attention, weights
from appo_jax.policy.architecture import read_architecture
from appo_jax.policy.transformer import hidden_states, rotations, unembedding

GOLDEN = Path(__file__).parent.parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))


@pytest.mark.parametrize(("seed", "family"), list(enumerate(make["FAMILIES"])))
def test_logits_are_those_of_transformers(tmp_path, seed, family):
    config = make["tiny_config"](family, seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(make["tiny_weights"](config, seed), tmp_path / "model.safetensors")
    tokens = make["tiny_tokens"](config, seed)

    arch, params = read_architecture(tmp_path), weights.load(tmp_path)

    @jax.jit
    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = hidden_states(params, arch, tokens, rotations(positions, arch), attention.causal)
        return hidden @ unembedding(params).T

    with jax.default_matmul_precision("highest"):
        logits = forward(params, tokens)
    with np.load(GOLDEN / "golden.npz") as golden:
        expected = golden[f"logits/{family}"]
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # the tolerance means something
