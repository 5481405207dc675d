import contextlib
import copy
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from disks import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kclib import clustering, compression, loading, models
from kclib.clustering import _scopes
from kclib.compression import _checkpoint, _container, _layers, _packing, load, save
from kclib.compression import _precisions as compression_precisions
from kclib.compression._container import inspect
from kclib.compression._precisions import PRECISIONS, quantize, restore, scale_type, store
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    KclibError,
    MissingFileError,
    StorageError,
    UnknownNameError,
)
from kclib.kernels import extract
from kclib.kernels._copying import copied
from kclib.kmeans import _entropy as kmeans_entropy
from kclib.models import _loading


class Odd(nn.Module):
    """Passes its input on; keeps buffers of several kinds, some of which no state dict has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("mask", torch.rand(2, 2) > 0.5, persistent=False)
        self.register_buffer("empty", torch.empty(0, 2))
        self.register_buffer("none", None)
        self.again = nn.Parameter(torch.randn(()), requires_grad=False)

    def forward(self, x):
        return x


PARTS = {
    "plain": lambda first: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "groups": lambda first: nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect"),
    "depthwise": lambda first: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
    "transposed": lambda first: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "transposed groups": lambda first: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2, bias=False),
    "shared": lambda first: first,
    "tied": lambda first: tied(nn.Conv2d(4, 4, 3, padding=1), first, "weight"),
    "tied transposed": lambda first: tied(nn.ConvTranspose2d(4, 4, 3, padding=1), first, "weight"),
    "tied bias": lambda first: tied(nn.Conv2d(4, 4, 3, padding=1), first, "bias"),
    "1x1 tied bias": lambda first: tied(nn.Conv2d(4, 4, 1), first, "bias"),
    "5x5": lambda first: nn.Conv2d(4, 4, 5, padding=2),
    "norm": lambda first: moved(nn.BatchNorm2d(4)),
    "odd": lambda first: Odd(),
}


def tied(module, other, name):
    setattr(module, name, getattr(other, name))
    return module


def moved(norm):
    """Return a batch norm whose buffers are not what they begin as."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked += 7
    return norm


