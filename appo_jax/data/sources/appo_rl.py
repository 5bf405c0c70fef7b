"""The RL prompts of the official APPO code: parquet files with its system prompt.

Columns used: prompt (messages system, user), ability ("math", "qa" or null), reward_model.ground_truth.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.source import Dataset
from appo_jax.types import Example

log = logging.getLogger(__name__)
TRAIN_FILE, HELD_OUT_FILE = "train_10k.parquet", "valid.parquet"
COLUMNS = ColumnsConfig("prompt", "reward_model.ground_truth", "", "ability", "data_source", "")


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder, or a training file in it (such as hard_search_1k.parquet).

    Raises DataError with file and row."""
    what = f"the folder with {TRAIN_FILE} and {HELD_OUT_FILE} of the official code (github.com/AMAP-ML/APPO)"
    train, held_out = split_files(config, [TRAIN_FILE], [HELD_OUT_FILE], what)
    reader = OfficialReader(config, COLUMNS, "qa", None)
    return Dataset(reader.read(train, what), reader.read(held_out, what))


class OfficialReader(Reader):
    """Reads records and restores LaTeX commands in them (`repair`)."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        example = super().example(record, path, number)
        if example is None:
            return None
        question, system, *golds = map(repair, (example.question, example.system, *example.golds))
        if left := next(filter(None, map(_LEFT.search, (question, *golds))), None):
            log.warning(
                "%s, row %d: the character before %r may be a LaTeX command that was read as an escape",
                path,
                number,
                left[1],
            )
        return dataclasses.replace(example, question=question, golds=tuple(golds), system=system)


# LaTeX commands that begin with a string escape, without their first letter.
_COMMANDS = {
    "\b": "oxed ar egin eta inom mod oldsymbol ot ullet f m ecause ackslash lacksquare lacktriangle owtie reve eth etween "
    "ox ig igl igr igg iggl iggr igcup igcap igoplus igotimes igodot igsqcup igvee igwedge igcirc igstar",
    "\f": "box lat orall rac rown ramebox colorbox ootnotesize",
    "\v": "arepsilon arphi artheta arnothing arrho arpi arsigma arkappa dots ec ee ert space dash fill phantom line",
}
_LETTER = {"\b": r"\b", "\f": r"\f", "\v": r"\v"}
_BROKEN = re.compile(
    "|".join(f"{escape}(?=(?:{rest.replace(' ', '|')})(?![a-z]))" for escape, rest in _COMMANDS.items())
)
_LEFT = re.compile(r"[\b\f\v]([a-z]\w*)")
# The characters of the ligatures ff and fi in TeX's fonts, each left before the letters that a program wrote for it.
_LIGATURE = re.compile("\v(?=ff)|\f(?=fi)")


def repair(text: str) -> str:
    r"""Restore LaTeX commands whose first letters were read as string escapes: a backspace before "oxed" was "\b", and so on."""
    return _LIGATURE.sub("", _BROKEN.sub(lambda found: _LETTER[found[0]], text))
