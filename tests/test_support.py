"""docs/support.md against what puna can do: what has no row or column there was never tried with the rest."""

import sys
from pathlib import Path
from typing import get_args

from puna.eval.doctor.diagnose import CHECKS
from puna.model.config import ModelConfig
from puna.train.optim import OptimizerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import support

ALLOWED = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.08}
"""What the page says of itself."""


def test_the_page_has_every_capability() -> None:
    """A capability that the page says nothing of, or a number on it that is a mistake in the row's dtype."""
    lines = support.PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, rows = cells[0][1:], {row[0]: row[1:] for row in cells[2:]}
    assert header == list(support.COLUMNS)
    assert list(rows) == list(support.ROWS)
    for name, row in rows.items():
        assert len(row) == len(header), name
        tried = [cell for cell in row if cell != "not tried"]
        assert len(tried) == len(support.ROWS[name].only or header), name
        dtype = support.ROWS[name].dtype.replace("auto", "fp64")  # what the doctor takes for small models
        assert all(cell == "exact" or float(cell) <= ALLOWED[dtype] for cell in tried), (name, row)


def test_nothing_is_forgotten() -> None:
    """A field of the model's config, an optimizer or a check that is neither on the page nor left out by name."""
    covered = {field for row in support.ROWS.values() for field in row.covers}
    assert set(ModelConfig.model_fields) <= covered
    kinds = get_args(OptimizerConfig.model_fields["kind"].annotation)
    assert all(f"resume-{kind}-False" in {c.name for c in support.COLUMNS.values()} for kind in kinds)
    known = {check.name for check in CHECKS}
    assert set(support.LEFT_OUT) <= known
    assert known == set(support.LEFT_OUT) | (known & set(support.COLUMNS))