def built(*parts, seed=0, dtype=torch.float32):
    """Return a network of a first 3×3 convolution, the named parts, and two linear layers of one weight."""
    torch.manual_seed(seed)
    first = nn.Conv2d(4, 4, 3, padding=1)
    body = [first, *(PARTS[part](first) for part in parts), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    head = nn.Linear(4, 4)
    return nn.Sequential(*body, head, tied(nn.Linear(4, 4), head, "weight")).to(dtype).eval()


def compressed(network, n_clusters=3, *, size=None, precision=None, **options):
    found = clustering.cluster(
        extract(network, size=size), n_clusters, n_threads=1, progress=False, **options
    )
    return compression.compress(network, found, precision=precision)


def noted(network):
    """Return what is noted of how parameters are stored, by module."""
    return {
        name: getattr(module, "stored_as", None)
        for name, module in network.named_modules(remove_duplicate=False)
    }


def by_hand(network, n_clusters, *, size=None, skew=0.5, scale=1.0, precision=None):
    """Return the compressed network for one global clustering that no distance had a part in.

    Of its representatives, the i-th is used with a share of about ``skew ** i``.
    """
    bank = extract(network, size=size)
    draw = np.random.default_rng(0)
    codebook = (scale * draw.normal(size=(n_clusters, *bank.size))).astype(np.float32)
    shares = skew ** np.arange(n_clusters)
    indices = draw.choice(n_clusters, len(bank), p=shares / shares.sum()).astype(np.int32)
    group = clustering.Group("global", bank.layers, codebook, indices, 0.0)
    found = clustering.Clustering((group,), "global", 0)
    return compression.compress(network, found, precision=precision)


def tensors(network):
    named = (network.named_parameters, network.named_buffers)
    return dict(pair for each in named for pair in each(remove_duplicate=False))


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def sharing(network):
    """Return the sets of names under which one module, parameter or buffer is found."""
    places = defaultdict(set)
    for name, value in (*network.named_modules(remove_duplicate=False), *tensors(network).items()):
        places[id(value)].add(name)
    return set(map(frozenset, places.values()))


def assert_same(found, expected):
    """Check that two networks have the same state to the bit, shared in the same places."""
    found_bits, expected_bits = ({n: bits(x) for n, x in tensors(y).items()} for y in (found, expected))
    assert found_bits == expected_bits
    assert sharing(found) == sharing(expected)
    pairs = zip(_layers.by_codebook(found), _layers.by_codebook(expected), strict=True)
    for (ours, members), (theirs, other_members) in pairs:
        assert list(members) == list(other_members)
        assert [type(ours), ours.precision, ours.turned, ours.seed, ours.n_members] == [
            type(theirs), theirs.precision, theirs.turned, theirs.seed, theirs.n_members
        ]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


@pytest.fixture
def dense():
    """A network small enough for a file of a few kilobytes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).eval()


@pytest.fixture
def small(dense, path):
    """What was saved at `path`."""
    network = compressed(dense, 5, scope="global")
    save(network, path, indices="fixed")
    return network


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_network_comes_back_to_the_bit_and_shared_as_it_was(tmp_path_factory, data):
    parts = data.draw(st.lists(st.sampled_from(sorted(PARTS)), max_size=5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    precisions = [None, *PRECISIONS][: None if dtype == torch.float32 else 4]
    network = built(*parts, dtype=dtype)
    bank = extract(network, size=3)
    scope = data.draw(st.sampled_from(["layer", "global", "mapping"]))
    if scope == "mapping":
        scope = {layer.name: data.draw(st.sampled_from(["left", "right side", "é"])) for layer in bank.layers}
    largest = max(sum(x.n_kernels for x in g) for g in _scopes.grouping(bank, scope).values())
    expected = compressed(
        network,
        data.draw(st.sampled_from([1, 2, 5, largest])),
        size=3,
        precision=data.draw(st.sampled_from(precisions)),
        scope=scope,
        scaled=data.draw(st.booleans()),
        turned=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 9)),
    )
    if dtype == torch.float32:
        linear, biases = data.draw(st.sampled_from([(None, None), ("int8", "fp16"), ("int4", "bf16")]))
        expected = quantize(expected, linear=linear, biases=biases)
    path, again = (tmp_path_factory.getbasetemp() / f"any {i}.safetensors" for i in range(2))
    coding = data.draw(st.sampled_from(_checkpoint.CODINGS))
    saved = save(expected, path, indices=coding)
    found = load(path, architecture=built(*parts, seed=1)).network
    assert_same(found, expected)
    assert noted(found) == noted(expected)
    images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert bits(found(images)) == bits(expected(images))
    assert save(found, again, indices=coding).sha256 == saved.sha256 == inspect(path).sha256
    assert saved.bytes.sum() == path.stat().st_size


@pytest.mark.parametrize("indices", _checkpoint.CODINGS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_network_of_everything_comes_back(path, indices, scope):
    expected = compressed(built(*PARTS), 4, size=3, scope=scope, scaled=True, turned=True, precision="bf16")
    save(expected, path, indices=indices)
    found = load(path, architecture=built(*PARTS, seed=1)).network
    assert_same(found, expected)
    assert found[0].bias is found[9].bias is found[10].bias
    assert found[0].indices is found[7].indices
    assert found[-1].weight is found[-2].weight


@pytest.mark.parametrize("indices", _checkpoint.CODINGS)
def test_a_loaded_network_is_saved_to_the_same_bytes(tmp_path, indices):
    save(by_hand(built("plain", "norm", "groups"), 7), tmp_path / "one", indices=indices, accuracy=91.5)
    for _ in range(8):
        network = load(tmp_path / "one", architecture=built("plain", "norm", "groups")).network
        save(network, tmp_path / "two", indices=indices, accuracy=91.5)
        assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.parametrize("n_clusters", [1, 6])
def test_kernels_that_are_not_square_come_back(path, n_clusters):
    expected = compressed(nn.Sequential(nn.Conv2d(2, 3, (3, 5))), n_clusters, size=(3, 5), scaled=True)
    save(expected, path)
    assert_same(load(path, architecture=nn.Sequential(nn.Conv2d(2, 3, (3, 5)))).network, expected)


def test_a_network_that_is_one_convolution_comes_back(path):
    expected = compressed(nn.Conv2d(2, 3, 3))
    save(expected, path)
    assert_same(load(path, architecture=nn.Conv2d(2, 3, 3)).network, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e-38, 1e-40])
def test_an_int8_codebook_of_next_to_nothing_comes_back(path, scale):
    """Dead kernels are not zero, but as near to it as weight decay took them."""
    dense = nn.Conv2d(8, 8, 3)
    expected = by_hand(dense, 1000, scale=scale, precision="int8")
    save(expected, path)
    assert_same(load(path, architecture=dense).network, expected)


def test_two_codebooks_of_one_name_come_back_each_to_its_layers(path):
    dense = built("5x5", "plain", "5x5")
    expected = compressed(compressed(dense, 3, size=3, scope="global"), 2, size=5, scope="global")
    assert {module.codebook.group for module in _layers.clustered(expected).values()} == {"global"}
    contents = save(expected, path)
    assert contents.groups.clusters.to_dict() == {"global": 3, "global 2": 2}
    assert contents.layers.group.to_dict() == dict(
        zip("0123", ["global", "global 2", "global", "global 2"], strict=True)
    )
    found = load(path, architecture=dense).network
    assert_same(found, expected)
    assert save(found, path).sha256 == contents.sha256


@pytest.mark.parametrize(
    "name", ["a b", "", "{}", "{part}", "{", "}", "%s", "layer 0", "values 0", "é\n\"'\\"]
)
def test_a_group_may_have_any_name(path, dense, name):
    expected = compressed(dense, 2, scope={"0": name, "2": "layer"})
    save(expected, path)
    found = load(path, architecture=dense).network
    assert_same(found, expected)
    assert found[0].codebook.group == name


@pytest.mark.parametrize("indices", _checkpoint.CODINGS)
@pytest.mark.parametrize("name", ["a b", "{}", "values", "indices", "é"])
def test_a_layer_may_have_any_name(path, name, indices):
    dense = nn.Sequential(OrderedDict({name: nn.Conv2d(8, 32, 3), f"{name} {name}": nn.Conv2d(8, 32, 3)}))
    expected = by_hand(dense, 4)
    save(expected, path, indices=indices)
    assert_same(load(path, architecture=dense).network, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trained_codebook_is_rounded_to_its_precision_in_the_file_alone(path, dense, precision):
    network = compressed(dense, 4, scope="global", scaled=True, precision=precision)
    with torch.no_grad():
        for value in (network[0].codebook.values, network[0].scales, network[2].scales):
            value += torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
    trained = copy.deepcopy(network)
    save(network, path)
    assert_same(network, trained)
    found = load(path, architecture=dense).network
    rounded = restore(store(trained[0].codebook.values, precision)).float()
    assert torch.equal(found[0].codebook.values, rounded)
    kind = scale_type(precision)
    assert torch.equal(found[2].scales, trained[2].scales.to(kind).float())
    assert torch.equal(rounded, trained[0].codebook.values) == (precision == "fp32")


@pytest.mark.parametrize(
    ("precision", "value"), [("fp32", np.nan), ("bf16", np.inf), ("fp16", 1e5), ("int8", np.nan)]
)
@pytest.mark.parametrize("name", ["codebook.values", "scales"])
def test_what_a_precision_cannot_hold_is_refused_and_the_old_file_stays(path, dense, precision, value, name):
    network = compressed(dense, 4, scaled=True, precision=precision)
    save(network, path)
    before = path.read_bytes()
    with torch.no_grad():
        network.get_parameter(f"0.{name}").view(-1)[0] = value
    with pytest.raises(InvalidValueError, match="no finite"):
        save(network, path)
    assert path.read_bytes() == before


# ---- What becomes of it


def test_packed_is_the_default_and_dense_is_the_expanded_network(path, dense, small):
    packed, loaded = load(path, architecture=dense).network, load(path, architecture=dense, resident="dense")
    assert set(_layers.clustered(packed)) == {"0", "2"}
    assert [type(module) for module in loaded.network] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert_same(loaded.network, compression.expand(small))
    assert not loaded.network.training
    images = torch.randn(2, 2, 8, 8)
    assert torch.equal(loaded.network(images), packed(images))


def test_an_unknown_residence_is_named_before_the_file_is_read(tmp_path):
    with pytest.raises(UnknownNameError, match="'sparse'; known: packed, dense"):
        load(tmp_path / "absent", resident="sparse")


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_all_goes_to_the_device(path, dense, small, resident):
    network = load(path, architecture=dense, resident=resident, device="meta").network
    assert {x.device.type for x in tensors(network).values()} == {"meta"}
    here = load(path, architecture=dense, resident=resident).network
    assert {x.device.type for x in tensors(here).values()} == {"cpu"}


def test_block_bytes_reach_every_layer(path, dense, small):
    for options, expected in (({}, _layers.BLOCK_BYTES), ({"block_bytes": 200}, 200)):
        network = load(path, architecture=dense, **options).network
        assert {x.block_bytes for x in _layers.clustered(network).values()} == {expected}
    assert len(list(network[0].blocks())) > 1
    with pytest.raises(InvalidValueError, match="block_bytes is 0"):
        load(path, architecture=dense, block_bytes=0)


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_a_network_is_loaded_in_eval_mode_whatever_it_and_its_architecture_were_in(path, dense, resident):
    save(compressed(dense.train()), path)
    loaded = load(path, architecture=dense, resident=resident).network
    assert not any(module.training for module in loaded.modules())
    assert all(module.training for module in dense.modules())


def test_a_network_given_as_architecture_lends_its_form_alone(path, dense, small):
    for value in (*dense.parameters(), *dense.buffers()):
        value.data.fill_(torch.nan if value.is_floating_point() else 99)
    before = {name: bits(value) for name, value in tensors(dense).items()}
    loaded = load(path, architecture=dense)
    assert {name: bits(value) for name, value in tensors(dense).items()} == before
    assert [type(module) for module in dense] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert_same(loaded.network, small)
    assert loaded.classes == ()
    with pytest.raises(InvalidValueError, match="reads 2 channels"):
        loaded.preprocess(torch.full((1, 2, 2), 51, dtype=torch.uint8))
    owned = {value.data_ptr() for value in tensors(dense).values()}
    assert owned.isdisjoint({value.data_ptr() for value in tensors(loaded.network).values()})


def test_a_network_on_the_meta_device_will_do(path, dense, small):
    assert_same(load(path, architecture=dense.to("meta")).network, small)


def test_a_model_given_as_architecture_keeps_what_goes_with_it(path, dense, small):
    model = models.Model("mine", dense, str, ("cat", "dog"))
    loaded = load(path, architecture=model)
    assert (loaded.name, loaded.preprocess, loaded.classes) == ("mine", str, ("cat", "dog"))
    assert model.network is dense
    assert_same(loaded.network, small)


@pytest.fixture
def ownnets(tmp_path, monkeypatch):
    """A user's importable module of a factory that fits `small`, and where it was imported."""
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownnets", raising=False)


def test_a_factory_is_used_if_asked_for_but_not_on_a_files_word(path, small, ownnets):
    save(small, path, architecture="ownnets:network")
    with pytest.raises(InvalidValueError, match=r"no module is imported"):
        load(path)
    with pytest.raises(KclibError):
        load(path, architecture="")
    assert "ownnets" not in sys.modules
    loaded = load(path, architecture="ownnets:network")
    assert_same(loaded.network, small)
    assert "ownnets" in sys.modules


def test_the_shipped_network_is_built_from_the_files_word(path):
    original = loading.load_model()
    save(by_hand(original.network, 16), path, architecture="vgg16-fashion", accuracy=91.0)
    loaded = load(path)
    assert (loaded.name, loaded.classes) == ("vgg16-fashion", _loading.FASHION_CLASSES)
    assert_same(loaded.network, by_hand(original.network, 16))
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    assert torch.equal(loaded.preprocess(image), original.preprocess(image))
    assert inspect(path).description["accuracy"] == 91.0


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf"])
def test_torchvisions_networks_are_built_from_the_files_word(path, name):
    expected = by_hand(_loading.architecture(name).network, 4)
    save(expected, path, architecture=name)
    loaded = load(path)
    assert (loaded.name, len(loaded.classes), loaded.network.training) == (name, 1000, False)
    assert_same(loaded.network, expected)


def test_a_name_that_is_given_wins_over_the_files(path):
    expected = by_hand(_loading.architecture("squeezenet1_1").network, 4)
    save(expected, path, architecture="squeezenet1_0")
    loaded = load(path, architecture="squeezenet1_1")
    assert loaded.name == "squeezenet1_1"
    assert_same(loaded.network, expected)


def test_a_file_that_names_no_architecture_or_an_unknown_one_needs_one(path, dense, small):
    with pytest.raises(InvalidValueError, match=r"architecture.*pass the network"):
        load(path)
    save(small, path, architecture="resnet81")
    with pytest.raises(UnknownNameError, match="resnet81"):
        load(path)
    assert_same(load(path, architecture=dense).network, small)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made; other views of one that was there are none."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old, new = (
            [x for x in _pytree.tree_leaves(values) if torch.is_tensor(x) and not x.is_meta]
            for values in ((args, kwargs), result)
        )
        there = {x.untyped_storage().data_ptr() for x in old}
        sizes = [x.nbytes for x in new if x.untyped_storage().data_ptr() not in there]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return result


