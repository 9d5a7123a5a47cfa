import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.errors import DataError
from pipeline.metrics import sqnr_db
from pipeline.statistics import wilson_interval
from pipeline.validation import Judge
from pipeline.validation_agreement import AgreementResult, judge_agreement

LABELS = ("ant", "bee", "cat")
SPEC = PreprocessSpec((4, 4), resize="none")


class Unlabelled:
    name, sha256, class_names, skipped = "frames", "0" * 64, None, ()

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        for i in range(self.n):
            yield Sample(np.full((4, 4, 3), i % 256, np.uint8), None, f"frame {i}")


def replay(name, part, logits):
    return Judge(name, part, lambda samples, _: logits[[int(s.key[6:]) for s in samples]])


def compared(chain, **options):
    parts = ["reference", "export", "INT8"]
    judges = [replay(f"stage {i}", parts[i], rows) for i, rows in enumerate(chain)]
    return judge_agreement(
        judges, Unlabelled(len(chain[0])), spec=SPEC, color="RGB", labels=LABELS, batch_size=7, **options
    )


def test_agreement_and_sqnr_of_every_step_without_a_label():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(50, 3)).astype(np.float32)
    chain = [first, first, first + 0.4 * rng.normal(size=(50, 3)).astype(np.float32)]
    result = compared(chain)
    same = int((chain[0].argmax(1) == chain[2].argmax(1)).sum())
    assert 0 < same < 50
    assert (result.total.same, result.total.agreement, result.n_flips) == (same, same / 50, 50 - same)
    assert result.total.interval == wilson_interval(same, 50)
    assert result.total.sqnr_db == pytest.approx(sqnr_db(chain[0], chain[2]))
    assert [(step.part, step.before, step.after) for step in result.steps] == [
        ("export", "stage 0", "stage 1"),
        ("INT8", "stage 1", "stage 2"),
    ]
    assert result.steps[0].sqnr_db is None
    assert {(flip.truth, flip.kind) for flip in result.flips} == {(None, "changed")}
    assert len(result.flips) == 50 - same


def test_its_json_is_strict_and_complete():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(20, 3)).astype(np.float32)
    result = compared([first, first, -first], notes=["a note"])
    text = json.dumps(result.to_json(), allow_nan=False)
    without_pictures = replace(result, flips=tuple(replace(f, thumbnail_jpeg=None) for f in result.flips))
    assert TypeAdapter(AgreementResult).validate_json(text, strict=True) == without_pictures


def test_no_image_has_no_agreement():
    rows = np.zeros((0, 3), np.float32)
    with pytest.raises(DataError, match="frames has no usable image"):
        compared([rows, rows])
