"""What takes the place of a convolution is no less than it: networks as other people write them."""

import copy
import functools
import pickle
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from kclib import clustering, compression, kernels, models
from kclib.compression import _layers
from kclib.errors import InvalidValueError

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, convolution=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3) if convolution is None else convolution
        self.head = nn.Linear(8, 4)

    def convolved(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.head(torch.relu(self.convolved(x)).mean((2, 3)))


class CastsInput(Net):
    def convolved(self, x):
        weight = self.conv.weight
        return self.conv(x.to(device=weight.device, dtype=weight.dtype)) + weight.shape[0] + weight.numel()


class ReadsWeight(Net):
    def convolved(self, x):
        return F.conv2d(x, self.conv.weight, self.conv.bias)


class CallsForward(Net):
    def convolved(self, x):
        return self.conv.forward(x)


class AsksForTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                x = torch.relu(x)
        return self.head(x.mean((2, 3)))


class WithAttributes(Net):
    def __init__(self):
        super().__init__()
        self.conv.scale = 3.0
        self.conv.register_buffer("mask", torch.rand(8, 1, 1))
        self.conv.register_buffer("passing", torch.rand(8, 1, 1), persistent=False)
        self.conv.gain = nn.Parameter(torch.rand(8, 1, 1))
        self.conv.act = nn.PReLU()
        self.conv.owner = [self]

    def convolved(self, x):
        conv = self.conv
        assert conv.owner[0] is self
        return conv.act(conv(x)) * conv.scale * conv.mask * conv.gain + conv.passing


class Gained(nn.Conv2d):
    factor = 2

    def __init__(self, *sizes, extra=5):
        super().__init__(*sizes)
        self.extra = extra

    def gain(self):
        return self.factor * self.extra

    @property
    def shift(self):
        return self.extra + 1

    def get_extra_state(self):
        return {"extra": self.extra, "kept": [torch.ones(2), b"ab", (None, True)], 7: "seven"}

    def set_extra_state(self, state):
        assert state["kept"][0].tolist() == [1, 1]
        assert state["kept"][1:] == [b"ab", (None, True)]
        assert state[7] == "seven"
        self.extra = state["extra"]


class OfItsOwnClass(Net):
    def __init__(self):
        super().__init__(Gained(3, 8, 3))

    def convolved(self, x):
        return self.conv(x) * self.conv.gain() + self.conv.shift


class Taps(Net):
    """Reads what a hook, bound to itself, kept."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(self.keep)

    def keep(self, module, given, answer):
        self.feature = answer

    def convolved(self, x):
        self.conv(x)
        return self.feature


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Drops(Net):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, training=True))


class HoldsAllKinds(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("passing", torch.rand(3, 1, 1), persistent=False)
        self.register_buffer("complex", torch.randn(3, 1, 1, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("number", torch.tensor(2.0))
        self.register_buffer("flags", torch.tensor([True, False, True]).reshape(3, 1, 1))
        self.register_buffer("none", None)
        self.plain = torch.rand(3, 1, 1)
        self.listed = nn.ParameterList([torch.rand(8), torch.rand(3, 5).T])

    def state_dict(self, *args, **kwargs):
        return {}

    def forward(self, x):
        return super().forward(
            (x * self.passing + self.complex.abs() + self.number) * self.flags - self.plain
        )


Pair = namedtuple("Pair", "logits features")


class AnswersAPair(Net):
    def forward(self, x):
        return Pair(super().forward(x), {"x": x})


class OnlyWhenTrained(Net):
    """Has an auxiliary head that does not run in eval mode."""

    def __init__(self):
        super().__init__()
        self.aux, self.norm = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        answer = super().forward(x)
        return (answer, self.norm(self.aux(self.conv(x)))) if self.training else answer


class OfOneSize(nn.Module):
    """Takes 41×41 pixels alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2 * 39 * 39, 4)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class Same(nn.Module):
    def forward(self, weight):
        return weight

    def right_inverse(self, weight):
        return weight


def hooked():
    network = Net()
    network.conv.register_forward_hook(lambda module, given, answer: answer.clamp(max=0.1))
    network.conv.register_forward_pre_hook(
        lambda module, given, named: ((given[0] * 2,), named), with_kwargs=True
    )
    network.conv.register_forward_hook(
        lambda module, given, named, answer: answer + 1, with_kwargs=True, always_call=True
    )
    return network


def normed():
    network = Net()
    parametrizations.weight_norm(network.conv)
    return network