@contextlib.contextmanager
def measured():
    """Yield an object that has the largest of torch's tensors and the peak of numpy's arrays when it ends."""
    tracemalloc.start()
    try:
        with Largest() as largest:
            yield largest
        largest.peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("indices", _checkpoint.CODINGS)
@pytest.mark.parametrize("given", ["module", "factory"])
def test_no_dense_weight_is_made_on_the_way(path, monkeypatch, indices, given):
    """The weight is 18.9 MB, its unpacked indices 2.1 MB."""
    large = nn.Conv2d(128, 4096, 3)
    save(by_hand(large, 8), path, indices=indices)
    architecture = large
    if given == "factory":  # one of the names that are built on the meta device
        monkeypatch.setattr("kclib.models._loading.vgg16_fashion", lambda: nn.Conv2d(128, 4096, 3))
        architecture = "vgg16-fashion"
    with measured() as packed:
        load(path, architecture=architecture, inputs=False)
    assert packed.nbytes < large.weight.nbytes / 8
    assert packed.peak < large.weight.nbytes / 2
    with measured() as dense:
        load(path, architecture=architecture, resident="dense")
    assert dense.nbytes >= large.weight.nbytes, "the measure is blind"


# ---- What a file says of itself


def test_inspect_tells_groups_layers_and_bytes_without_the_network(path):
    dense = built("tied", "groups", "transposed", "shared", "norm")
    network = compressed(
        dense, 3, scope={"0": "a", "2": "b", "3": "b"}, turned=True, seed=4, precision="int8"
    )
    written = save(network, path, architecture="pack.age:factory", accuracy=90.5, indices="fixed")
    found = inspect(str(path))
    assert (found.path, found.sha256, found.description) == (path, written.sha256, written.description)
    assert (found.description["architecture"], found.description["accuracy"]) == ("pack.age:factory", 90.5)
    shared = {"bits": 5, "precision": "int8", "turned": True, "seed": 4, "dtype": "float32", "clusters": 3}
    assert found.groups.to_dict("index") == {"a": shared | {"kernels": 16}, "b": shared | {"kernels": 24}}
    assert found.layers.to_dict("index") == {
        name: {
            "group": group,
            "shape": [4, n, 3, 3],
            "transposed": name == "3",
            "coding": "fixed",
            "same_as": of,
        }
        for name, group, n, of in (
            ("0", "a", 4, "0"),
            ("1", "a", 4, "0"),
            ("2", "b", 2, "2"),
            ("3", "b", 4, "3"),
        )
    }
    assert found.bytes.to_dict() == {
        "indices": 10 + 5 + 10,  # 5 bits for each of 16, 8 and 16 kernels
        "frequency tables": 0,
        "codebooks": 2 * 3 * (9 + 2),
        "scales": 0,
        "linear weights": 4 * 4 * 4,
        "other parameters and buffers": 4 * (4 * 4 + 16 + 2 * 4) + 8,
        "header": path.stat().st_size - 25 - 66 - 4 * 56 - 8,
    }
    assert found.bytes.equals(written.bytes)


