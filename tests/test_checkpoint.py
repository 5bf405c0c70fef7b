"""Checkpoints survive faults of disks and killed processes. They are compared with the arrays before saving."""

import importlib
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax import checkpoint_read, failures, heartbeat
from appo_jax.checkpoint import Checkpointer
from appo_jax.checkpoint_read import verify
from appo_jax.digests import digest
from appo_jax.errors import CheckpointError


def make_state(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "kernel": jax.random.normal(keys[0], (64, 48)),
        "low": jax.random.normal(keys[1], (33,)).astype(jnp.bfloat16),
    }
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params)}


def make_iterator():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).repeat().to_iter_dataset())


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def saved(directory, steps, keep=3):
    """A folder of checkpoints, and for each step its state and the element that the iterator yields after it."""
    truth, iterator = {}, make_iterator()
    checkpointer = Checkpointer(directory, keep)
    for step in steps:
        next(iterator)
        state = make_state(step)
        checkpointer.save(step, state, {"sampled_tokens": step * 7}, iterator)
        truth[step] = (state, None)
    checkpointer.close()
    replay = make_iterator()
    for step in steps:
        next(replay)
        here = make_iterator()
        here.set_state(replay.get_state())
        truth[step] = (truth[step][0], next(here))
    return truth


def restored(directory, iterator=None):
    checkpointer = Checkpointer(directory, 3)
    try:
        return checkpointer.restore_latest(abstract(make_state(0)), iterator)
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    return directory, saved(directory, [4, 8, 12])


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine[0], tmp_path / "checkpoints"))


def test_round_trip_keeps_structure_values_meta_and_data_position(folder, pristine):
    iterator = make_iterator()
    step, state, meta = restored(folder, iterator)
    expected, element = pristine[1][12]
    assert (step, meta) == (12, {"sampled_tokens": 84})
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert_equal(state, expected)
    assert next(iterator) == element


def test_no_checkpoint_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path / "c", [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "4"]


def test_the_best_are_kept_beside_the_newest(tmp_path):
    accuracies = {1: 0.3, 2: 0.9, 3: None, 4: 0.8, 5: 0.1, 6: None, 7: 0.2}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):  # what is known of the first four is read again by the next process
        checkpointer = Checkpointer(tmp_path / "c", 2, keep_best=2)
        for step in steps:
            checkpointer.save(step, {"w": jnp.ones(3) * step}, {}, None, accuracies[step])
        checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "4", "6", "7"]
    checkpointer = Checkpointer(tmp_path / "c", 2, keep_best=2)
    assert checkpointer.restore_latest({"w": jnp.zeros(3)}, None)[0] == 7
    checkpointer.close()


def late(path: Path) -> threading.Timer:
    """Hide a step for a second, as NFS does on a host that looked for it before it was there."""
    hidden = path.rename(path.with_name("hidden"))
    timer = threading.Timer(1.0, lambda: hidden.rename(path))
    timer.start()
    return timer


def test_a_step_that_is_shown_late_is_waited_for(tmp_path):
    """The run ended with "the storage loses data"."""
    checkpointer = Checkpointer(tmp_path / "c", 1)
    checkpointer.save(1, {"w": jnp.ones(3)}, {}, None)
    while checkpointer._manager.is_saving_in_progress():
        time.sleep(0.01)
    late(tmp_path / "c/1")
    checkpointer.wait()
    late(tmp_path / "c/1")
    assert checkpointer.restore_step(1, {"w": jnp.zeros(3)})[0] == 1
    checkpointer.close()
    reader = Checkpointer(tmp_path / "c", 1, read_only=True)  # beside a run that may have removed it
    timer = late(tmp_path / "c/1")
    with pytest.raises(CheckpointError, match="removed in the meantime"):
        reader.restore_step(1, {"w": jnp.zeros(3)})
    timer.join()
    reader.close()


