"""Hugging Face folders in and out: config fields, byte-identical tensors, shards, errors that list everything."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from appo_jax.config import Architecture, PolicyConfig, RopeScaling, YarnScaling
from appo_jax.errors import ConfigError, WeightsError
from appo_jax.policy import weights
from appo_jax.policy.architecture import architecture_of, from_hf, read_architecture, to_hf
from appo_jax.policy.parameters import FAMILIES, Family, init_params

GOLDEN = Path(__file__).parent.parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))


def write_model(folder: Path, family: str, seed: int = 0, dtype=np.float32, files: int = 1) -> dict[str, np.ndarray]:
    """A tiny Hugging Face folder; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make["tiny_config"](family, seed)
    tensors = {name: array.astype(dtype) for name, array in make["tiny_weights"](config, seed).items()}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    parts = {f"model-{i}.safetensors": names[i::files] for i in range(files)}
    for file, part in parts.items() if files > 1 else [("model.safetensors", names)]:
        save_file({name: tensors[name] for name in part}, folder / file)
    if files > 1:
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize("family", make["FAMILIES"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_then_export_is_byte_identical(tmp_path, family, dtype):
    tensors = write_model(tmp_path / "in", family, dtype=dtype, files=3)
    arch = read_architecture(tmp_path / "in")
    weights.save(tmp_path / "out", weights.load(tmp_path / "in"), arch, max_shard_bytes=10_000)
    exported = stored(tmp_path / "out")
    assert exported.keys() == tensors.keys()
    for name, array in tensors.items():
        assert exported[name].dtype == array.dtype
        assert exported[name].shape == array.shape
        assert exported[name].tobytes() == array.tobytes()
    assert read_architecture(tmp_path / "out") == arch
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "np") as part:
            assert {name for name, at in index["weight_map"].items() if at == file.name} == set(part.keys())
            assert part.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_each_array_is_the_stored_matrix_by_its_axes(tmp_path):
    tensors = write_model(tmp_path, "qwen2", seed=1)
    arch, params = read_architecture(tmp_path), weights.load(tmp_path)
    d, h, e, layer = 3, arch.num_heads - 1, 5, params["layers"][1]
    name = "model.layers.1.self_attn."
    assert layer["q"][d, h, e] == tensors[name + "q_proj.weight"][h * arch.head_dim + e, d]
    assert layer["v"][d, 0, e] == tensors[name + "v_proj.weight"][e, d]
    assert layer["o"][h, e, d] == tensors[name + "o_proj.weight"][d, h * arch.head_dim + e]
    assert layer["q_bias"][h, e] == tensors[name + "q_proj.bias"][h * arch.head_dim + e]
    assert layer["down"][2, d] == tensors["model.layers.1.mlp.down_proj.weight"][d, 2]
    assert layer["mlp_norm"][d] == tensors["model.layers.1.post_attention_layernorm.weight"][d]
    assert params["embed"][7, d] == tensors["model.embed_tokens.weight"][7, d]


def test_dtype_is_cast_on_load(tmp_path):
    tensors = write_model(tmp_path, "qwen3")
    params = weights.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert np.asarray(params["embed"]).tobytes() == expected.tobytes()


SHARDED = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from appo_jax.policy import weights

folder = sys.argv[1]
whole = weights.load(folder)
for sizes in ((8, 1), (4, 2), (2, 4)):
    mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def sharding(array):  # each axis that divides gets a mesh axis, the trailing ones first: head widths are cut too
        free, spec = ["a", "b"], [None] * array.ndim
        for axis in reversed(range(array.ndim)):
            for name in list(free):
                if array.shape[axis] % mesh.shape[name] == 0:
                    spec[axis] = name
                    free.remove(name)
                    break
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, whole)
    loaded = weights.load(folder, shardings)
    for ours, expected, asked in zip(*map(jax.tree.leaves, (loaded, whole, shardings)), strict=True):
        assert ours.sharding == asked
        assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()
print("bit-exact")
"""


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_loading_into_a_mesh_is_bit_exact(tmp_path, family):
    write_model(tmp_path, family, files=2)
    done = subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "bit-exact", done.stderr


MEMORY = """
import sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
from appo_jax.policy import weights

def anonymous():  # kB held by this process, file pages left out
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

weights.load(sys.argv[1])  # warm: buffers of the runtime
jax.clear_caches()
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = weights.load(sys.argv[2])
done = True
thread.join()
sizes = [x.nbytes // 1024 for x in jax.tree.leaves(params)]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of the process from /proc")
def test_host_memory_of_loading_is_about_one_tensor(tmp_path):
    write_model(tmp_path / "small", "smollm2")
    # 16 layers of 3 x 2 MB and little else: a loader that holds the file twice is far above the bound
    config = make["tiny_config"]("smollm2", 0) | {
        "num_hidden_layers": 16, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1024,
    }  # fmt: skip
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    save_file(make["tiny_weights"](config, 0), tmp_path / "big" / "model.safetensors")
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "big")]
    # glibc keeps freed heap blocks of a few MB (8 to 24 MB here, given back by malloc_trim); with
    # mmap for every array the process's memory is what the loader holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    peak, parameters, largest = map(int, done.stdout.split())
    assert parameters > 120_000
    assert peak < parameters + 4 * largest + 8_000  # kB; 8 MB for the program's own objects


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path):
    tensors = write_model(tmp_path, "llama3")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][1:]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        weights.load(tmp_path)
    rows, columns = tensors["model.layers.0.mlp.up_proj.weight"].shape
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"model.norm.weight [{columns}]: missing" in message
    assert f"layers.0.mlp.up_proj.weight: shape [{rows}, {columns}], expected [{rows + 1}, {columns}]" in message
    assert "layers.1.mlp.up_proj.weight: dtype I8" in message
    assert "layers.0.self_attn.q_proj.bias: extra" in message
    assert message.count("\n") == 4