def test_entropy_coded_bytes_are_counted_as_what_they_are(path):
    network = by_hand(nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 32, 3)), 8)
    fixed, entropy = (save(network, path, indices=kind).bytes for kind in ("fixed", "entropy"))
    assert fixed["indices"] == _packing.index_bytes(512, 3) + _packing.index_bytes(2048, 3)
    assert entropy["frequency tables"] > 0
    best = sum(kmeans_entropy.entropy_bytes(np.bincount(x.members())) for x in network)
    assert best * 0.98 < entropy["indices"] < best * 1.02 + 16
    assert entropy["indices"] + entropy["frequency tables"] < 0.8 * fixed["indices"]


def coded_apart(*shifts):
    """Return a network whose layers share a codebook, each with another part of it most in use."""
    dense = nn.Sequential(*(nn.Conv2d(16, 64, 3) for _ in shifts))
    network = by_hand(dense, 16)
    for module, shift in zip(network, shifts, strict=True):
        module.indices = torch.from_numpy(_packing.pack((module.members() + shift) % 16, 4))
    return dense, network


def test_layers_that_use_a_codebook_alike_share_frequencies_and_others_have_their_own(path):
    cases = (
        ((0, 0, 0), {"group"}),
        ((0, 5, 10), {"layer"}),
        ((*[0] * 12, 8), {"group", "layer"}),
    )
    for shifts, expected in cases:
        dense, network = coded_apart(*shifts)
        assert set(save(network, path).layers.coding) == expected
        names = _container.read(path)[2]
        assert ("frequencies group global" in names) == ("group" in expected)
        assert_same(load(path, architecture=dense).network, network)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 20),
    st.floats(0.1, 1),
)
def test_entropy_coding_never_takes_more_than_fixed_width(tmp_path_factory, shapes, n_clusters, skew):
    path = tmp_path_factory.getbasetemp() / "never larger.safetensors"
    dense = nn.ModuleList(nn.Conv2d(*shape, 3) for shape in shapes)
    network = by_hand(dense, n_clusters, skew=skew)
    fixed, entropy = (save(network, path, indices=kind).bytes for kind in ("fixed", "entropy"))
    parts = ["indices", "frequency tables"]
    assert entropy[parts].sum() <= fixed[parts].sum()
    assert_same(load(path, architecture=dense).network, network)