def test_a_step_is_reported_as_saved_when_it_is_on_disk(tmp_path):
    """While the next step is made, and not only when that is done and `wait` returns."""
    checkpointer = Checkpointer(tmp_path / "c", 1)
    heartbeat.at_step(7)
    assert heartbeat._life.unsaved() == "steps 1 to 7"
    checkpointer.save(7, {"w": jnp.ones(3)}, {}, None)
    deadline = time.monotonic() + 30
    while heartbeat._life.unsaved():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while not (tmp_path / "c/7").exists():
        assert time.monotonic() < deadline
    checkpointer.close()


def test_what_a_checkpoint_writes_and_reads_is_counted(tmp_path):
    """So a write or a read that takes long is progress."""
    state = {"w": jax.random.bits(jax.random.key(0), (4 << 20,), jnp.uint8)}  # random bits are not compressed
    before = heartbeat.bytes_moved()
    checkpointer = Checkpointer(tmp_path / "c", 1)
    checkpointer.save(1, state, {}, None)
    checkpointer._manager.wait_until_finished()
    written = heartbeat.bytes_moved()
    checkpointer.wait()
    read = heartbeat.bytes_moved()
    checkpointer.close()
    assert written - before > 4 << 20
    assert read - written > 4 << 20


def test_a_wait_for_nothing_is_not_the_first_progress_of_the_phase(tmp_path):
    """The phase then lost the longer time that it has before its first progress."""
    checkpointer = Checkpointer(tmp_path / "c", 1)
    checkpointer.wait()
    assert "checkpoint" not in heartbeat._life.longest
    checkpointer.save(1, {"w": jnp.ones(3)}, {}, None)
    checkpointer.wait()
    assert heartbeat._life.longest["checkpoint"] > 0
    checkpointer.close()


def test_only_what_was_being_removed_is_removed_at_the_start(tmp_path, caplog):
    for name in ("removed_3", "removed_4_again", "removed_backup", "removed_5_mine", "refused_6", "refused_notes"):
        (tmp_path / name).mkdir()
    with caplog.at_level("INFO"):
        Checkpointer(tmp_path, 1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "refused_6", "refused_notes", "removed_5_mine", "removed_backup",
    ]  # fmt: skip
    assert "broken checkpoints are kept: refused_6; " in caplog.text


def test_an_accuracy_that_is_not_a_number_is_none(tmp_path):
    """Compared with NaN, nothing is better: the best step would have been removed."""
    checkpointer = Checkpointer(tmp_path / "c", 1, keep_best=1)
    for step, accuracy in enumerate((0.9, math.nan, 0.5, 0.4)):
        checkpointer.save(step, {"w": jnp.ones(3)}, {}, None, accuracy)
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["0", "3"]


def test_a_step_whose_accuracy_is_damaged_is_kept_and_named(tmp_path, caplog):
    """It may be the best one. With a digit changed, it would have been removed as one of the worst."""
    for steps in ((1, 2, 3), (4, 5)):
        checkpointer = Checkpointer(tmp_path / "c", 1, keep_best=1)
        for step in steps:
            checkpointer.save(step, {"w": jnp.ones(3) * step}, {}, None, {1: 0.9, 3: 0.5}.get(step, 0.1))
        checkpointer.close()
        if steps[0] == 1:
            path = tmp_path / "c/1/meta/metadata"
            path.write_text(path.read_text().replace('"accuracy": 0.9', '"accuracy": 0.0'))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "3", "5"]
    assert caplog.text.count("/1: its accuracy cannot be read (its metadata is not what was written)") == 1


def link(folder, moved):
    shutil.move(folder / "1", moved)
    (folder / "1").symlink_to(moved)
    return "1", "is old, but a link or write-protected: it is kept"


def protect(folder, moved):
    os.chown(folder / "1", 0, 0)
    return "1", "is old, but a link or write-protected: it is kept"


def protect_a_part(folder, moved):
    os.chown(folder / "1/meta", 0, 0)
    return "removed_1", "the rest of an old checkpoint cannot be removed"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
