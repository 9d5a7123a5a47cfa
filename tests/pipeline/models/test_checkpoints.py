"""Weights files as people save them, and as nobody should load them."""

import argparse
import collections
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import WeightsError
from pipeline.models.checkpoints import head_size, load_state, read_checkpoint, unwrap


class Net(nn.Module):
    def __init__(self, num_classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)


class Outer(nn.Module):
    """A model whose own keys begin with ``model.``."""

    def __init__(self):
        super().__init__()
        self.model = Net()


@pytest.fixture
def state():
    torch.manual_seed(0)
    return Net().state_dict()


def read(path, model):
    """File to model: the whole way."""
    checkpoint = read_checkpoint(path)
    content, notes = unwrap(checkpoint, model.state_dict())
    return notes + load_state(model, content, str(path), ("AuxLogits.",))


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same(model, state):
    return all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_plain_state_dict_is_recognized_by_content(tmp_path, state, kind):
    path = tmp_path / "weights.bin"  # the name says nothing
    (save_file if kind == "safetensors" else torch.save)(state, path)
    model = Net()
    assert read(path, model) == ()
    assert same(model, state)


def test_the_digest_is_that_of_the_file(tmp_path, state):
    import hashlib

    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    assert read_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("wrap", "noted"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "'state_dict'"),
        (lambda s: {"model": s, "optimizer": {"lr": 0.1}}, "'model'"),
        (lambda s: {"model_state_dict": s, "loss": 0.3}, "'model_state_dict'"),
        (lambda s: {"model": {"state_dict": s}}, "'state_dict'"),
        (lambda s: {"weights": s, "epoch": 3}, "'weights'"),  # the only state dict there is
        (lambda s: prefixed(s, "module."), "'module.'"),
        (lambda s: prefixed(s, "_orig_mod."), "'_orig_mod.'"),
        (lambda s: prefixed(s, "module._orig_mod."), "'module._orig_mod.'"),
        (lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2"}, "'model.'"),
        (lambda s: {"model_ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(9)}}, "'model_ema'"),
        (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)}, "'state_dict'"),
        (lambda s: collections.OrderedDict(state_dict=collections.OrderedDict(s)), "'state_dict'"),
    ],
)
def test_checkpoints_are_unwrapped_and_the_note_says_what_was_taken(tmp_path, state, wrap, noted):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(state), path)
    model = Net()
    notes = read(path, model)
    assert same(model, state)
    assert any(noted in note for note in notes), notes


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_preferred_and_the_others_named(tmp_path, state, key):
    path = tmp_path / "checkpoint.pth"
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict": raw, key: state}, path)
    model = Net()
    (note,) = read(path, model)
    assert same(model, state)
    assert key in note
    assert "state_dict left aside" in note


def test_a_prefix_of_the_model_itself_stays(tmp_path):
    model = Outer()
    state = {key: value + 1 for key, value in Outer().state_dict().items()}
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    assert read(path, model) == ()
    assert same(model, state)


def test_a_key_with_and_without_prefix_is_ambiguous(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    torch.save(state | prefixed(state, "module."), path)
    with pytest.raises(WeightsError, match=r"module\.conv\.weight.*both with and without"):
        read(path, Net())


def test_two_state_dicts_without_a_known_name_are_not_guessed_between(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    torch.save({"generator": state, "discriminator": state}, path)
    with pytest.raises(WeightsError, match="generator: OrderedDict of 9, discriminator: OrderedDict of 9"):
        read(path, Net())


@pytest.mark.parametrize("content", [{}, [1, 2], 3, {"epoch": 3}])
def test_a_file_without_a_state_dict(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="state dict"):
        read(path, Net())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", ["zip", "legacy", "bare"])
def test_pickled_code_is_refused_and_not_run(tmp_path, state, protocol):
    trace, path = tmp_path / "executed", tmp_path / "checkpoint.pth"
    content = {"state_dict": state, "extra": Bomb(str(trace))}
    if protocol == "bare":
        path.write_bytes(pickle.dumps(Bomb(str(trace)), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(WeightsError, match=r"calls io\.open.*torch\.save\(model\.state_dict"):
        read_checkpoint(path)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("keep", [0, 5, 40, 0.9])
def test_a_truncated_file_is_refused(tmp_path, state, kind, keep):
    path = tmp_path / "weights"
    (save_file if kind == "safetensors" else torch.save)(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(WeightsError, match="weights file"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth cannot be read: No such file"):
        read_checkpoint(tmp_path / "nowhere.pth")


# --- every key accounted for ------------------------------------------------------------------------


def test_missing_extra_and_misshapen_keys_are_all_listed(state):
    state["fc.weight"] = torch.zeros(3, 5)
    state["surplus.weight"] = torch.zeros(1)
    del state["bn.bias"]
    with pytest.raises(WeightsError) as caught:
        load_state(Net(), state, "file.pth")
    message = str(caught.value)
    assert "1 missing: bn.bias" in message
    assert "1 extra: surplus.weight" in message
    assert "1 misshapen: fc.weight (file 3×5, model 3×4)" in message
    assert "7 of its 9 tensors fit" in message


def test_a_long_list_of_keys_says_how_long(state):
    state |= {f"layer{i}.weight": torch.zeros(1) for i in range(50)}
    with pytest.raises(WeightsError, match=r"50 extra: layer0\.weight.*and 30 more"):
        load_state(Net(), state, "file.pth")


def test_integers_are_not_weights(state):
    """A checkpoint of an already quantized model."""
    state["conv.weight"] = state["conv.weight"].to(torch.int8)
    with pytest.raises(WeightsError, match=r"conv\.weight \(file 4×3×3×3 int8, model 4×3×3×3\)"):
        load_state(Net(), state, "file.pth")


def test_nothing_is_loaded_where_anything_is_wrong(state):
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError):
        load_state(model, state | {"surplus": torch.zeros(1)}, "file.pth")
    assert same(model, before)


def test_auxiliary_heads_are_dropped_and_named(state):
    model = Net()
    aux = {"AuxLogits.fc.weight": torch.zeros(3, 8), "AuxLogits.conv0.conv.weight": torch.zeros(1)}
    (note,) = load_state(model, state | aux, "file.pth", ("AuxLogits.",))
    assert "dropped AuxLogits (2 tensors)" in note
    with pytest.raises(WeightsError, match=r"2 extra: AuxLogits\.fc"):
        load_state(model, state | aux, "file.pth")


def test_a_missing_batch_counter_is_no_missing_weight(state):
    """Files older than PyTorch 0.4.1 lack it, and inference does not read it."""
    del state["bn.num_batches_tracked"]
    model = Net()
    load_state(model, state, "file.pth")
    assert same(model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(state, dtype):
    model = Net()
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    load_state(model, cast, "file.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.conv.weight, cast["conv.weight"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["conv.weight", "bn.running_var"])
def test_weights_that_are_not_finite_are_refused_by_name(state, key, value):
    state[key].view(-1)[1] = value
    with pytest.raises(WeightsError, match=rf"NaN or infinite values in {key} \(1 of {state[key].numel()}\)"):
        load_state(Net(), state, "file.pth")


def test_the_head_is_what_differs_in_its_first_dimension_alone():
    three, ten = Net(3).state_dict(), Net(10).state_dict()
    assert head_size(three, ten) == (3, 10)
    assert head_size(three, three) is None
    assert head_size(three, Net(10, width=8).state_dict()) is None