def test_what_is_not_compressed_or_coded_unheard_of_is_refused(path, dense, small):
    before = path.read_bytes()
    for network in (dense, compression.expand(small), nn.Linear(2, 2)):
        with pytest.raises(InvalidValueError, match="compress it first"):
            save(network, path)
    with pytest.raises(UnknownNameError, match="'huffman'; known: entropy, fixed"):
        save(small, path, indices="huffman")
    assert path.read_bytes() == before


@pytest.mark.parametrize("accuracy", [91, 91.5, np.float32(91.5), np.float64(91.5), None])
def test_accuracy_may_be_any_number(path, small, accuracy):
    assert save(small, path, accuracy=accuracy).description["accuracy"] == accuracy
    assert inspect(path).description["accuracy"] == accuracy


def test_a_seed_may_be_numpys(path, dense):
    save(compressed(dense, seed=np.int64(3)), path)
    assert set(inspect(path).groups.seed) == {3}


# ---- Files that are not what was saved


def test_no_changed_byte_goes_unseen(path, dense, small):
    whole = path.read_bytes()
    architecture = dense.to("meta")
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(KclibError):
            load(path, architecture=architecture)


def test_a_file_cut_anywhere_is_damaged(path, dense, small):
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 13), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=path.name):
            load(path, architecture=dense)


def test_what_is_no_compressed_model_is_refused(path, dense):
    with pytest.raises(MissingFileError, match="does not exist or is not a file"):
        load(path)
    with pytest.raises(MissingFileError, match="does not exist or is not a file"):
        load(path.parent)
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(np.random.default_rng(0).bytes(3000)),
        lambda: save_file(dense.state_dict(), path),
        lambda: torch.save(dense, path),
    ):
        write()
        with pytest.raises(DamagedFileError, match=path.name):
            load(path, architecture=dense)


def rewritten(path, change):
    """Change a file's description and tensors; its hash is right again."""
    description, _, tensors = _container.read(path)
    change(description, tensors)
    _container.write(path, description, tensors)


def setting(*place, to):
    """Return the change that sets one value of a description."""

    def change(description, _):
        for key in place[:-1]:
            description = description[key]
        description[place[-1]] = to

    return change


def removing(*place):
    def change(description, _):
        for key in place[:-1]:
            description = description[key]
        del description[place[-1]]

    return change


def tensor(name, to):
    """Return the change that replaces one tensor by what becomes of it."""
    return lambda _, tensors: tensors.update({name: to(tensors[name])})


def without(name):
    return lambda _, tensors: tensors.pop(name)


def first_is(value):
    return lambda old: torch.cat([torch.full_like(old.flatten()[:1], value), old.flatten()[1:]]).view(
        old.shape
    )


def both(*changes):
    def change(description, tensors):
        for each in changes:
            each(description, tensors)

    return change


VALUES = "codebook values global"
DAMAGED = {
    "no groups": removing("groups"),
    "groups null": setting("groups", to=None),
    "groups a list": setting("groups", to=["global"]),
    "groups of a list": setting("groups", "global", to=[1, 2]),
    "group null": setting("groups", "global", to=None),
    "group unused without codebook": setting("groups", "other", to={}),
    "no layers": removing("layers"),
    "layers null": setting("layers", to=None),
    "layers a list": setting("layers", to=["0", "2"]),
    "layers a string": setting("layers", to="02"),
    "layer null": setting("layers", "0", to=None),
    "layer a list": setting("layers", "0", to=[]),
    "layer of unknown group": setting("layers", "0", "group", to="elsewhere"),
    "layer of group null": setting("layers", "0", "group", to=None),
    "layer of a list for a group": setting("layers", "0", "group", to=["global"]),
    "shape null": setting("layers", "0", "shape", to=None),
    "shape missing": removing("layers", "0", "shape"),
    "coding missing": removing("layers", "0", "coding"),
    "coding unheard of": setting("layers", "0", "coding", to="huffman"),
    "coding null": setting("layers", "0", "coding", to=None),
    "coded where fixed": setting("layers", "0", "coding", to="layer"),
    "same as unknown": setting("layers", "0", "same_as", to="elsewhere"),
    "same as null": setting("layers", "0", "same_as", to=None),
    "same as a list": setting("layers", "0", "same_as", to=["0"]),
    "dtype a function": setting("groups", "global", "dtype", to="system"),
    "dtype a module": setting("groups", "global", "dtype", to="hub"),
    "dtype a deprecated name": setting("groups", "global", "dtype", to="has_mps"),
    "dtype of whole numbers": setting("groups", "global", "dtype", to="int8"),
    "dtype null": setting("groups", "global", "dtype", to=None),
    "dtype a list": setting("groups", "global", "dtype", to=["float32"]),
    "precision missing": removing("groups", "global", "precision"),
    "turned, and so of wider indices": setting("groups", "global", "turned", to=True),
    "indices missing": without("indices 0"),
    "indices beyond K": tensor("indices 0", lambda old: torch.full_like(old, 255)),
    "indices short": tensor("indices 0", lambda old: old[:-1]),
    "indices long": tensor("indices 0", lambda old: torch.cat([old, old[:1]])),
    "indices signed": tensor("indices 0", lambda old: old.view(torch.int8)),
    "indices of truths": tensor("indices 0", lambda old: old.bool()),
    "indices of several axes": tensor("indices 0", lambda old: old[:, None]),
    "indices of no axis": tensor("indices 0", lambda old: old[0]),
    "codebook missing": without(VALUES),
    "codebook NaN": tensor(VALUES, first_is(torch.nan)),
    "codebook infinite": tensor(VALUES, first_is(-torch.inf)),
    "codebook of larger kernels": tensor(VALUES, lambda old: torch.zeros(5, 5, 5)),
    "codebook flat": tensor(VALUES, lambda old: old.flatten(1)),
    "codebook of no axis": tensor(VALUES, lambda old: old[0, 0, 0]),
    "codebook empty": tensor(VALUES, lambda old: old[:0]),
    "codebook of other bits": tensor(VALUES, lambda old: old[:2]),
    "codebook int8 without steps": tensor(VALUES, lambda old: old.to(torch.int8)),
    "codebook beyond its type": both(
        tensor(VALUES, first_is(1e30)), setting("groups", "global", "dtype", to="float16")
    ),
    "state of whole numbers": tensor("state 0.bias", lambda old: old.to(torch.int64)),
}
REFUSED = {
    "precision unheard of": setting("groups", "global", "precision", to="foo"),
    "precision null": setting("groups", "global", "precision", to=None),
    "precision a list": setting("groups", "global", "precision", to=["fp32"]),
    "shape a string": setting("layers", "0", "shape", to="3233"),
    "shape empty": setting("layers", "0", "shape", to=[]),
    "shape of lists": setting("layers", "0", "shape", to=[[3], [2], [3], [3]]),
    "transposed": setting("layers", "0", "transposed", to=True),
    "layer unknown": setting("layers", "4", to={}),
    "layer missing": removing("layers", "0"),
    "layer left out": setting("layers", to={}),
    "state missing": without("state 0.bias"),
    "state of another shape": tensor("state 1.weight", lambda old: old[:2]),
    "state of another name": lambda _, tensors: tensors.update({"state elsewhere": tensors["state 0.bias"]}),
    "format newer": setting("format", to=5),
}