def normed_as_of_old():
    network = Net()
    with warnings.catch_warnings(action="ignore"):
        nn.utils.weight_norm(network.conv)
    return network


def parametrized():
    network = Net()
    parametrize.register_parametrization(network.conv, "weight", Same())
    return network


def traced_in_part():
    network = Net()
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(nn.Conv2d(8, 8, 3), torch.zeros(1, 8, 8, 8))
    return Net(nn.Sequential(network.conv, traced))


KINDS = {
    "casts its input": CastsInput,
    "reads the weight": ReadsWeight,
    "calls forward": CallsForward,
    "asks for the class": AsksForTheClass,
    "attributes": WithAttributes,
    "a class of its own": OfItsOwnClass,
    "hooks": hooked,
    "taps": Taps,
    "counts": Counts,
    "drops": Drops,
    "all kinds of tensors": HoldsAllKinds,
    "a pair": AnswersAPair,
    "auxiliary head": OnlyWhenTrained,
    "one size": OfOneSize,
    "weight norm": normed,
    "weight norm of old": normed_as_of_old,
    "parametrized": parametrized,
    "float64": lambda: Net().double(),
    "float64 weight norm": lambda: normed().double(),
    "traced in part": traced_in_part,
    "wrapped": lambda: nn.Sequential(nn.Sequential(nn.DataParallel(Net()))),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Net()),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
}
EACH = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def all_clusters(network):
    """Return a clustering that changes nothing: as many clusters as kernels."""
    bank = kernels.extract(network)
    return clustering.cluster(bank, {x.name: x.n_kernels for x in bank.layers}, progress=False)


def some_clusters(network, n_clusters=2):
    return clustering.cluster(kernels.extract(network), n_clusters, progress=False)


def answers(network, size=41):
    channels = 1 if isinstance(network, OfOneSize) else 3
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        answer = network.eval()(images.to(next(network.parameters()).dtype))
    return answer[0] if isinstance(answer, tuple) else answer


