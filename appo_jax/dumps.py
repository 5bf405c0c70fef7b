"""Rollout trees on disk: rollouts/step_000012.jsonl.gz, one prompt's tree per line. Gzip's checksum reveals damage."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from appo_jax.errors import DataError
from appo_jax.storage import set_aside, to_json, write_atomically
from appo_jax.types import Rollout, stretches

Decode = Callable[[Sequence[int]], str]
_NAME = re.compile(r"step_(\d{6,})\.jsonl(\.gz)?")
# When a run starts, this many of the newest dumps are checked for damage, which takes a second or two.
MAX_CHECKED = 1000


def dump_files(folder: Path) -> dict[int, list[Path]]:
    """Step -> its dump, and the same without gzip if a user has unpacked it; in order. Files with other names are ignored."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():  # .jsonl.gz comes before .jsonl
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items()))


def dumped_steps(folder: Path) -> dict[int, Path]:
    """Step -> its dump, in order."""
    return {step: paths[0] for step, paths in dump_files(folder).items()}


def write_dump(folder: Path, step: int, trees: Sequence[Sequence[Rollout]], decode: Decode) -> Path:
    """Write the trees of a step atomically."""
    path = folder / f"step_{step:06d}.jsonl.gz"
    folder.mkdir(exist_ok=True)
    text = "".join(to_json(tree_record(step, tree, decode)) for tree in trees)
    write_atomically(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))
    return path


def read_dump(path: Path) -> Iterator[dict[str, Any]]:
    """The trees of a step, one after another. Raises DataError for a damaged file."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            decompressor = zlib.decompressobj(wbits=31)  # gzip.open would accept an empty file, and two files in one
            content = decompressor.decompress(content)
            if not decompressor.eof or decompressor.unused_data:
                raise ValueError("it is cut short" if not decompressor.eof else "something follows its end")
        for line in content.splitlines():
            yield json.loads(line)
    except (OSError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: the trees of this step cannot be read ({type(error).__name__}: {error})") from error


def settle_dumps(folder: Path, step: int, keep: int = 0) -> list[str]:
    """Prepare the folder for a run that continues from `step`. Returns descriptions of its problems.

    Dumps of later steps are removed, because these steps are done again. A damaged dump is renamed. `keep`: the number of
    newest dumps that are kept (0: all); older ones need not exist. A dump that the disk does not give now stays as it is.
    """
    found = dump_files(folder)
    for later in [s for s in found if s > step]:
        for path in found.pop(later):
            path.unlink()
    problems = []
    for checked in list(found)[-MAX_CHECKED:]:
        for path in list(found[checked]):
            try:
                for _ in read_dump(path):
                    pass
            except DataError as error:
                if isinstance(error.__cause__, OSError):  # of the disk, or of this user's rights: the file may be sound
                    problems.append(f"{path.name} cannot be read ({error.__cause__.strerror}), and is left as it is")
                    continue
                found[checked].remove(path)
                problems.append(f"{path.name} is damaged and set aside as {set_aside(path).name}")
    first = max(1, step - keep + 1) if keep else 1
    if missing := sorted(set(range(first, step + 1)) - {s for s, paths in found.items() if paths}):
        problems.append(f"the trees of {'steps' if len(missing) > 1 else 'step'} {spans(missing)} are lost")
    return problems


def spans(steps: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    groups: list[list[int]] = []
    for step in steps:
        if groups and step == groups[-1][-1] + 1:
            groups[-1].append(step)
        else:
            groups.append([step])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def tree_record(step: int, tree: Sequence[Rollout], decode: Decode) -> dict[str, Any]:
    """One prompt's rollouts as plain JSON. A node's `segments` are the tokens that it does not share with its parent:
    all of the response for an initial rollout, those from `fork` on for a branch. They are cut where sampled text and
    tool results meet and at every branch position, so that a segment `start`s at each index in `branch_positions`
    (where another node was branched off this one).
    """
    example = tree[0].example
    return {
        "step": step,
        "id": example.id,
        "question": example.question,
        "golds": list(example.golds),
        "kind": example.kind,
        "nodes": [_node_record(rollout, tree, decode) for rollout in tree],
    }


def _node_record(rollout: Rollout, tree: Sequence[Rollout], decode: Decode) -> dict[str, Any]:
    forks = sorted({other.fork for other in tree if other.parent == rollout.node and other.fork is not None})
    start = rollout.prompt_length if rollout.fork is None else rollout.fork
    cuts = sorted({*itertools.chain(*stretches(rollout.sampled, start)), *(fork for fork in forks if fork > start)})
    return {
        "node": rollout.node,
        "parent": rollout.parent,
        "fork": rollout.fork,
        "loop": rollout.loop,
        "prompt_tokens": rollout.prompt_length,
        "tokens": rollout.length,
        "sampled_tokens": int(rollout.sampled[start:].sum()),
        "reward": rollout.reward,
        "correct": bool(rollout.correct),
        "reward_detail": rollout.reward_detail,
        "reward_error": rollout.reward_error,
        "stop_reason": str(rollout.stop_reason),
        "branch_positions": forks,
        "calls": [call.to_json() for call in rollout.calls],
        "segments": [
            {"start": a, "sampled": bool(rollout.sampled[a]), "text": decode(rollout.tokens[a:b].tolist())}
            for a, b in itertools.pairwise(cuts)
        ],
    }