@pytest.mark.parametrize("change", [pytest.param(x, id=name) for name, x in DAMAGED.items()])
def test_contents_that_make_no_network_are_damage_though_their_hash_is_right(path, dense, small, change):
    rewritten(path, change)
    with pytest.raises(DamagedFileError):
        load(path, architecture=dense)


@pytest.mark.parametrize("change", [pytest.param(x, id=name) for name, x in REFUSED.items()])
def test_contents_that_fit_something_else_are_refused_though_their_hash_is_right(path, dense, small, change):
    rewritten(path, change)
    with pytest.raises(KclibError):
        load(path, architecture=dense)


# ---- Precisions of other parameters


@pytest.fixture
def quantized():
    """A network that has all there is to note, and its dense one; numbers of weights are odd."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)
    )
    network = quantize(compressed(dense, 3, precision="int4"), linear="int4")
    return dense, network.eval()


def test_each_tensor_takes_the_bytes_of_its_precision(path, quantized):
    parts = save(quantized[1], path, indices="fixed").bytes
    assert parts["codebooks"] == 14 + 3 * 2  # 27 halves of a byte, and scales
    assert parts["linear weights"] == 8 + 5 * 2
    assert parts["other parameters and buffers"] == 2 * (3 + 5) + 4 * 4 * 3 + 8  # biases, batch norm
    assert inspect(path).bytes.equals(parts)
    assert set(inspect(path).description["stored"]) == {"0.bias", "4.bias", "4.weight"}


@pytest.mark.parametrize("linear", ["int8", "int4"])
def test_entropy_coded_linear_weights_come_back_to_the_bit_once_where_shared(path, linear):
    torch.manual_seed(0)
    head = nn.Linear(128, 128)
    again = tied(nn.Linear(128, 128), head, "weight")
    dense = nn.Sequential(nn.Conv2d(1, 128, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, again)
    nn.init.normal_(head.weight)
    network = quantize(compressed(dense), linear=linear, biases=None).eval()
    coded, fixed = (save(network, path, indices=kind).bytes for kind in ("entropy", "fixed"))
    assert fixed["linear weights"] == 128 * (128 if linear == "int8" else 64) + 2 * 128
    assert coded["linear weights"] < fixed["linear weights"]
    for kind in ("fixed", "entropy"):
        save(network, path, indices=kind)
        found, images = load(path, architecture=dense).network, torch.randn(4, 1, 6, 6)
        assert_same(found, network)
        assert found[3].weight is found[4].weight
        assert noted(found) == noted(network)
        assert torch.equal(found(images), network(images))
        rewritten(path, without("linear steps 3.weight"))
        with pytest.raises(KclibError):
            load(path, architecture=dense)
    whole = save(network, path) and path.read_bytes()
    for place in range(len(whole) - 6000, len(whole), 500):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedFileError):
            load(path, architecture=dense)


def test_what_is_noted_comes_back_and_acts(path, quantized):
    dense, network = quantized
    save(network, path)
    found, images = load(path, architecture=dense).network, torch.randn(4, 1, 6, 6)
    assert_same(found, network)
    assert noted(found) == noted(network)
    assert torch.equal(found(images), network(images))
    assert torch.equal(copied(found)(images), network(images))
    expanded = load(path, architecture=dense, resident="dense").network
    assert torch.equal(expanded(images), network(images))


def test_parameters_trained_since_are_rounded_in_the_file_alone(path, quantized):
    dense, network = quantized
    with torch.no_grad():
        network[4].weight += torch.rand(5, 3)
        network[0].bias += torch.rand(3)
    trained = copy.deepcopy(network)
    save(network, path)
    assert_same(network, trained)
    found = load(path, architecture=dense).network
    assert torch.equal(found[4].weight, compression_precisions.rounded(trained[4].weight, "int4"))
    assert torch.equal(found[0].bias, trained[0].bias.half().float())
    assert not torch.equal(found[0].bias, trained[0].bias)


def test_files_of_format_1_are_read(path, dense, small):
    rewritten(path, both(setting("format", to=1), removing("stored"), removing("extra")))
    assert inspect(path).description["format"] == 1
    assert_same(load(path, architecture=dense).network, small)


def test_files_of_format_3_that_round_linear_weights_are_read(path, quantized):
    def as_format_3(description, tensors):
        description["format"] = 3
        for old, new in (("linear values ", "state "), ("linear steps ", "steps ")):
            tensors[f"{new}4.weight"] = tensors.pop(f"{old}4.weight")

    dense, network = quantized
    save(network, path, indices="fixed")
    rewritten(path, as_format_3)
    found = load(path, architecture=dense).network
    assert_same(found, network)
    assert noted(found) == noted(network)


def test_files_that_could_round_activations_and_do_not_are_read(path, dense, small):
    rewritten(path, setting("activations", to={}))
    assert_same(load(path, architecture=dense).network, small)


@pytest.mark.parametrize("grids", [{"0": {"scale": 0.1, "zero_point": 17, "bits": 8}}, ["0"], None], ids=str)
def test_files_that_round_activations_are_refused(path, dense, small, grids):
    rewritten(path, both(setting("activations", to=grids), setting("kclib", to="0.0.9")))
    assert inspect(path).description["activations"] == grids
    with pytest.raises(InvalidValueError) as refused:
        load(path, architecture=dense)
    assert str(refused.value) == (
        f"{path} rounds activations, and this kclib does not; read it with the version that wrote it (0.0.9)."
    )


STATED = ("stored", "4.weight")
NOT_NOTED = {
    "stored null": setting("stored", to=None),
    "stored of what is not there": setting(
        "stored", "5.weight", to={"precision": "fp16", "dtype": "float32"}
    ),
    "precision missing": removing(*STATED, "precision"),
    "precision another": setting(*STATED, "precision", to="fp16"),
    "precision unheard of": setting(*STATED, "precision", to="int3"),
    "dtype of whole numbers": setting(*STATED, "dtype", to="int8"),
    "not said to be stored so": removing(*STATED),
    "weight short": tensor("linear values 4.weight", lambda old: old[:-1]),
    "steps missing": without("linear steps 4.weight"),
    "steps short": tensor("linear steps 4.weight", lambda old: old[:-1]),
    "codebook short": tensor("codebook values 0", lambda old: old[:-1]),
    "codebook of fewer": tensor("codebook steps 0", lambda old: old[:-1]),
    "codebook without steps": without("codebook steps 0"),
}


@pytest.mark.parametrize("change", [pytest.param(x, id=name) for name, x in NOT_NOTED.items()])
def test_notes_that_are_none_are_refused_though_their_hash_is_right(path, quantized, change):
    save(quantized[1], path)
    rewritten(path, change)
    with pytest.raises(KclibError):
        load(path, architecture=quantized[0])


@pytest.mark.parametrize("architecture", [5, True, 1.5, [], {}, ["resnet18"], {"a": 1}, "", "unknown"])
def test_an_architecture_that_is_no_name_is_refused(path, dense, small, architecture):
    rewritten(path, setting("architecture", to=architecture))
    with pytest.raises(KclibError):
        load(path)
    assert_same(load(path, architecture=dense).network, small)


def test_a_file_without_the_word_architecture_is_refused(path, small):
    rewritten(path, removing("architecture"))
    with pytest.raises(KclibError):
        load(path)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_layer_cannot_have_the_indices_of_one_of_another_shape_or_group(path, scope):
    """Those of the first reach neither far enough for the second's kernels, nor are all of its codebook."""
    dense = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4 if scope == "global" else 2, 3))
    save(compressed(dense, 2 if scope == "global" else {"0": 6, "1": 2}, scope=scope), path, indices="fixed")
    rewritten(path, both(setting("layers", "1", "same_as", to="0"), without("indices 1")))
    with pytest.raises(DamagedFileError):
        load(path, architecture=dense)