@pytest.mark.parametrize("prevent", [link, protect, protect_a_part])
def test_an_old_step_that_cannot_be_removed_is_named_and_the_run_goes_on(tmp_path, caplog, prevent):
    folder = tmp_path / "c"
    checkpointer = Checkpointer(folder, 1)
    checkpointer.save(1, make_state(1), {}, None)
    checkpointer.wait()
    for late in ("grp", "pwd"):  # which orbax imports only then, from where that user may not read
        importlib.import_module(late)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    for path in folder.parents[:-2]:
        path.chmod(path.stat().st_mode | 0o055)
    left, said = prevent(folder, tmp_path / "moved")
    os.seteuid(65534)
    try:
        for step in (2, 3):
            checkpointer.save(step, make_state(step), {}, None)
        checkpointer.wait()
    finally:
        os.seteuid(0)
    checkpointer.close()
    assert sorted(path.name for path in folder.iterdir()) == sorted([left, "3"])
    assert caplog.text.count(said) == 1
    assert restored(folder)[0] == 3  # started by a user who may remove it
    assert sorted(path.name for path in folder.iterdir()) == sorted({left, "3"} - {"removed_1"})


@pytest.mark.parametrize("step", [12, 11])
def test_a_step_is_saved_once_and_in_order(folder, step):
    checkpointer = Checkpointer(folder, 3)
    with pytest.raises(CheckpointError, match=f"step {step} was not saved, because step 12 exists"):
        checkpointer.save(step, make_state(1), {}, None)
    checkpointer.close()


def empty_folder(folder):
    (folder / "20").mkdir()


def without_state(folder):
    shutil.rmtree(folder / "12" / "state" / "ocdbt.process_0")


def without_meta(folder):
    shutil.rmtree(folder / "12" / "meta")


def changed_meta(folder):
    path = folder / "12" / "meta" / "metadata"
    text = path.read_text()
    assert '"sampled_tokens": 84' in text
    path.write_text(text.replace('"sampled_tokens": 84', '"sampled_tokens": 85'))


def renamed_step(folder):
    (folder / "12").rename(folder / "16")


@pytest.mark.parametrize(
    ("damage", "good"),
    [
        (empty_folder, 12),
        (without_state, 8),
        (without_meta, 8),
        (changed_meta, 8),
        (renamed_step, 8),
    ],
)
def test_walks_back_over_a_broken_step_and_goes_on_from_there(folder, pristine, caplog, damage, good):
    damage(folder)
    iterator = make_iterator()
    checkpointer = Checkpointer(folder, 3)
    step, state, _ = checkpointer.restore_latest(abstract(make_state(0)), iterator)
    assert step == good
    assert_equal(state, pristine[1][good][0])
    assert next(iterator) == pristine[1][good][1]
    (message,) = [r.getMessage() for r in caplog.records if r.name == "appo_jax.checkpoint"]
    broken = message.split("step ")[1].split()[0]
    assert (folder / f"refused_{broken}").exists()  # set aside, not lost
    checkpointer.save(int(broken), make_state(5), {"again": True}, iterator)  # the run reaches this step once more
    checkpointer.close()
    step, state, meta = restored(folder, make_iterator())
    assert (step, meta) == (int(broken), {"again": True})
    assert_equal(state, make_state(5))


