"""The networks against the papers, and against the public modules whose checkpoints they load."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tolerances import SAME_NETWORK_RTOL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.inception import inception_v2, inception_v3, inception_v4
from pipeline.models.inception_resnet import (
    inception_resnet_v1,
    inception_resnet_v1_embedding,
    inception_resnet_v1_paper,
    inception_resnet_v2,
    inception_resnet_v2_paper,
)
from pipeline.models.registry import NETWORKS
from pipeline.models.tables import Concat, TableModule, conv, residual_rows
from pipeline.models.tables import Path as TablePath
from pipeline.models.weights import randomize

SIZE = 107
"""Small, and odd all the way down: 107, 53, 51, 25, 23, 11, 5, 2."""

IMAGENET = [
    inception_v2,
    inception_v3,
    inception_v4,
    inception_resnet_v1_paper,
    inception_resnet_v2,
    inception_resnet_v2_paper,
]


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def relative_difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def filled(module):
    """A module built on the meta device, with weights of the right scale and non-trivial batch norms."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            n_inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(0.0, (2 / n_inputs) ** 0.5, generator=generator)
        for name, buffer in module.named_buffers():
            buffer.fill_(1 if name.endswith("var") else 0)
    randomize(module, 3, (SIZE, SIZE))
    return module


def with_weights_of(reference, build):
    """`build`'s network on the reference's own tensors; strict, so the keys are the reference's."""
    with torch.device("meta"):
        module = build().eval()
    module.load_state_dict(reference.state_dict(), assign=True)
    return module


def image(size=SIZE, n=1):
    return torch.randn((n, 3, size, size), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are small here, and other tests may be running
    yield
    torch.set_num_threads(before)


# --- equal to the public modules --------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_networks():
    """timm's modules by name, with weights that leave no batch norm trivial."""
    timm = pytest.importorskip("timm")
    networks = {}

    def get(name):
        if name not in networks:
            with torch.device("meta"):  # its own initialization takes seconds
                module = timm.create_model(name)
            networks[name] = filled(module)
        return networks[name]

    return get


@pytest.mark.parametrize("build", [inception_v3, inception_v4, inception_resnet_v2])
def test_logits_equal_timm(timm_networks, build):
    reference = timm_networks(build.__name__)
    ours = with_weights_of(reference, build)
    with torch.inference_mode():
        expected = reference(image())
        assert relative_difference(ours(image()), expected) < SAME_NETWORK_RTOL
    assert expected.std() > 0.01  # logits that all but vanish would be equal too


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_wrong_residual_scale_changes_the_logits(timm_networks, stage):
    reference = timm_networks("inception_resnet_v2")
    scales = [0.17, 0.10, 0.20]
    scales[stage] += 0.01
    ours = with_weights_of(reference, lambda: inception_resnet_v2(scales=tuple(scales)))
    with torch.inference_mode():
        assert relative_difference(ours(image()), reference(image())) > 100 * SAME_NETWORK_RTOL


def test_average_pooling_counts_padding_only_in_inception_v3(timm_networks):
    """The ports differ here and nothing but the numbers shows it."""
    from dataclasses import replace

    from pipeline.models.tables import Block, Pool

    def flipped(path: TablePath) -> TablePath:
        rows = []
        for row in path:
            if isinstance(row, Pool):
                row = replace(row, count_include_pad=not row.count_include_pad)
            elif isinstance(row, Block):
                row = replace(row, path=flipped(row.path))
            elif isinstance(row, Concat):
                row = Concat(tuple(flipped(path) for path in row.paths))
            rows.append(row)
        return tuple(rows)

    reference = timm_networks("inception_v3")
    ours = with_weights_of(reference, inception_v3)
    for module in ours.modules():
        if isinstance(module, TableModule):
            module.path = flipped(module.path)
    with torch.inference_mode():
        assert relative_difference(ours(image()), reference(image())) > 100 * SAME_NETWORK_RTOL


def facenet_keys():
    recorded = json.loads((Path(__file__).parent / "facenet_keys.json").read_text())
    return {key: tuple(shape) for key, shape in recorded.items()}


def shapes(module):
    return {
        key: tuple(tensor.shape)
        for key, tensor in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def test_face_network_has_the_keys_and_shapes_of_facenet_pytorch():
    recorded = facenet_keys()
    with torch.device("meta"):
        assert shapes(inception_resnet_v1(num_classes=8631)) == recorded
        embedding = shapes(inception_resnet_v1_embedding())
    assert embedding == {key: shape for key, shape in recorded.items() if not key.startswith("logits.")}


@pytest.mark.parametrize("classify", [False, True])
def test_logits_equal_facenet_pytorch(classify, monkeypatch):
    if "requests" not in sys.modules:  # it downloads with it, which nothing here does
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
        adapters = types.SimpleNamespace(HTTPAdapter=None)
        monkeypatch.setitem(sys.modules, "requests.adapters", adapters)
    facenet = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    with torch.device("meta"):
        reference = facenet.InceptionResnetV1(classify=classify, num_classes=5)
    reference = filled(reference)
    ours = with_weights_of(
        reference, (lambda: inception_resnet_v1(5)) if classify else inception_resnet_v1_embedding
    )
    with torch.inference_mode():
        assert relative_difference(ours(image()), reference(image())) < SAME_NETWORK_RTOL


def test_embeddings_have_unit_length():
    with torch.device("meta"):
        network = inception_resnet_v1_embedding()
    network = filled(network)
    with torch.inference_mode():
        torch.testing.assert_close(network(image(n=2)).norm(dim=1), torch.ones(2))


# --- the papers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (inception_v3, 23_834_568),  # torchvision's 27,161,264 less the auxiliary head
        (inception_v4, 42_679_816),  # timm
        (inception_resnet_v2, 55_843_464),  # timm
        (inception_resnet_v1_embedding, 23_482_624),  # facenet-pytorch
    ],
)
def test_parameter_counts_of_the_public_networks(build, count):
    with torch.device("meta"):
        assert n_parameters(build()) == count