def test_a_missing_or_cut_file_is_named(tmp_path):
    write_model(tmp_path, "qwen3", files=2)
    whole = (tmp_path / "model-0.safetensors").read_bytes()
    (tmp_path / "model-0.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=r"(?s)model-0\.safetensors: not a complete.*model-1\.safetensors: the file is"
    ):
        weights.load(tmp_path)
    with pytest.raises(WeightsError, match=r"nowhere/config\.json: expected the config\.json"):
        weights.load(tmp_path / "nowhere")


def test_copies_that_transformers_ignores_are_ignored(tmp_path):
    tensors = write_model(tmp_path, "smollm2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "unembed" not in weights.load(tmp_path)


def test_export_carries_settings_and_names_the_ends_of_turn(tmp_path):
    source = tmp_path / "in"
    write_model(source, "qwen3")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 2]}')
    arch, params = read_architecture(source), weights.load(source)

    def configs(name):
        return [json.loads((tmp_path / name / f"{kind}.json").read_text()) for kind in ("config", "generation_config")]

    weights.save(tmp_path / "out", params, arch, source, eos_ids=(3, 1), files={"tokenizer.json": b"{}"})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    config, generation = configs("out")
    assert config["max_position_embeddings"] == 512
    assert config["dtype"] == "float32"
    assert config["eos_token_id"] == [3, 1]  # whatever the source said
    assert generation == {"temperature": 0.6, "eos_token_id": [3, 1], "bos_token_id": 0}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(WeightsError, match="not empty"):
        weights.save(tmp_path / "out", params, arch)

    (source / "generation_config.json").unlink()  # or lacked
    weights.save(tmp_path / "one", params, arch, source, eos_ids=(2,))
    assert [config["eos_token_id"] for config in configs("one")] == [2, 2]
    weights.save(tmp_path / "none", params, arch, eos_ids=(2,))
    assert configs("none")[1] == {"eos_token_id": 2}


LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


@pytest.mark.parametrize(
    "arch",
    [
        Architecture(100, 32, 2, 4, 2, 8, 64, rope_theta=1e6, family="qwen2", tie_embeddings=False),
        Architecture(100, 32, 2, 4, 2, 16, 64, family="qwen3", norm_eps=1e-5),
        Architecture(100, 32, 2, 4, 4, 8, 64, rope_theta=5e5, rope_scaling=LLAMA3, tie_embeddings=False),
        Architecture(
            100, 32, 2, 4, 2, 8, 64, rope_scaling=YarnScaling(4.0, 32768), family="qwen2", max_positions=32768
        ),
        Architecture(100, 32, 2, 4, 2, 8, 64, rope_scaling=YarnScaling(2.0, 512, 16.0, 2.0, 1.1), family="qwen3"),
    ],
)
def test_architecture_survives_config_json(arch):
    assert from_hf(json.loads(json.dumps(to_hf(arch)))) == arch


def test_fields_of_real_configs():
    """Qwen2.5-7B-Instruct's and Llama-3.1-8B-Instruct's config.json, with the old field names."""
    qwen = from_hf({
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 152064,
    })  # fmt: skip
    assert qwen == Architecture(152064, 3584, 28, 28, 4, 128, 18944, 1e6, None, 1e-6, False, family="qwen2")
    llama = from_hf({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "vocab_size": 128256,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
    })  # fmt: skip
    assert llama == Architecture(128256, 4096, 32, 32, 8, 128, 14336, 5e5, LLAMA3, 1e-5, False)


