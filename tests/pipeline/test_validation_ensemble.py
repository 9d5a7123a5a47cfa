"""Several networks and several crops: what is averaged, and what is said of each part."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter
from tolerances import AVERAGED_SOFTMAX_ATOL

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.errors import DataError, EngineError
from pipeline.metrics import probabilities
from pipeline.statistics import mcnemar_exact_p
from pipeline.validation import EnsembleMember, Judge, judge_chain, judge_ensemble
from pipeline.validation_crops import View, crops_of
from pipeline.validation_result import ValidationResult

LABELS = ("ant", "bee", "cat")
SPEC = PreprocessSpec((8, 8))


class Images:
    """`n` pictures of noise, made when they are asked for."""

    name, sha256, class_names, skipped = "made", "0" * 64, LABELS, ()

    def __init__(self, n: int, side: int = 24) -> None:
        self.n, self.side = n, side

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        for i in range(self.n):
            pixels = np.random.default_rng(i).integers(0, 256, (self.side, self.side + 8, 3)).astype(np.uint8)
            yield Sample(pixels, i % 3, str(i))


def recorded(name, logits, part="INT8"):
    return Judge(name, part, lambda samples, _: logits[[int(s.key) for s in samples]], identity=name)


def member(name, before, after, side=8):
    return EnsembleMember(
        name,
        View(PreprocessSpec((side, side)), "RGB"),
        recorded(f"{name} fp32", before, "reference"),
        recorded(f"{name} int8", after),
    )


def noisy(n, seed, sure=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) + sure * np.eye(3)[np.arange(n) % 3]
    return logits.astype(np.float32), (logits + 0.5 * rng.normal(size=(n, 3))).astype(np.float32)


def test_an_ensemble_answers_by_the_mean_of_the_softmax():
    n, truth = 60, np.arange(60) % 3
    pairs = [noisy(n, seed) for seed in range(3)]
    result = judge_ensemble(
        [member(f"net {i}", *pair, side=8 + i) for i, pair in enumerate(pairs)],
        Images(n),
        precision="int8",
        labels=LABELS,
        batch_size=7,
    )
    before, after = (np.mean([probabilities(pair[side]) for pair in pairs], axis=0) for side in (0, 1))
    assert [stage.name for stage in result.stages] == ["fp32 ensemble of 3", "int8 ensemble of 3"]
    assert result.drops[0].part == "INT8"
    for stage, softmax in zip(result.stages, (before, after), strict=True):
        assert stage.top1_correct == int((softmax.argmax(1) == truth).sum())
        assert stage.confidence.mean == pytest.approx(softmax.max(1).mean(), abs=AVERAGED_SOFTMAX_ATOL)
    right = [softmax.argmax(1) == truth for softmax in (before, after)]
    assert result.total.lost == int((right[0] & ~right[1]).sum())
    # The SQNR is of the logits of all members together.
    first, last = (np.concatenate([pair[side] for pair in pairs]).astype(float) for side in (0, 1))
    assert result.total.sqnr_db == pytest.approx(
        10 * np.log10((first**2).sum() / ((first - last) ** 2).sum())
    )


def test_every_member_is_judged_by_itself_and_beside_the_ensemble():
    n, truth = 60, np.arange(60) % 3
    pairs = [noisy(n, seed) for seed in range(3)]
    result = judge_ensemble(
        [member(f"net {i}", *pair) for i, pair in enumerate(pairs)],
        Images(n),
        precision="int8",
        labels=LABELS,
        batch_size=16,
    )
    together = np.mean([probabilities(pair[1]) for pair in pairs], axis=0).argmax(1) == truth
    for found, (before, after) in zip(result.members, pairs, strict=True):
        own = after.argmax(1) == truth
        assert found.before.top1_correct == int((before.argmax(1) == truth).sum())
        assert found.after.top1_correct == int(own.sum())
        assert found.drop.drop_points == pytest.approx(100 * (found.before.top1 - found.after.top1))
        gained, lost = int((~own & together).sum()), int((own & ~together).sum())
        assert (found.to_ensemble.lost, found.to_ensemble.gained) == (lost, gained)
        assert found.to_ensemble.mcnemar_p == mcnemar_exact_p(lost, gained)
        assert found.identity == f"{found.name} int8"
    # Three independent networks: better together than the best of them, or this test shows nothing.
    assert result.stages[1].top1 > max(found.after.top1 for found in result.members)
    text = json.dumps(result.to_json(), allow_nan=False)
    without_pictures = replace(result, flips=tuple(replace(f, thumbnail_jpeg=None) for f in result.flips))
    assert TypeAdapter(ValidationResult).validate_json(text, strict=True) == without_pictures


def test_an_fp32_ensemble_is_compared_with_its_first_network():
    n = 60
    nets = [noisy(n, seed)[0] for seed in range(2)]
    members = []
    for i, logits in enumerate(nets):
        judge = recorded(f"net {i}", logits, "reference")
        members.append(EnsembleMember(f"net {i}", View(SPEC, "RGB"), judge, judge))
    result = judge_ensemble(members, Images(n), precision="fp32", labels=LABELS)
    assert [stage.name for stage in result.stages] == ["net 0", "fp32 ensemble of 2"]
    assert result.drops[0].part == "ensemble"
    assert result.stages[0].top1 == result.members[0].after.top1
    assert result.members[0].drop.drop_points == 0.0
    assert result.total.sqnr_db is not None  # of the logarithms of the probabilities: they differ


def test_members_see_their_own_pixels():
    seen: dict[str, set[tuple[int, ...]]] = {"a": set(), "b": set()}

    def spy(name):
        def logits(samples, pixels):
            seen[name].add((*pixels.shape[1:3], int(pixels[0, 0, 0, 0]) - int(pixels[0, 0, 0, 2])))
            return np.eye(3, dtype=np.float32)[[int(s.key) % 3 for s in samples]]

        return Judge(name, "INT8", logits)

    views = {"a": View(PreprocessSpec((8, 8)), "RGB"), "b": View(PreprocessSpec((12, 12)), "BGR")}
    members = [EnsembleMember(name, view, spy(name), spy(name)) for name, view in views.items()]
    judge_ensemble(members, Images(1), precision="int8", labels=LABELS)
    assert {shape[:2] for shape in seen["a"]} == {(8, 8)}
    assert {shape[:2] for shape in seen["b"]} == {(12, 12)}


def brightness(name, part, scale=1.0):
    """A network whose logits are the mean red, green and blue of a crop."""

    def logits(samples, pixels):
        return (scale * pixels.mean(axis=(1, 2)) / 25).astype(np.float32)

    return Judge(name, part, logits)


@pytest.mark.parametrize("crops", [1, 10, 12, 144])
@pytest.mark.parametrize("batch_size", [5, 16, 36])  # less than an image, one, and three
def test_the_softmax_is_averaged_over_the_crops(crops, batch_size):
    images, view = Images(4), View(SPEC, "RGB")
    result = judge_chain(
        [brightness("a", "reference"), brightness("b", "INT8", 0.9)],
        images,
        spec=SPEC,
        color="RGB",
        labels=LABELS,
        batch_size=batch_size,
        crops=crops,
    )
    softmax = np.array(
        [
            np.mean(
                [
                    probabilities(crop.mean(axis=(0, 1))[None] / 25)[0]
                    for crop in crops_of(s.image, view, crops)
                ],
                axis=0,
            )
            for s in images
        ]
    )
    assert result.crops == crops
    assert result.stages[0].confidence.mean == pytest.approx(softmax.max(1).mean(), abs=1e-6)
    assert result.stages[0].top1_correct == int((softmax.argmax(1) == np.arange(4) % 3).sum())
    assert result.total.sqnr_db == pytest.approx(
        20.0, abs=1e-3
    )  # of the logits of all crops: a change of a tenth


def test_a_broken_crop_names_its_image():
    def broken(samples, pixels):
        rows = np.zeros((len(pixels), 3), np.float32)
        if any(s.key == "1" for s in samples):
            rows[-1, 0] = np.nan
        return rows

    with pytest.raises(EngineError, match="NaN or infinite logits for 1 of 1 images, first 1"):
        judge_chain(
            [Judge("a", "reference", broken), Judge("b", "INT8", broken)],
            Images(3),
            spec=SPEC,
            color="RGB",
            labels=LABELS,
            batch_size=4,
            crops=10,
        )


def test_one_member_is_no_ensemble():
    with pytest.raises(ValueError, match="two members"):
        judge_ensemble([member("a", *noisy(3, 0))], Images(3), precision="int8", labels=LABELS)
    with pytest.raises(DataError, match="made has no usable image"):
        judge_ensemble(
            [member("a", *noisy(3, 0)), member("b", *noisy(3, 1))], Images(0), precision="int8", labels=LABELS
        )


def peak_bytes(n):
    """The most memory that a judgement of `n` images holds at once; every image flips, is confused and shown."""

    def wrong(shift):
        return lambda samples, _: 9 * np.eye(3, dtype=np.float32)[[(int(s.key) + shift) % 3 for s in samples]]

    chain = [Judge("a", "reference", wrong(0)), Judge("b", "INT8", wrong(1))]
    tracemalloc.start()
    try:
        judge_chain(chain, Images(n, side=96), spec=SPEC, color="RGB", labels=LABELS, batch_size=16)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_images():
    peak_bytes(64)  # what the first judgement imports and caches
    few, many = peak_bytes(200), peak_bytes(1000)
    one_image = 96 * 104 * 3
    assert many < few + 20 * one_image  # 800 more images would be 24 MB