@pytest.mark.parametrize("build", [inception_v2, inception_v3])
def test_inception_has_less_than_25_million_parameters(build):
    """arXiv 1512.00567, abstract."""
    with torch.device("meta"):
        assert n_parameters(build()) < 25e6


def test_multiply_adds_of_inception_v3():
    """5.713 G is what torchvision publishes of its own."""
    with torch.device("meta"):
        network = inception_v3().eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 299, 299))
    assert counter.get_total_flops() / 2 == pytest.approx(5.713e9, rel=1e-3)


@pytest.mark.parametrize(
    ("build", "blocks", "widths"),
    [
        (inception_resnet_v1_paper, (5, 10, 5), (256, 896, 1792)),
        (inception_resnet_v2_paper, (5, 10, 5), (384, 1152, 2144)),
        (inception_resnet_v2, (10, 20, 10), (320, 1088, 2080)),
    ],
)
def test_residual_blocks_of_each_stage(build, blocks, widths):
    with torch.device("meta"):
        network = build()
    up = [module for name, module in network.named_modules() if name.endswith("conv2d")]
    counted = tuple(sum(module.out_channels == width for module in up) for width in widths)
    assert counted == blocks
    assert len(up) == sum(blocks)


def test_residual_scale_is_a_parameter_of_each_stage():
    with torch.device("meta"):
        network = inception_resnet_v2_paper(scales=(0.11, 0.22, 0.33))
    assert [row.scale for row in residual_rows(network.path)] == [0.11] * 5 + [0.22] * 10 + [0.33] * 5
    assert all(row.relu for row in residual_rows(network.path))


def test_only_the_last_block_of_the_public_checkpoints_is_linear():
    with torch.device("meta"):
        rows = list(residual_rows(inception_resnet_v2().path))
    assert [row.relu for row in rows] == [True] * 39 + [False]
    assert rows[-1].scale == 1.0


@pytest.mark.parametrize("build", IMAGENET)
def test_low_resolution_variants_keep_the_last_grid(build):
    """arXiv 1512.00567, section 8: the cost stays because the grids do."""
    by_size = {}
    for size in (79, 151, 299):
        with torch.device("meta"):
            network = build(input_size=size).eval()
            features = TableModule.forward(network, torch.zeros(1, 3, size, size))
        assert features.shape[2:] == (8, 8)
        by_size[size] = shapes(network)
    assert by_size[79] == by_size[151] == by_size[299]


@pytest.mark.parametrize("build", IMAGENET)
def test_without_the_variant_79_pixels_end_in_one_cell(build):
    """What the variant is for; and the plain stem still works, so a checkpoint trained so can run."""
    with torch.device("meta"):
        features = TableModule.forward(build(input_size=299).eval(), torch.zeros(1, 3, 79, 79))
    assert features.shape[2:] == (1, 1)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_registered_network_classifies_at_its_default_size(network):
    with torch.device("meta"):
        module = network.build(network.num_classes, network.input_size).eval()
        size = network.input_size
        assert module(torch.zeros(2, 3, size, size)).shape == (2, network.num_classes)


# --- tables -----------------------------------------------------------------------------------------


def test_a_row_s_name_is_its_state_dict_key():
    module = TableModule(
        (Concat(((conv("left.0", 4, 1), conv("left.1", 5, (1, 7))), (conv("right", 6, 3),))),), 3
    )
    assert {key.rpartition(".bn")[0] for key in module.state_dict() if ".bn." in key} == {
        "left.0",
        "left.1",
        "right",
    }
    assert module.out_channels == 11
    assert module(torch.zeros(2, 3, 9, 9)).shape == (2, 11, 9, 9)
    assert isinstance(module.get_submodule("left.1.conv"), nn.Conv2d)