def test_every_step_broken_is_an_error_and_touches_nothing(folder):
    for step in ("4", "8", "12"):
        shutil.rmtree(folder / step / "state")
    with pytest.raises(CheckpointError, match=r"every checkpoint is broken:\n  step 12: .*\n  step 8: .*\n  step 4"):
        restored(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["12", "4", "8"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves futures behind
def test_damage_anywhere_never_yields_a_wrong_state(pristine, tmp_path):
    """Flip a bit or cut a file at random places of the newest step. The restored state is always one that was saved."""
    directory, truth = pristine
    rng = random.Random(0)
    refusals = 0
    for trial in range(24):
        folder = Path(shutil.copytree(directory, tmp_path / str(trial)))
        # By size: orbax names its files by random numbers.
        files = [path for path in (folder / "12").rglob("*") if path.is_file() and path.stat().st_size]
        files.sort(key=lambda path: (path.stat().st_size, path.name))
        path = rng.choices(files, weights=[max(file.stat().st_size, 2000) for file in files])[0]
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        if trial % 3:
            content[at] ^= 1 << rng.randrange(8)
        else:
            del content[at:]
        path.write_bytes(content)
        iterator = make_iterator()
        step, state, meta = restored(folder, iterator)
        assert step in (8, 12)
        assert_equal(state, truth[step][0])
        assert meta == {"sampled_tokens": step * 7}
        assert next(iterator) == truth[step][1]
        refusals += step == 8
    assert refusals >= 6  # the rest hit redundant files, or bits that no reader looks at


def test_other_arrays_are_an_error_by_name(folder):
    state = abstract(make_state(0))
    kernel, low = state["params"]["kernel"], state["params"]["low"]
    state["params"] = {
        "kernel": jax.ShapeDtypeStruct((64, 47), kernel.dtype, sharding=kernel.sharding),
        "low": jax.ShapeDtypeStruct(low.shape, jnp.float32, sharding=low.sharding),
        "more": low,
    }
    checkpointer = Checkpointer(folder, 3)
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore_latest(state, None)
    checkpointer.close()
    text = str(error.value)
    assert "params.kernel: float32[64, 48] in the checkpoint, float32[64, 47] in the program" in text
    assert "params.low: bfloat16[33] in the checkpoint, float32[33] in the program" in text
    assert "params.more: only in the program" in text
    assert sorted(path.name for path in folder.iterdir()) == ["12", "4", "8"]


def test_the_saved_state_is_the_one_given_though_its_buffers_are_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpointer = Checkpointer(tmp_path / "c", 3)
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    checkpointer.save(1, state, {}, None)
    gone = overwrite(state["w"])
    assert gone[0] == -1
    _, back, _ = checkpointer.restore_latest({"w": gone}, None)
    checkpointer.close()
    np.testing.assert_array_equal(back["w"], np.arange(2_000_000, dtype=np.float32))


FULL = """
    import json, resource, signal, socket, sys, jax
    from appo_jax import heartbeat
    from appo_jax.checkpoint import Checkpointer
    from appo_jax.errors import CheckpointError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpointer = Checkpointer(sys.argv[1], 2)
    small = {"w": jax.random.normal(jax.random.key(0), (100,))}
    large = {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    checkpointer.save(1, small, {}, None)
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    supervisor, channel = socket.socketpair()
    heartbeat.connect(channel)
    try:
        checkpointer.save(2, large, {}, None)
        for line in supervisor.makefile():  # its supervisor hears of it before anything waits for the write
            if "failed" in (told := json.loads(line)):
                print(told["code"], told["failed"])
                break
        checkpointer.wait()
    except CheckpointError as error:
        print(error)
    print(Checkpointer(sys.argv[1], 2).restore_latest(small, None)[0])
"""


def test_a_write_that_fails_is_reported_and_the_last_good_step_stays(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FULL), tmp_path / "c"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    assert done.stdout.startswith("1 " + str(tmp_path / "c"))
    assert done.stdout.count("could not be written") == 2
    assert done.stdout.endswith("\n1\n")


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint8", "bool"]),
    index=st.integers(0, 34),
    data=st.data(),
)
def test_the_digest_sees_any_change_of_one_element(dtype, index, data):
    array = jnp.arange(35).reshape(5, 7).astype(dtype)
    raw = bytearray(np.asarray(array).tobytes())
    width = array.dtype.itemsize
    bit = data.draw(st.integers(0, 0 if dtype == "bool" else 8 * width - 1))
    raw[index * width + bit // 8] ^= 1 << (bit % 8)
    changed = jnp.asarray(np.frombuffer(bytes(raw), array.dtype).reshape(5, 7))
    assert not np.array_equal(digest(array), digest(changed))


def test_the_digest_sees_order_and_shape():
    array = jnp.arange(35.0)
    assert not np.array_equal(digest(array), digest(array[::-1]))
    assert not np.array_equal(digest(jnp.zeros(4).at[1].set(2.0)), digest(jnp.zeros(4).at[2].set(2.0)))
    assert np.array_equal(digest(array), digest(array.reshape(5, 7)))  # shape is kept beside it


SHARDED = """
    import sys, jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from appo_jax.checkpoint import Checkpointer

    def state(shape, spec):
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        value = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
        return {"w": jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))}, value

    checkpointer = Checkpointer(sys.argv[1], 2)
    checkpointer.save(1, state((2, 2), ("data", "tensor"))[0], {}, None)
    like, value = state((1, 4), (None, "tensor"))
    step, back, _ = checkpointer.restore_latest(like, None)
    assert step == 1 and back["w"].sharding == like["w"].sharding, back["w"].sharding
    np.testing.assert_array_equal(back["w"], value)
    checkpointer.close()
"""


def test_a_sharded_state_comes_back_under_another_sharding(tmp_path):
    subprocess.run([sys.executable, "-c", textwrap.dedent(SHARDED), tmp_path / "c"], check=True, timeout=120)


KILLED = """
    import sys, jax, jax.numpy as jnp
    from appo_jax.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], 2)
    found = checkpointer.restore_latest({"w": jnp.zeros(400_000)}, None)
    step, w = (0, jnp.zeros(400_000)) if found is None else (found[0], found[1]["w"])
    assert bool((w == step).all()), (step, w)
    print("restored", step, flush=True)
    while True:
        step, w = step + 1, w + 1
        checkpointer.save(step, {"w": w}, {}, None)
        print("saved", step, flush=True)
"""


def test_sigkill_at_any_moment_loses_no_finished_step(tmp_path):
    finished = 0
    for stop_at in (2, 3, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path / "c"], stdout=subprocess.PIPE, text=True
        )
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if len(lines) > stop_at:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert lines[0][0] == "restored"
        assert int(lines[0][1]) >= finished
        finished = int(lines[-1][1]) - 1  # the last save may still have been on its way, the one before had ended
    assert finished >= 6


@pytest.mark.parametrize(
    ("free", "said"), [(1.5, "step 2 fits, the next one may not"), (0.5, "step 2 may not fit"), (9, None)]
)
def test_a_full_disk_is_said_a_step_ahead(tmp_path, monkeypatch, caplog, free, said):
    checkpointer = Checkpointer(tmp_path / "c", 3)
    checkpointer.save(1, make_state(1), {}, None)
    checkpointer.wait()
    size = sum(path.stat().st_size for path in (tmp_path / "c/1").rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free * size))  # a disk cannot be filled in a test
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    checkpointer.save(2, make_state(2), {}, None)
    checkpointer.close()
    assert (said in caplog.text) if said else "are free" not in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
