"""The weights option: its words, random weights, the hub, the bundled networks."""

import json

import pytest
import torch
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, UnsupportedError, WeightsError
from pipeline.models import weights as weights_module
from pipeline.models.inception_resnet import inception_resnet_v1
from pipeline.models.lite import inception_resnet_lite
from pipeline.models.weights import (
    PretrainedWeights,
    RandomWeights,
    WeightsFile,
    bundled_tags,
    bundled_weights,
    card_beside,
    download,
    noise_images,
    parse_weights,
    randomize,
    seeded,
)


def test_the_words_of_the_option(tmp_path):
    path = tmp_path / "w.pth"
    path.touch()
    assert parse_weights("pretrained") == PretrainedWeights()
    assert parse_weights("random:17") == RandomWeights(17)
    assert parse_weights(str(path)) == WeightsFile(path)


@pytest.mark.parametrize("text", ["random", "random:", "random:x", "random:-1", "random:1.5"])
def test_random_weights_need_a_seed(text):
    with pytest.raises(WeightsError, match="random:0"):
        parse_weights(text)


def test_a_file_that_is_not_there():
    with pytest.raises(WeightsError, match=r"nowhere\.pth.*no such file.*pretrained.*random:SEED"):
        parse_weights("nowhere.pth")


# --- random -----------------------------------------------------------------------------------------


def random_lite(seed):
    module = seeded(seed, lambda: inception_resnet_lite(10, small_input=True))
    randomize(module, seed, (32, 32))
    return module


def test_random_weights_follow_from_the_seed_alone():
    torch.manual_seed(123)
    one = random_lite(5).state_dict()
    torch.manual_seed(321)
    same, other = random_lite(5).state_dict(), random_lite(6).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    random_lite(5)
    assert torch.equal(torch.rand(3), expected)


def spread_after_each_norm(module, size):
    """Standard deviation of every batch norm's output, on images the statistics did not come from."""
    spreads = []
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, output: spreads.append(float(output.std())))
    with torch.inference_mode():
        module.eval()(noise_images(torch.Generator().manual_seed(99), 8, (size, size)))
    assert len(spreads) == len(norms)
    return spreads


def test_activations_neither_vanish_nor_explode():
    module = seeded(2, lambda: inception_resnet_v1(10))
    untouched = spread_after_each_norm(module, 96)
    assert min(untouched) < 0.01  # what the statistics are for
    randomize(module, 2, (96, 96))
    spreads = spread_after_each_norm(module, 96)
    assert min(spreads) > 0.1
    assert max(spreads) < 10


def test_noise_has_the_spectrum_of_photographs():
    """Field 1987: amplitude falls as 1/f, so every octave of a line has about the same energy."""
    images = noise_images(torch.Generator().manual_seed(0), 8, (128, 128))
    assert images.shape == (8, 3, 128, 128)
    power = torch.fft.rfft(images - images.mean((2, 3), keepdim=True)).abs().square().mean((0, 1, 2))
    octaves = torch.stack([power[low : 2 * low].sum() for low in (1, 2, 4, 8, 16)])
    assert float(octaves.max() / octaves.min()) < 4
    white = torch.fft.rfft(torch.randn_like(images)).abs().square().mean((0, 1, 2))
    assert float(white[16:32].sum() / white[1:2].sum()) > 8


def test_no_batch_norm_stays_trivial_and_training_settings_survive():
    module = random_lite(1)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        assert not norm.training
        assert norm.momentum == 0.1
        for tensor, trivial in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0)):
            assert float((tensor.detach() - trivial).abs().max()) > 0.01
        assert float((norm.running_var - 1).abs().max()) > 0.01


def test_a_network_without_batch_norm_is_left_as_built():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(30))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    randomize(module, 0, (32, 32))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


# --- hub --------------------------------------------------------------------------------------------


def test_a_hub_that_fails_says_so_and_what_to_do():
    def fetch():
        raise ConnectionError("Name or service not known\nand a long story")

    with pytest.raises(UnsupportedError) as caught:
        download("resnet18", fetch)
    assert str(caught.value) == (
        "the public weights of resnet18 cannot be fetched (ConnectionError: Name or service not known); fetch "
        "them on a machine with a network and give the file with --weights FILE"
    )
    assert caught.value.exit_code == 4


# --- bundled ----------------------------------------------------------------------------------------


@pytest.fixture
def bundled_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "BUNDLED_DIR", tmp_path)
    return tmp_path


def write_card(folder, name, **fields):
    card = {
        "model": "net",
        "input_size": 32,
        "num_classes": 2,
        "labels": ["stop", "yield"],
        "preprocess": {"input_hw": [32, 32], "resize": "squash"},
        "accuracy": {"top1": 97.1},
    }
    (folder / f"{name}.json").write_text(json.dumps({**card, **fields}))
    (folder / f"{name}.safetensors").touch()


def test_a_card_is_read_and_its_prose_ignored(bundled_dir):
    write_card(bundled_dir, "net.signs")
    path, card = bundled_weights("net", "signs")
    assert path == bundled_dir / "net.signs.safetensors"
    assert card.labels == ("stop", "yield")
    assert card.preprocess == PreprocessSpec((32, 32), resize="squash")


def test_tags_are_those_of_the_network(bundled_dir):
    for name in ("net.signs", "net.cifar10", "network.other"):
        write_card(bundled_dir, name)
    assert bundled_tags("net") == ("cifar10", "signs")
    with pytest.raises(ModelSpecError, match=r"no bundled weights net\.sings.*net\.cifar10, net\.signs$"):
        bundled_weights("net", "sings")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": ["stop"]}, "1 labels for 2 classes"),
        ({"preprocess": {"input_hw": [32, 32], "typo": 1}}, "typo"),
        ({"input_size": "small"}, "input_size"),
        ({"model": "other"}, "is of other, and net was asked for"),
    ],
)
def test_a_broken_card_is_refused(bundled_dir, fields, said):
    write_card(bundled_dir, "net.signs", **fields)
    with pytest.raises(WeightsError, match=said):
        bundled_weights("net", "signs")


def test_weights_without_a_card_are_refused(bundled_dir):
    (bundled_dir / "net.signs.safetensors").touch()
    with pytest.raises(WeightsError, match=r"net\.signs\.json cannot be used"):
        bundled_weights("net", "signs")


def test_the_card_of_a_training_is_found_beside_its_weights(tmp_path):
    write_card(tmp_path, "card")
    card = card_beside(tmp_path / "weights.safetensors", "net")
    assert card is not None
    assert card.labels == ("stop", "yield")
    with pytest.raises(WeightsError, match="is of net, and other was asked for"):
        card_beside(tmp_path / "weights.safetensors", "other")
    assert card_beside(tmp_path / "elsewhere" / "weights.safetensors", "net") is None
