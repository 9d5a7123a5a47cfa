"""A judgement that is broken off and taken up again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import PreprocessSpec
from pipeline.datasets import open_dataset
from pipeline.errors import EdgefoldError, IntegrityError
from pipeline.validation import EnsembleMember, Judge, judge_chain, judge_ensemble
from pipeline.validation_agreement import judge_agreement
from pipeline.validation_crops import View
from pipeline.validation_state import ResumeFile

LABELS = ("ant", "bee", "cat")
SPEC = PreprocessSpec((8, 8))


class Stopped(Exception):
    pass


@pytest.fixture
def photos(tmp_path):
    """Thirty pictures of three classes, one of them broken."""
    for index, name in enumerate(LABELS):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(10):
            rng = np.random.default_rng(10 * index + i)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "ant" / "3.png").write_bytes(b"broken")
    return tmp_path / "photos"


def colour(name, part, gains=(1.0, 1.0, 1.0), stop_after=None, identity=None):
    """Logits are the mean red, green and blue; raises after so many images."""
    done = 0

    def logits(samples, pixels):
        nonlocal done
        done += len(samples)
        if stop_after is not None and done > stop_after:
            raise Stopped
        return (pixels.mean(axis=(1, 2)) * np.array(gains) / 10).astype(np.float32)

    return Judge(name, part, logits, identity=identity or f"{name} {gains}")


def judged(photos, *, resume=None, stop_after=None, gains=(1.02, 1.0, 0.98), limit=None, spec=SPEC, crops=1):
    chain = [colour("fp32", "reference"), colour("int8", "INT8", gains, stop_after)]
    dataset = open_dataset(str(photos), limit=limit)
    return judge_chain(
        chain, dataset, spec=spec, color="RGB", labels=LABELS, batch_size=4, crops=crops, resume=resume
    )


def without_time(result):
    return replace(result, seconds=0.0, notes=())


@pytest.mark.parametrize("crops", [1, 10])
@pytest.mark.parametrize("stop_after", [4, 12, 28])
def test_broken_off_and_taken_up_it_finds_the_same(photos, tmp_path, crops, stop_after):
    if crops > 1:
        stop_after *= 3  # a batch of four crops at a time counts its image three times
    whole = judged(photos, crops=crops)
    state = tmp_path / "state.json"
    with pytest.raises(Stopped):
        judged(photos, resume=ResumeFile(state, save_every_s=0), stop_after=stop_after, crops=crops)
    kept = json.loads(state.read_text())["tally"]["meters"][0]["n_images"]
    assert 0 < kept < whole.n_images
    result = judged(photos, resume=ResumeFile(state), crops=crops)
    assert without_time(result) == without_time(whole)
    assert result.skipped == whole.skipped
    assert [skipped.key for skipped in result.skipped] == ["ant/3.png"]
    assert f"{kept} of the images were judged before" in result.notes[0]
    # The state is complete until whoever shows the result removes it: nothing is judged again.
    again = judged(photos, resume=ResumeFile(state), stop_after=0, crops=crops)
    assert without_time(again) == without_time(whole)
    ResumeFile(state).remove()
    ResumeFile(state).remove()
    assert not state.exists()


def test_ensembles_and_agreement_resume_too(photos, tmp_path):
    def members(stop_after=None):
        return [
            EnsembleMember(
                name,
                View(SPEC, "RGB"),
                colour(f"{name} fp32", "reference"),
                colour(f"{name} int8", "INT8", gains, stop_after),
            )
            for name, gains in (("a", (1.02, 1.0, 0.98)), ("b", (0.97, 1.0, 1.0)))
        ]

    def ensemble(**options):
        return judge_ensemble(
            members(options.pop("stop_after", None)),
            open_dataset(str(photos)),
            precision="int8",
            labels=LABELS,
            batch_size=4,
            **options,
        )

    def agreement(stop_after=None, **options):
        chain = [colour("fp32", "reference"), colour("int8", "INT8", (1.02, 1.0, 0.98), stop_after)]
        return judge_agreement(
            chain, open_dataset(str(photos)), spec=SPEC, color="RGB", labels=LABELS, batch_size=4, **options
        )

    for judge in (ensemble, agreement):
        state = tmp_path / f"{judge.__name__}.json"
        with pytest.raises(Stopped):
            judge(stop_after=12, resume=ResumeFile(state, save_every_s=0))
        assert without_time(judge(resume=ResumeFile(state))) == without_time(judge())


def broken_off(photos, state):
    with pytest.raises(Stopped):
        judged(photos, resume=ResumeFile(state, save_every_s=0), stop_after=8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit": 12}, "other images"),
        ({"gains": (1.5, 1.0, 1.0)}, "other graph or engine of int8"),
        ({"spec": PreprocessSpec((8, 8), crop_fraction=0.5)}, "other preprocessing"),
        ({"crops": 12}, "other crops"),
    ],
)
def test_sums_of_another_judgement_are_refused_by_name(photos, tmp_path, change, named):
    state = tmp_path / "state.json"
    broken_off(photos, state)
    before = state.read_bytes()
    with pytest.raises(IntegrityError, match=rf"state\.json' keeps a judgement of {named} .*remove it"):
        judged(photos, resume=ResumeFile(state), **change)
    assert state.read_bytes() == before


def test_a_changed_image_is_another_data_set(photos, tmp_path):
    state = tmp_path / "state.json"
    broken_off(photos, state)
    Image.new("RGB", (16, 12), "red").save(photos / "cat" / "9.png")
    with pytest.raises(IntegrityError, match="of other images"):
        judged(photos, resume=ResumeFile(state))


def test_labels_of_another_order_are_another_judgement(photos, tmp_path):
    state = tmp_path / "state.json"
    broken_off(photos, state)
    chain = [colour("fp32", "reference"), colour("int8", "INT8", (1.02, 1.0, 0.98))]
    with pytest.raises(IntegrityError, match="of other labels"):
        judge_chain(
            chain,
            open_dataset(str(photos)),
            spec=SPEC,
            color="RGB",
            labels=("cat", "bee", "ant"),
            batch_size=4,
            resume=ResumeFile(state),
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: "not json",
        lambda tree: "[]",
        lambda tree: json.dumps({**tree, "schema_version": 99}),
        lambda tree: json.dumps({**tree, "tally": {"labels": 3}}),
        lambda tree: json.dumps({**tree, "skipped": "all"}),
    ],
)
def test_a_damaged_state_is_refused_not_guessed(photos, tmp_path, damage):
    state = tmp_path / "state.json"
    broken_off(photos, state)
    state.write_text(damage(json.loads(state.read_text())))
    with pytest.raises(IntegrityError, match=r"is no state of a judgement \(.*remove it to start afresh"):
        judged(photos, resume=ResumeFile(state))


def test_a_state_that_cannot_be_written_stops_before_hours_are_spent(photos, tmp_path, monkeypatch):
    with pytest.raises(
        EdgefoldError, match=r"cannot write .*No such file or directory; give another --resume"
    ):
        judged(photos, resume=ResumeFile(tmp_path / "nowhere" / "s.json", save_every_s=0))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    state = tmp_path / "state.json"
    broken_off(photos, state)
    before = state.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EdgefoldError, match="No space left on device"):
        judged(photos, resume=ResumeFile(state, save_every_s=0))
    assert state.read_bytes() == before
    assert [path.name for path in Path(tmp_path).glob(".*")] == []
    (tmp_path / "a folder").mkdir()
    with pytest.raises(EdgefoldError, match="cannot read"):
        judged(photos, resume=ResumeFile(tmp_path / "a folder"))


def test_a_judge_that_nobody_can_tell_apart_cannot_resume(photos, tmp_path):
    chain = [Judge("a", "reference", colour("a", "reference").logits), colour("b", "INT8")]
    with pytest.raises(ValueError, match="identity of every judge to resume, got none of a"):
        judge_chain(
            chain,
            open_dataset(str(photos)),
            spec=SPEC,
            color="RGB",
            labels=LABELS,
            resume=ResumeFile(tmp_path / "s.json"),
        )
