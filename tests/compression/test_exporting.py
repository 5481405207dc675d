import os
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import onnxsim
import pytest
import torch
from torch import nn

from kclib.clustering import cluster
from kclib.compression import _precisions, compress, expand, to_onnx
from kclib.compression._exporting import to_program
from kclib.compression._layers import by_codebook
from kclib.errors import InvalidValueError, StorageError
from kclib.kernels import extract
from kclib.models import Model

BOTH = {"scaled": True, "turned": True}
KINDS = {"plain": {}, "scaled": {"scaled": True}, "turned": {"turned": True}, "both": BOTH}
LEVELS = onnxruntime.GraphOptimizationLevel
DISABLED = LEVELS.ORT_DISABLE_ALL
FOLDING = [
    LEVELS.ORT_ENABLE_BASIC,
    LEVELS.ORT_ENABLE_EXTENDED,
    LEVELS.ORT_ENABLE_LAYOUT,
    LEVELS.ORT_ENABLE_ALL,
]
FLOATS = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


class Beside(nn.Module):
    """Networks that see the same images; their answers lie one after the other."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.cat([network(x).flatten(1) for network in self.networks], 1)


class Undecided(nn.Module):
    """A network that looks at its answers before it gives them."""

    def __init__(self, *messages):
        super().__init__()
        self.convolution, self.messages = nn.Conv2d(3, 4, 3), messages

    def forward(self, x):
        y = self.convolution(x)
        if self.messages:
            raise ValueError(*self.messages)
        return y if y.sum() > 0 else -y


class Twice(nn.Module):
    """A network that has one convolution in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.alias = self.first
        self.other = nn.Conv2d(3, 3, 3, dilation=2)
        self.other.weight = self.first.weight

    def forward(self, x):
        return self.other(self.alias(self.first(x)))


def two_layers():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()