@EACH
def test_as_many_clusters_as_kernels_change_no_answer(make, tmp_path):
    torch.manual_seed(0)
    network = make().eval()
    expected, found = answers(network), all_clusters(network)
    packed = compression.compress(network, found)
    assert _layers.clustered(packed)
    compression.save(packed, tmp_path / "a.safetensors")
    loaded = compression.load(tmp_path / "a.safetensors", architecture=network).network
    results = [packed, compression.replaced(network, found), compression.expand(packed), loaded]
    for result in [*results, copy.deepcopy(packed)]:
        torch.testing.assert_close(answers(result), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(answers(network), expected)


@EACH
def test_fewer_clusters_answer_as_dense_weights_do(make):
    torch.manual_seed(0)
    network = make().eval()
    bank = kernels.extract(network)
    found = clustering.cluster(bank, {x.name: 1 for x in bank.layers}, progress=False)
    packed, dense = compression.compress(network, found), compression.replaced(network, found)
    torch.testing.assert_close(answers(packed), answers(dense), rtol=1e-5, atol=1e-5)
    assert not torch.equal(answers(packed), answers(network))


def test_weight_is_a_tensor_with_type_shape_and_device():
    network = Net().bfloat16()
    small = compression.compress(network, some_clusters(network))
    weight = small.conv.weight
    assert (weight.dtype, weight.shape, weight.device) == (
        torch.bfloat16,
        (8, 3, 3, 3),
        network.conv.weight.device,
    )
    assert torch.equal(weight, compression.replaced(network, some_clusters(network)).conv.weight)
    with pytest.raises((KeyError, AttributeError)):
        small.conv.weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    with pytest.raises(InvalidValueError, match="draw"):
        small.conv.reset_parameters()


def test_a_stand_in_is_of_the_convolutions_class_and_comes_back_as_it():
    network = OfItsOwnClass()
    small = compression.compress(network, some_clusters(network))
    assert isinstance(small.conv, Gained)
    assert isinstance(small.conv, _layers.ClusteredConv2d)
    dense = compression.expand(small)
    assert type(dense.conv) is Gained
    assert (dense.conv.extra, str(dense)) == (5, str(network))
    twice = compression.compress(dense, some_clusters(dense))
    assert type(twice.conv) is type(small.conv)


@pytest.mark.parametrize("make", [WithAttributes, OfItsOwnClass, Taps, normed])
def test_stand_ins_are_pickled(make):
    network = make()
    small = compression.compress(network, some_clusters(network))
    again = pickle.loads(pickle.dumps(small))
    assert type(again.conv) is type(small.conv)
    assert torch.equal(answers(again), answers(small))


def test_state_of_the_users_own_is_saved_beside_the_indices(tmp_path):
    network = WithAttributes()
    small = compression.compress(network, some_clusters(network))
    own = {"conv.mask", "conv.gain", "conv.act.weight"}
    assert own <= set(small.state_dict())
    assert "conv.passing" not in small.state_dict()
    compression.save(small, tmp_path / "a.safetensors")
    loaded = compression.load(tmp_path / "a.safetensors", architecture=WithAttributes()).network
    for name in own:
        assert torch.equal(loaded.state_dict()[name], network.state_dict()[name])


def test_extra_state_survives(tmp_path):
    network = OfItsOwnClass()
    network.conv.extra = 11
    small = compression.compress(network, some_clusters(network))
    assert small.state_dict()["conv._extra_state"]["extra"] == 11
    compression.save(small, tmp_path / "a.safetensors")
    loaded = compression.load(tmp_path / "a.safetensors", architecture=OfItsOwnClass()).network
    assert loaded.conv.extra == 11
    assert torch.equal(answers(loaded), answers(small))


def test_extra_state_that_no_file_keeps_is_refused_by_name(tmp_path):
    network = OfItsOwnClass()
    network.conv.extra = {1, 2}
    small = compression.compress(network, some_clusters(network), inputs=False)
    with pytest.raises(InvalidValueError, match="extra state of conv holds a set"):
        compression.save(small, tmp_path / "a.safetensors")


def test_extra_state_of_another_architecture_is_refused(tmp_path):
    network = OfItsOwnClass()
    compression.save(compression.compress(network, some_clusters(network)), tmp_path / "a.safetensors")
    with pytest.raises(InvalidValueError, match="extra state of conv, which takes none"):
        compression.load(tmp_path / "a.safetensors", architecture=Net())


def by_closure():
    network = Net()
    conv, head = network.conv, network.head
    network.forward = lambda x: head(conv(x).mean((2, 3)))
    return network


def by_partial():
    network = Net()
    network.convolved = functools.partial(F.conv2d, weight=network.conv.weight)
    return network


class Cached(Net):
    def __init__(self):
        super().__init__()
        self.weight = self.conv.weight.detach().clone()

    def convolved(self, x):
        return F.conv2d(x, self.weight)


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3))
        self.never = nn.Conv2d(3, 8, 3)


@pytest.mark.parametrize(
    ("make", "name"),
    [(by_closure, "layer conv"), (Cached, "layer conv"), (Unused, "layer never")],
)
@pytest.mark.parametrize("replace", [compression.compress, compression.replaced])
def test_a_network_that_does_not_run_its_replaced_layers_is_refused_by_name(make, name, replace):
    network = make()
    with pytest.raises(InvalidValueError, match=name):
        replace(network, some_clusters(network))


def test_a_weight_held_elsewhere_may_be_dense_but_not_clustered():
    network = by_partial()
    found = some_clusters(network)
    with pytest.raises(InvalidValueError, match="layer conv"):
        compression.compress(network, found)
    assert not torch.equal(answers(compression.replaced(network, found)), answers(network))


def test_a_file_is_not_loaded_into_a_network_that_does_not_run_its_layers(tmp_path):
    network = Net()
    compression.save(compression.compress(network, some_clusters(network)), tmp_path / "a.safetensors")
    with pytest.raises(InvalidValueError, match="layer conv"):
        compression.load(tmp_path / "a.safetensors", architecture=by_closure())


def test_a_layer_left_out_need_not_run():
    network = Unused()
    bank = kernels.extract(network).only("conv.0")
    small = compression.compress(network, clustering.cluster(bank, 2, progress=False))
    assert list(_layers.clustered(small)) == ["conv.0"]


def test_a_network_whose_hooks_write_the_weight_is_refused():
    network = Net()

    def shrink(module, given):
        module.weight.data.clamp_(-0.01, 0.01)

    network.conv.register_forward_pre_hook(shrink)
    with pytest.raises(InvalidValueError, match="answers otherwise"):
        compression.compress(network, some_clusters(network))


class TakesTwo(Net):
    def forward(self, x, y):
        return super().forward(x + y)