def test_a_step_that_may_not_be_read_is_not_taken_for_broken(folder):
    assert restored(folder)[0] == 12
    for late in ("grp", "pwd"):  # which orbax imports only then, from where that user may not read
        importlib.import_module(late)
    for path in [folder, *folder.parents][:-2]:
        path.chmod(path.stat().st_mode | 0o055)
    for path in (folder / "12").rglob("*"):
        path.chmod(0o000)
    checkpointer = Checkpointer(folder, 3, read_only=True)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"/12/.*: this user may not read it; grant the permission"):
            checkpointer.restore_latest(abstract(make_state(0)), None)
    finally:
        os.seteuid(0)
    checkpointer.close()
    assert (folder / "12").exists()


def test_an_error_that_says_nothing_about_the_files_is_raised_and_no_step_is_refused(folder):
    checkpointer = Checkpointer(folder, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            checkpointer.restore_latest(abstract(make_state(0)), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert checkpointer.restore_latest(abstract(make_state(0)), None)[0] == 12
    checkpointer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["12", "4", "8"]


def test_tensorstores_and_devices_errors_are_told_from_damage(folder, tmp_path):
    (tmp_path / ".zarray").symlink_to(".zarray")
    with pytest.raises(ValueError, match="Too many levels of symbolic links") as system:
        tensorstore.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}}).result()
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: .*checkpoints/12"):
        checkpoint_read._damage(folder / "12", system.value)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as memory:
        jnp.zeros((1 << 45,), jnp.float32).block_until_ready()
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoint_read._damage(folder / "12", memory.value)


def not_given(folder, step):
    """The disk does not give a file of a step: the first page of a process's memory cannot be read (EIO)."""
    path = folder / str(step) / "meta/metadata"
    path.unlink()
    path.symlink_to("/proc/self/mem")