def test_a_file_with_more_than_belongs_to_it_can_be_inspected(path, small):
    with contextlib.suppress(KeyError):
        rewritten(path, lambda _, tensors: tensors.update({"more of it": torch.zeros(3)}))
    assert inspect(path).bytes.sum() == path.stat().st_size


def test_turned_kernels_that_are_not_square_are_damage(path):
    dense = nn.Sequential(nn.Conv2d(2, 4, (3, 5)))
    save(compressed(dense, 1, size=(3, 5)), path, indices="fixed")
    change = both(
        setting("groups", "0", "turned", to=True),
        tensor("indices 0", lambda old: torch.zeros(3, dtype=torch.uint8)),
    )
    rewritten(path, change)
    with pytest.raises(DamagedFileError):
        load(path, architecture=dense)


@pytest.mark.parametrize("length", [0, 5, 7])
def test_scales_that_are_not_one_for_each_kernel_are_damage(path, dense, length):
    save(compressed(dense, 2, scaled=True), path)
    rewritten(path, tensor("scales 0", lambda old: old.new_ones(length)))
    with pytest.raises(DamagedFileError, match="layer 0 has not 6 finite scales"):
        load(path, architecture=dense)


def test_scales_that_are_not_finite_are_damage(path, dense):
    save(compressed(dense, 2, scaled=True), path)
    rewritten(path, tensor("scales 0", first_is(torch.nan)))
    with pytest.raises(DamagedFileError, match="finite scales"):
        load(path, architecture=dense)