@pytest.mark.parametrize("kind", [tuple, lambda pair: dict(zip("xy", pair, strict=True))])
def test_a_network_is_tried_on_the_inputs_given(kind, caplog):
    network = TakesTwo()
    found, pair = some_clusters(network), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    compression.compress(network, found, inputs=kind(pair))
    assert not caplog.records
    compression.compress(network, found)
    assert "not checked" in caplog.text
    with pytest.raises(InvalidValueError, match="does not run on the inputs"):
        compression.compress(network, found, inputs=pair[0])
    with pytest.raises(InvalidValueError, match="inputs is a str"):
        compression.compress(network, found, inputs="images")


@pytest.mark.parametrize("replace", [compression.compress, compression.replaced])
def test_a_clustering_of_other_weights_is_refused(replace):
    network, other = Net(), Net()
    found = some_clusters(network)
    with pytest.raises(InvalidValueError, match="conv has other kernels"):
        replace(other, found)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.conv.weight[7, 2, 2, 2] += 1e-6
    with pytest.raises(InvalidValueError, match="conv has other kernels"):
        replace(changed, found)
    assert _layers.clustered(compression.compress(compression.replaced(network, found), found))


def test_a_model_in_is_a_model_out(tmp_path):
    model = models.Model("mine:net", Net().eval(), models.fashion_preprocess(), ("a", "b", "c", "d"))
    found = some_clusters(model.network)
    small = compression.compress(model, found)
    for result in (small, compression.replaced(model, found), compression.expand(small)):
        assert isinstance(result, models.Model)
        assert (result.name, result.classes) == (model.name, model.classes)
    contents = compression.save(small, tmp_path / "a.safetensors")
    assert contents.description["architecture"] == "mine:net"
    loaded = compression.load(tmp_path / "a.safetensors", architecture=model)
    assert loaded.classes == model.classes
    assert torch.equal(answers(loaded.network), answers(small.network))


def test_running_once_leaves_network_random_numbers_and_mode_as_they_were():
    network = Counts().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small = compression.compress(network, some_clusters(network))
    assert torch.equal(torch.rand(3), expected)
    assert (int(network.calls), int(small.calls), small.training, network.training) == (0, 0, True, True)


def test_torch_fx_sees_one_module_and_jit_is_refused():
    network = Net().eval()
    small = compression.compress(network, some_clusters(network))
    traced = torch.fx.symbolic_trace(small)
    assert torch.equal(answers(traced), answers(small))
    assert "conv" in [x.target for x in traced.graph.nodes if x.op == "call_module"]
    with pytest.raises(InvalidValueError, match="expand"), warnings.catch_warnings(action="ignore"):
        torch.jit.script(small)
    reads = ReadsWeight()
    with pytest.raises(InvalidValueError, match="expand"):
        torch.fx.symbolic_trace(compression.compress(reads, some_clusters(reads)))


def test_an_attribute_that_stands_in_the_way_is_named():
    network = Net()
    network.conv.scales = 3
    with pytest.raises(InvalidValueError, match="layer conv has an attribute 'scales'"):
        compression.compress(network, some_clusters(network))


def test_what_cannot_be_copied_on_a_convolution_is_named_by_its_place():
    network = Net()
    network.conv.source = (x for x in ())
    with pytest.raises(InvalidValueError, match=r"network\.conv\.source cannot"):
        compression.compress(network, some_clusters(network))


@pytest.mark.parametrize("make", [normed, normed_as_of_old, parametrized, lambda: normed().double()])
def test_a_computed_weight_is_computed_again_once_expanded(make, tmp_path):
    torch.manual_seed(0)
    network = make().eval()
    small = compression.compress(network, some_clusters(network))
    assert {"conv.indices", "conv.codebook.values"} <= set(small.state_dict())
    assert not any("original" in name or "weight_" in name for name in small.state_dict())
    compression.save(small, tmp_path / "a.safetensors")
    dense = compression.load(tmp_path / "a.safetensors", architecture=network, resident="dense").network
    for result in (compression.expand(small), dense):
        kinds = {name: (x.dtype, x.shape) for name, x in network.state_dict().items()}
        assert {name: (x.dtype, x.shape) for name, x in result.state_dict().items()} == kinds
        torch.testing.assert_close(answers(result), answers(small), rtol=1e-5, atol=1e-5)
        again = make().eval()
        again.load_state_dict(result.state_dict())
        torch.testing.assert_close(answers(again), answers(small), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            result.conv.weight, compression.replaced(network, some_clusters(network)).conv.weight
        )