LLAMA_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", {"architectures": ["NoSuchForCausalLM"]}, r"NoSuchForCausalLM.*expected one of LlamaForCausalLM"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*only 'silu'"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type = 'longrope'"),
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, "rope factor: missing .rope_type yarn"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "rope mscale = 1.0: not supported"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "rope truncate = False"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("smollm2", {"attention_bias": True}, "attention_bias = True"),
        ("smollm2", {"mlp_bias": True}, "mlp_bias = True"),
        ("smollm2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            "smollm2",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("smollm2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: missing"),
        ("smollm2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ("smollm2", {"intermediate_size": None}, "intermediate_size: missing"),
        ("smollm2", {"num_attention_heads": 0}, "num_attention_heads = 0: expected a whole number above 0"),
        ("smollm2", {"num_hidden_layers": True}, "num_hidden_layers = True: expected a whole number above 0"),
        ("smollm2", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small': expected a number above 0"),
        ("smollm2", {"rope_scaling": 3}, "rope_scaling = 3: expected an object"),
        ("smollm2", {"rope_scaling": []}, r"rope_scaling = \[\]: expected an object"),
        *(
            (
                "qwen2",
                {"rope_scaling": {"type": "yarn", "factor": 4.0} | wrong},
                f"rope {name} = {value}: expected {bound}",
            )
            for wrong, name, value, bound in [
                ({"factor": 0.5}, "factor", 0.5, "1 or more"),
                ({"factor": -1}, "factor", -1, "a number above 0"),
                ({"factor": math.nan}, "factor", "nan", "a number above 0"),
                ({"factor": math.inf}, "factor", "inf", "a number above 0"),
                ({"factor": True}, "factor", True, "a number above 0"),
                ({"attention_factor": "x"}, "attention_factor", "'x'", "a number above 0"),
                ({"beta_fast": -32}, "beta_fast", -32, "a number above 0"),
                ({"rope_theta": -1.0}, "rope_theta", "-1.0", "a number above 0"),
                (
                    {"original_max_position_embeddings": 0},
                    "original_max_position_embeddings",
                    0,
                    "a whole number above 0",
                ),
            ]
        ),
        ("smollm2", {"rope_scaling": LLAMA_ROPE | {"factor": 0}}, "rope factor = 0: expected a number above 0"),
        ("smollm2", {"rope_scaling": LLAMA_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0: must be below"),
        ("smollm2", {"num_attention_heads": 3, "num_key_value_heads": 2}, "must be a multiple of num_kv_heads = 2"),
        ("qwen3", {"head_dim": 33}, "head_dim = 33: must be even"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(family, change, words):
    config = make["tiny_config"](family, 0)
    from_hf(config)
    with pytest.raises(WeightsError, match=words):
        from_hf(config | change)


@pytest.mark.parametrize("content", ["[]", "3", '{"architectures": {"a": 1}}', "{"])
def test_a_file_that_is_no_models_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=f"{tmp_path}.*expected"):
        read_architecture(tmp_path)


def test_a_number_that_is_null_is_as_if_it_were_missing():
    config = make["tiny_config"]("qwen3", 0)
    without = {key: value for key, value in config.items() if key != "rms_norm_eps"}
    assert from_hf(config | {"rms_norm_eps": None}) == from_hf(without)


def test_a_field_that_config_json_lacks_has_the_value_that_transformers_gives_it():
    """Values by hand from transformers 5.12: LlamaConfig, Qwen2Config, Qwen3Config. 64 query heads in a width of 512."""
    sizes = {
        "vocab_size": 99,
        "hidden_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "intermediate_size": 8,
    }
    for name, heads, width in (("Llama", 64, 8), ("Qwen2", 32, 8), ("Qwen3", 32, 128)):
        arch = from_hf(sizes | {"architectures": [f"{name}ForCausalLM"]})
        assert (arch.num_kv_heads, arch.head_dim) == (heads, width), name
        assert (arch.rope_theta, arch.rope_scaling, arch.norm_eps, arch.tie_embeddings) == (1e4, None, 1e-6, False)
        null = from_hf(sizes | {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": None})
        assert null.num_kv_heads == 64  # as many as there are query heads, in all three


def test_a_missing_field_whose_default_is_not_supported_is_refused(monkeypatch):
    """As for MistralConfig, whose default is a window of 4096 tokens, if FAMILIES had it."""
    family = Family("NoSuchForCausalLM", {"sliding_window": None}, {"sliding_window": 4096})
    monkeypatch.setitem(FAMILIES, "no_such", family)
    config = make["tiny_config"]("smollm2", 0) | {"architectures": ["NoSuchForCausalLM"]}
    assert from_hf(config | {"sliding_window": None}).family == "no_such"
    with pytest.raises(WeightsError, match=r"sliding_window = 4096 \(the default of a missing field\): not supported"):
        from_hf(config)
    with pytest.raises(WeightsError, match=r"sliding_window = 64: not supported, only None is"):
        from_hf(config | {"sliding_window": 64})


def test_of_two_sets_of_rope_parameters_the_one_that_transformers_takes_counts():
    """`rope_scaling`, the older name, replaces `rope_parameters`: RotaryEmbeddingConfigMixin.convert_rope_params_to_dict."""
    both = {
        "rope_scaling": LLAMA_ROPE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_theta": 5e5,
    }
    arch = from_hf(make["tiny_config"]("smollm2", 0) | both)
    assert (arch.rope_scaling, arch.rope_theta) == (LLAMA3, 5e5)


def test_an_unknown_family_is_refused_by_name():
    arch = Architecture(100, 32, 2, 4, 2, 8, 64, family="no_such")
    for use in (lambda: architecture_of(PolicyConfig(architecture=arch)), lambda: init_params(arch, 0)):
        with pytest.raises(
            ConfigError, match=r"policy\.architecture\.family = 'no_such': expected one of llama, qwen2"
        ):
            use()