def bomb(old):
    """Return 100 MB of zeros, deflated."""
    return torch.frombuffer(bytearray(zlib.compress(bytes(100_000_000), 9)), dtype=torch.uint8)


WORDS, TABLE = "indices 0", "frequencies group global"
CODED = {
    "table missing": without(TABLE),
    "table empty": tensor(TABLE, lambda old: old[:0]),
    "table cut": tensor(TABLE, lambda old: old[:-4]),
    "table of noise": tensor(TABLE, lambda old: torch.arange(50, dtype=torch.uint8)),
    "table of fewer": tensor(
        TABLE, lambda old: torch.frombuffer(bytearray(zlib.compress(bytes(8))), dtype=torch.uint8)
    ),
    "table a bomb": tensor(TABLE, bomb),
    "table of another type": tensor(TABLE, lambda old: old.to(torch.bfloat16)),
    "words cut": tensor(WORDS, lambda old: old[:-4]),
    "words cut within one": tensor(WORDS, lambda old: old[:-1]),
    "words longer": tensor(WORDS, lambda old: torch.cat([old, old])),
    "words that end in zero": tensor(WORDS, lambda old: torch.cat([old, old.new_zeros(4)])),
    "words of two axes": tensor(WORDS, lambda old: old.view(2, -1)),
    "words of another type": tensor(WORDS, lambda old: old.to(torch.bfloat16)),
    "words said to be of fixed width": setting("layers", "0", "coding", to="fixed"),
    "words with a table of their own": setting("layers", "0", "coding", to="layer"),
    "coding unheard of": setting("layers", "0", "coding", to="huffman"),
}


@pytest.mark.parametrize("change", [pytest.param(x, id=name) for name, x in CODED.items()])
def test_entropy_coded_indices_that_are_none_are_damage(path, change):
    dense, network = coded_apart(0, 0)
    save(network, path)
    rewritten(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError):
            load(path, architecture=dense)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def altered(dense, place, module):
    result = copy.deepcopy(dense)
    result[place] = module
    return result


@pytest.mark.parametrize(
    ("place", "module", "says"),
    [
        (0, nn.Conv2d(2, 4, 3), r"layer 0 of shape \(3, 2, 3, 3\)"),
        (0, nn.Conv2d(2, 3, 5), r"layer 0 of shape \(3, 2, 3, 3\)"),
        (0, nn.ConvTranspose2d(3, 2, 3), r"layer 0 of shape \(3, 2, 3, 3\)"),
        (0, nn.Linear(2, 3), r"layer 0 of shape \(3, 2, 3, 3\)"),
        (0, nn.Conv2d(2, 3, 3, bias=False), "only one of them has: 0.bias"),
        (1, nn.Identity(), "only one of them has: 1.bias, 1.num_batches_tracked, 1.running_mean"),
        (1, nn.BatchNorm2d(3, affine=False), "only one of them has: 1.bias, 1.weight"),
        (1, nn.BatchNorm2d(4), r"has 1.weight of shape \(3,\), this architecture \(4,\)"),
        (1, Odd(), "only one of them has: .*1.again"),
        (2, nn.Identity(), r"layer 2 of shape \(2, 3, 3, 3\)"),
    ],
)  # fmt: skip
def test_an_architecture_that_does_not_fit_is_named_by_what_does_not(path, dense, small, place, module, says):
    with pytest.raises(InvalidValueError, match=says):
        load(path, architecture=altered(dense, place, module))


def test_a_layer_that_only_the_architecture_has_is_named(path, dense, small):
    with pytest.raises(InvalidValueError, match=r"only one of them has: 3\.bias, 3\.weight"):
        load(path, architecture=nn.Sequential(*dense, nn.Conv2d(2, 2, 3)))


@pytest.mark.parametrize("architecture", [5, nn.LazyConv2d(3, 3), nn.Conv2d])
def test_an_argument_that_is_no_architecture_is_refused(path, small, architecture):
    with pytest.raises(KclibError):
        load(path, architecture=architecture)


# ---- Whole or not at all


KILLED_HALFWAY = """
import os, signal, sys
import safetensors.torch

whole = safetensors.torch.save_file

def half(tensors, path, metadata=None):
    whole(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    print("halfway", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = half
from torch import nn
from kclib import compression

network = compression.load(sys.argv[1], architecture=nn.Conv2d(2, 3, 3)).network
compression.save(network, sys.argv[1])
"""


def test_a_process_killed_while_it_saves_leaves_the_old_file(path):
    network = compressed(nn.Conv2d(2, 3, 3))
    save(network, path)
    before = path.read_bytes()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_HALFWAY, path], capture_output=True, text=True, timeout=100
    )
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "halfway\n"), killed.stderr
    assert path.read_bytes() == before
    assert_same(load(path, architecture=nn.Conv2d(2, 3, 3)).network, network)
    save(network, path, accuracy=3)
    assert inspect(path).description["accuracy"] == 3


def test_a_full_disk_leaves_the_old_file_and_no_scraps(path, small, dense):
    large = compressed(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(100, 100)))
    with full_disk(), pytest.raises(StorageError, match=f"{path.name} could not be written"):
        save(large, path)
    assert os.listdir(path.parent) == [path.name]
    assert_same(load(path, architecture=dense).network, small)


def test_a_new_file_takes_the_place_of_the_old_one(path, dense, small):
    other = compressed(dense, 1)
    save(other, path)
    assert_same(load(path, architecture=dense).network, other)
    assert os.listdir(path.parent) == [path.name]


def test_the_network_saved_is_left_as_it_was(path, small):
    before = copy.deepcopy(small.train())
    save(small, path)
    assert_same(small, before)
    assert all(module.training for module in small.modules())