def test_a_step_that_the_disk_does_not_give_is_passed_over_and_renamed_only_when_it_is_made_again(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_read, "READ_AGAIN_S", (0.0,))
    not_given(folder, 12)
    assert verify(folder / "12") == "cannot be read: Input/output error"
    checkpointer = Checkpointer(folder, 3)
    assert checkpointer.restore_latest(abstract(make_state(0)), None)[0] == 8
    assert (folder / "12").exists()
    checkpointer.save(9, make_state(9), {}, None)  # orbax would not save a step before the twelfth
    checkpointer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8", "9", "refused_12"]


def test_a_disk_that_gives_no_step_is_told_as_that(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_read, "READ_AGAIN_S", (0.0,))
    for step in (4, 8):
        not_given(folder, step)
    shutil.rmtree(folder / "12/state")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read:\n  step 12: [^$]*Check the disk") as error:
        restored(folder)
    assert failures.exit_code(error.value) == failures.START_AGAIN
    assert sorted(path.name for path in folder.iterdir()) == ["12", "4", "8"]


def test_a_file_that_the_disk_gives_at_last_is_read(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_read, "READ_AGAIN_S", (0.5, 5.0))
    path = folder / "12/meta/metadata"
    shutil.copy(path, folder / "good")
    not_given(folder, 12)
    threading.Timer(0.2, lambda: (folder / "good").replace(path)).start()
    assert restored(folder)[0] == 12


ODD = {"[": "a[b]c", "*": "a*b", "**": "**", "?": "a?b", "backslash": "a\\b"}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_a_path_under_which_checkpoints_are_lost_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(CheckpointError, match="could not be read again; rename the folder"):
        Checkpointer(tmp_path / name / "c", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "a]b", "ä€{x}", "a%20b#c:d", "a\nb", "'$HOME\"", "x.orbax-checkpoint-tmp"])
def test_any_other_path_holds_checkpoints(tmp_path, name):
    saved(tmp_path / name, [1, 2])
    step, state, _ = restored(tmp_path / name)
    assert step == 2
    assert_equal(state, make_state(2))


@pytest.mark.parametrize("max_bytes", [1000, 1 << 28])
def test_a_step_that_does_not_read_back_is_told_at_once(tmp_path, monkeypatch, max_bytes):
    """The disk changes what was written: a bit of every file of arrays is flipped before the step is read back."""
    monkeypatch.setattr("appo_jax.checkpoint_read.MAX_BYTES_AT_ONCE", max_bytes)
    checkpointer = Checkpointer(tmp_path / "c", 3)
    checkpointer.save(1, make_state(1), {}, None)
    checkpointer.wait()  # a good disk: nothing is raised
    checkpointer.save(2, make_state(2), {}, None)
    checkpointer._manager.wait_until_finished()
    for path in (tmp_path / "c" / "2" / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="step 2 was written, but cannot be read back"):
        checkpointer.wait()
    checkpointer.close()
    assert restored(tmp_path / "c")[0] == 1


LIVE = """
    import sys, jax.numpy as jnp
    from appo_jax.checkpoint import Checkpointer

    checkpointer, w = Checkpointer(sys.argv[1], 1), jnp.zeros(300_000)
    for step in range(1, 10_000):
        checkpointer.save(step, {"w": w + step}, {}, None)
        checkpointer.wait()
        print(step, flush=True)
"""


def test_a_run_that_is_being_written_can_be_read(tmp_path):
    """Only one checkpoint is kept, so a step that a reader has listed is often removed before it reads it."""
    command = [sys.executable, "-c", textwrap.dedent(LIVE), tmp_path / "c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            writer.stdout.readline()
            for _ in range(8):
                reader = Checkpointer(tmp_path / "c", 1, read_only=True)
                step, state, _ = reader.restore_latest({"w": jnp.zeros(300_000)}, None)
                reader.close()
                assert bool((state["w"] == step).all())
            assert writer.poll() is None
        finally:
            writer.kill()
    assert not list((tmp_path / "c").glob("refused*"))