def of_every_geometry():
    torch.manual_seed(0)
    return Beside(
        nn.ConvTranspose2d(3, 6, 3, groups=3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(3, 2, 3, dilation=2),
        *plain_geometries(),
    ).eval()


def plain_geometries():
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    normed[1].running_mean.normal_()
    normed[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(normed[1].weight)
    return (
        nn.Conv2d(3, 6, 3, groups=3, stride=2),
        nn.Conv2d(3, 3, 3, groups=3, bias=False),
        nn.Conv2d(3, 4, 3, padding=(2, 1), dilation=(2, 1)),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        Twice(),
        normed,
        nn.Conv2d(3, 2, 1),
    )


def compressed(network, n_clusters, *, precision=None, block_bytes=1 << 20, **options):
    result = cluster(extract(network), n_clusters, **options)
    return compress(network, result, precision=precision, block_bytes=block_bytes)


def written(network, path, shape=(3, 8, 8), **options):
    """Return where an ONNX file lies that the checker finds nothing wrong with."""
    assert to_onnx(network, path, shape, **options) == path
    onnx.checker.check_model(path, full_check=True)
    return path


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def assert_answers_alike(network, path, shape=(3, 8, 8), batches=(1, 5), dtype=torch.float32, share=1e-4):
    """Compare onnxruntime's answers with torch's; what they may differ by is a share of the largest."""
    for batch in batches:
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).to(dtype)
        with torch.no_grad():
            expected = network(images).numpy()
        found = onnxruntime.InferenceSession(path).run(None, {"image": images.numpy()})[0]
        assert found.dtype == expected.dtype
        largest = np.abs(expected).max()
        assert largest > 0.01
        np.testing.assert_allclose(found, expected, rtol=0, atol=share * largest)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_onnxruntime_answers_like_torch_at_every_precision_and_scope(options, tmp_path):
    torch.manual_seed(0)
    dense = two_layers()
    scopes = [("layer", "global")[(i + len(options)) % 2] for i in range(1, 6)]
    parts = zip(_precisions.PRECISIONS, scopes, strict=True)
    networks = [compressed(dense, 7, precision=kind, scope=scope, **options) for kind, scope in parts]
    path = written(Beside(*networks), tmp_path / "model.onnx")
    assert_answers_alike(Beside(*networks), path)
    types = {name: tensor.data_type for name, tensor in initializers(path).items()}
    for i, precision in enumerate(_precisions.PRECISIONS):
        codebooks = [x for n, x in types.items() if n.startswith(f"networks.{i}.") and n.endswith("values")]
        n_codebooks = {"layer": 2, "global": 1}[scopes[i]]
        assert codebooks == [FLOATS.get(precision, onnx.TensorProto.INT8)] * n_codebooks


def test_every_geometry_answers_alike_with_any_number_of_images(tmp_path):
    network = compressed(of_every_geometry(), 5, precision="int8", scope="global", block_bytes=1, **BOTH)
    path = written(network, tmp_path / "model.onnx")
    assert_answers_alike(network, path, batches=(1, 5))
    indices = [name for name in initializers(path) if name.endswith("indices")]
    assert len(indices) == 9, "of ten layers of 3×3 two share theirs"


def test_indices_have_the_smallest_standard_type_that_holds_them(tmp_path):
    torch.manual_seed(0)
    n_clusters = {f"networks.{i}": k for i, k in enumerate([1, 2, 256, 257])}
    plain = compressed(Beside(*(nn.Conv2d(18, 20, 3, bias=False) for _ in n_clusters)), n_clusters)
    n_clusters = {"networks.0": 32, "networks.1": 33, "networks.2": 8193}
    layers = nn.Conv2d(18, 20, 3, bias=False), nn.Conv2d(18, 20, 3), nn.Conv2d(18, 460, 3)
    turned = compressed(Beside(*layers), n_clusters, turned=True)
    network = Beside(plain, turned)
    path = written(network, tmp_path / "model.onnx", (18, 4, 4))
    types = {n: t.data_type for n, t in initializers(path).items() if n.endswith("indices")}
    small, middle, large = onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.INT32
    assert [types[name] for name in sorted(types)] == [small, small, small, middle, small, middle, large]
    assert_answers_alike(network, path, (18, 4, 4), batches=(2,))


def test_half_precision_network_answers_like_torch(tmp_path):
    torch.manual_seed(0)
    network = compressed(two_layers().half(), 7, **BOTH)
    path = written(network, tmp_path / "model.onnx")
    try:
        onnxruntime.InferenceSession(path)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        pytest.skip(f"this onnxruntime has no float16 convolution: {error}")
    assert_answers_alike(network, path, dtype=torch.float16, share=2e-3)
    assert not [name for name, t in initializers(path).items() if t.data_type == onnx.TensorProto.FLOAT]


def test_a_convolution_may_be_the_whole_network(tmp_path):
    network = compressed(nn.Conv2d(3, 6, 3), 4)
    path = written(network, tmp_path / "new" / "model.onnx")
    assert_answers_alike(network, path)
    assert {"indices", "codebook.values", "bias"} <= set(initializers(path))


def test_dense_export_holds_dense_weights_and_answers_alike(tmp_path):
    network = compressed(two_layers(), 3, **BOTH)
    path = written(network, tmp_path / "model.onnx", dense=True)
    assert_answers_alike(network, path)
    assert {name: tuple(tensor.dims) for name, tensor in initializers(path).items()} == {
        name: tuple(value.shape) for name, value in two_layers().state_dict().items()
    }


def test_network_that_is_not_compressed_is_exported_too(tmp_path):
    network = two_layers()
    path = written(network, tmp_path / "model.onnx")
    assert_answers_alike(network, path)
    assert "Slice" not in [node.op_type for node in onnx.load(path).graph.node]


def test_network_is_left_as_it_was_and_exported_as_it_answers_in_evaluation(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    network = compressed(dense, 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = written(network, tmp_path / "model.onnx")
    to_program(network, tmp_path / "model.pt2", (3, 8, 8))
    assert [module.training for module in network.modules()] == [True] * len(list(network.modules()))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert_answers_alike(expand(network).eval(), path)


@pytest.fixture(scope="module")
def large():
    """A network of about 300 kB."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module", params=[("plain", "fp32", 16), ("both", "int8", 400)], ids=["plain", "both"])
def exported(request, large, tmp_path_factory):
    """A compressed network and its file, with few representatives or with many; how it is compressed."""
    kind, precision, k = request.param
    network = compressed(large, k, precision=precision, **KINDS[kind])
    return network, written(network, tmp_path_factory.mktemp("exported") / "model.onnx"), (kind, precision)


def optimized(path, level, out):
    """Return the bytes of the model as onnxruntime would keep it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, str(out)
    options.log_severity_level = 3  # it warns that what it wrote is made for this machine
    onnxruntime.InferenceSession(path, options)
    return out.stat().st_size


def simplified(path, out):
    model, _ = onnxsim.simplify(onnx.load(path))
    onnx.save(model, out)
    return out


def unguarded(path, out):
    """Return the same graph with the initializers read as they are."""
    model = onnx.load(path)
    graph = model.graph
    through = {node.output[0]: node.input[0] for node in graph.node if "guard_start" in node.input}
    assert through
    nodes = [node for node in graph.node if node.output[0] not in through]
    nodes = [node for node in nodes if node.output[0] not in ("guard_batch", "guard_start")]
    for node in nodes:
        node.input[:] = [through.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)
    return out


def test_file_takes_indices_codebooks_the_rest_and_little_else(exported, large):
    network, path, (kind, precision) = exported
    indices = codebooks = scales = 0
    for codebook, members in by_codebook(network):
        n = sum(module.n_kernels for module in members.values())
        indices += n * (1 if codebook.n_members <= 256 else 2)
        codebooks += _precisions.codebook_bytes(len(codebook.values), 9, precision)
        scales += n * _precisions.scale_type(precision).itemsize * (kind != "plain")
    weights = {f"{name}.weight" for name in ("0", "3", "5")}
    rest = sum(x.nbytes for name, x in large.state_dict().items() if name not in weights)
    least = indices + codebooks + scales + rest - 8  # batch norm's counter of batches is not exported
    assert least < path.stat().st_size < least + 24_000
    assert path.stat().st_size < 0.3 * sum(x.nbytes for x in large.state_dict().values())


@pytest.mark.parametrize("level", [DISABLED, *FOLDING], ids=lambda level: level.name)
def test_file_stays_small_when_onnxruntime_has_optimized_it(exported, level, tmp_path):
    _, path, _ = exported
    assert optimized(path, level, tmp_path / "optimized.onnx") < 1.1 * path.stat().st_size


def test_file_stays_small_when_onnxsim_and_then_onnxruntime_have_optimized_it(exported, tmp_path):
    network, path, _ = exported
    simple = simplified(path, tmp_path / "simple.onnx")
    assert simple.stat().st_size < 1.1 * path.stat().st_size
    for level in (DISABLED, *FOLDING):
        assert optimized(simple, level, tmp_path / "optimized.onnx") < 1.1 * path.stat().st_size
    assert_answers_alike(network, simple)
    assert_answers_alike(network, tmp_path / "optimized.onnx")


def test_file_without_the_guard_would_grow_under_each_optimizer(exported, large, tmp_path):
    _, path, _ = exported
    bare = unguarded(path, tmp_path / "bare.onnx")
    dense = sum(large[i].weight.nbytes for i in (0, 3, 5))
    assert bare.stat().st_size < path.stat().st_size
    for level in FOLDING:
        assert optimized(bare, level, tmp_path / "optimized.onnx") > dense
    assert simplified(bare, tmp_path / "simple.onnx").stat().st_size > dense


@pytest.mark.parametrize(
    ("write", "name"), [(to_onnx, "model.onnx"), (to_program, "model.pt2")], ids=["onnx", "program"]
)
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Undecided(), (3, 8, 8)),
        (two_layers(), (4, 8, 8)),
        (Undecided(""), (3, 8, 8)),
    ],
    ids=["undecided", "channels", "wordless"],
)
def test_what_torch_cannot_export_is_refused_in_one_sentence_and_leaves_no_file(
    write, name, network, shape, tmp_path
):
    network = compressed(network, 3)
    with pytest.raises(InvalidValueError, match="could not export") as e:
        write(network, tmp_path / name, shape)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("write", "place"), [(to_onnx, "onnx.save"), (to_program, "torch.export.save")], ids=["onnx", "program"]
)
def test_a_file_half_written_is_not_left_in_the_place_of_the_old_one(write, place, monkeypatch, tmp_path):
    def save(model, file):
        with open(file, "wb") if isinstance(file, os.PathLike) else file as opened:
            opened.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, save)
    (tmp_path / "model").write_text("old")
    with pytest.raises(StorageError, match=r"model could not be written.*No space"):
        write(compressed(two_layers(), 3), tmp_path / "model", (3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_text() == "old"


@pytest.mark.parametrize(
    ("dense", "options", "precision"),
    [
        (Beside(*plain_geometries()), {}, "fp16"),
        (Beside(*plain_geometries()), BOTH, "int8"),
        (nn.ConvTranspose2d(3, 6, 3, groups=3, stride=2, padding=1, output_padding=1), BOTH, "int8"),
        (nn.ConvTranspose2d(3, 2, 3, dilation=2), {}, "fp32"),
    ],
    ids=["plain", "both", "transposed groups", "transposed"],
)
def test_program_answers_like_the_expanded_network_to_the_bit(dense, options, precision, tmp_path):
    network = compressed(dense.eval(), 5, precision=precision, scope="global", **options)
    path = to_program(network, tmp_path / "model.pt2", (3, 8, 8))
    program = torch.export.load(path).module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(program(images), expand(network)(images))


def test_program_of_a_half_precision_network_takes_half_precision_images(tmp_path):
    network = compressed(two_layers().bfloat16(), 7, scaled=True)
    program = torch.export.load(to_program(network, tmp_path / "model.pt2", (3, 8, 8))).module()
    images = torch.randn(3, 3, 8, 8).bfloat16()
    assert torch.equal(program(images), expand(network)(images))


class Answering(nn.Module):
    """A network that wraps its answer."""

    def __init__(self, wrap):
        super().__init__()
        self.convolution, self.wrap = nn.Conv2d(3, 4, 3), wrap

    def forward(self, pixels=None, labels=None, return_dict=True):
        y = self.convolution(pixels)
        return self.wrap(pixels, y.mean((2, 3)), y)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Mapped(OrderedDict):
    """A mapping of its own class, as Hugging Face's outputs are."""


Fields = namedtuple("Fields", "scores maps")
ANSWERS = {
    "mapping": (lambda x, y, z: {"out": z, "aux": y}, ["out", "aux"]),
    "named tuple": (lambda x, y, z: Fields(y, z), ["scores", "maps"]),
    "tuple": (lambda x, y, z: (y, [z, x]), ["logits", "output_1_0", "output_1_1"]),
    "one of a tuple": (lambda x, y, z: (y, None, 3), ["logits"]),
    "mapping of its own class": (lambda x, y, z: Mapped(logits=y, states=(z,)), ["logits", "states_0"]),
    "dataclass": (lambda x, y, z: Output(y), ["logits"]),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_any_kind_are_outputs_with_names(tmp_path, kind):
    wrap, names = ANSWERS[kind]
    network = compressed(Answering(wrap).eval(), 3)
    session = onnxruntime.InferenceSession(written(network, tmp_path / "a.onnx"))
    assert [output.name for output in session.get_outputs()] == names
    images = torch.randn(3, 3, 8, 8)
    program = torch.export.load(to_program(network, tmp_path / "a.pt2", (3, 8, 8))).module()(images)
    program = {"logits": program} if torch.is_tensor(program) else program
    found = session.run(None, {"image": images.numpy()})
    y = network.convolution(images)
    expected = dict(zip(names, wrap_flat(kind, images, y.mean((2, 3)), y), strict=True))
    for name, value in zip(names, found, strict=True):
        np.testing.assert_allclose(value, expected[name].detach(), atol=1e-5)
        torch.testing.assert_close(program[name], expected[name], rtol=1e-5, atol=1e-5)


def wrap_flat(kind, x, y, z):
    """Return the tensors of an answer one after the other, by hand."""
    return {
        "mapping": [z, y],
        "named tuple": [y, z],
        "tuple": [y, z, x],
        "mapping of its own class": [y, z],
    }.get(kind, [y])


@pytest.mark.parametrize(
    "wrapped",
    [nn.DataParallel, lambda x: torch.compile(x, backend="eager"), torch.optim.swa_utils.AveragedModel],
    ids=["parallel", "compiled", "averaged"],
)
def test_wrapped_networks_and_models_are_exported(tmp_path, wrapped):
    network = compressed(wrapped(two_layers()).eval(), 3)
    model = Model("wrapped", network, None)
    images = torch.randn(2, 3, 8, 8)
    session = onnxruntime.InferenceSession(written(model, tmp_path / "a.onnx"))
    (found,) = session.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(found, network(images).detach(), atol=1e-5)


def test_hooks_and_attributes_of_convolutions_are_exported(tmp_path):
    network = two_layers()
    network[0].register_buffer("mask", torch.rand(6, 1, 1))
    network[0].register_forward_hook(lambda module, given, answer: answer * module.mask)
    network = compressed(network, 3)
    assert_answers_alike(network, written(network, tmp_path / "a.onnx"))


def test_a_network_that_answers_no_tensor_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="no tensor"):
        to_onnx(Answering(lambda x, y, z: None), tmp_path / "a.onnx", (3, 8, 8))
