from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kclib import clustering, compression, datasets, kernels, models
from kclib.clustering import _clustering
from kclib.compression import _layers
from kclib.datasets import _loader
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.recovery import _assignment, _moments, _sequential
from kclib.recovery._assignment import Metric

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0, *, norm=False, groups=1):
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(12), nn.BatchNorm2d(16)] if norm else [nn.Identity(), nn.Identity()]
    first = nn.Conv2d(3, 12, 3, padding=1, bias=not norm)
    second = nn.Conv2d(12, 16, 3, padding=1, bias=not norm, groups=groups)
    body = [first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8 * 16, 4)).eval()


def images(n=24, seed=0):
    """Smooth images: what a kernel reads at one tap tells much of what it reads at the next."""
    torch.manual_seed(seed)
    coarse = torch.rand(n, 3, 3, 3)
    smooth = nn.functional.interpolate(coarse, size=6, mode="bilinear")
    whole = (255 * smooth).to(torch.uint8)
    return datasets.ImageSet("smooth", whole, torch.zeros(n, dtype=torch.int64), ("a",), str(seed))


def model_of(net):
    return models.Model("tiny", net, lambda x: x.float() / 128 - 1)


def answers(net, data=None):
    data = data or images()
    with torch.no_grad():
        return net(data.images.float() / 128 - 1)


def cluster(net, k, **options):
    return _sequential.correct(model_of(net), images(), k, progress=False, **options)


def loss(net, small):
    return float((answers(net, images(seed=7)) - answers(small, images(seed=7))).square().mean())


@pytest.mark.parametrize("norm", [False, True], ids=["biases", "norms"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_new_images_are_answered_nearer_than_by_plain_clustering(scope, norm):
    better = []
    for seed in range(4):
        net, k = network(seed, norm=norm), 8 if scope == "layer" else 16
        plain = compression.replaced(net, clustering.cluster(kernels.extract(net), k, scope=scope))
        better.append(loss(net, cluster(net, k, scope=scope).network) / loss(net, plain))
    assert np.median(better) < 0.7


def test_as_many_clusters_as_kernels_change_nothing():
    net = network()
    found = cluster(net, {"0": 36, "3": 192, "6": 128}, precision="fp32")
    torch.testing.assert_close(answers(found.network), answers(net), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("scope", ["layer", "global", {"0": "a", "3": "a", "6": "b"}])
def test_the_network_holds_what_its_clustering_packs(scope, precision):
    found = cluster(network(groups=2), 9, scope=scope, precision=precision)
    packed = compression.compress(found.network, found.clustering, precision=precision)
    assert torch.equal(answers(packed), answers(found.network))
    for group in found.clustering.groups:
        assert 1 <= group.n_clusters <= 9
        assert len(np.unique(group.codebook, axis=0)) == group.n_clusters
        assert (np.bincount(group.indices, minlength=group.n_clusters) > 0).all()
    bank = kernels.extract(network(groups=2))
    error = np.square(bank.kernels - _clustering.quantized(found.clustering)).sum(dtype="d")
    assert found.clustering.inertia == pytest.approx(error, rel=1e-4)


def test_biases_put_the_mean_of_each_channel_right():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3)).eval()
    small = cluster(net, 3).network
    torch.testing.assert_close(answers(small[:1]).mean((0, 2, 3)), answers(net[:1]).mean((0, 2, 3)))
    torch.testing.assert_close(
        answers(small).mean((0, 2, 3)), answers(net).mean((0, 2, 3)), rtol=1e-3, atol=1e-4
    )


def test_norms_put_mean_and_variance_of_each_channel_right():
    net = network(norm=True)
    net[1].running_mean.copy_(torch.randn(12))
    small = cluster(net, 3).network
    for upto in (2, 5):
        ours, wanted = answers(small[:upto]), answers(net[:upto])
        torch.testing.assert_close(ours.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(ours.var((0, 2, 3)), wanted.var((0, 2, 3)), rtol=1e-2, atol=1e-3)
    assert torch.equal(net[4].running_var, torch.ones(16))


def test_inputs_that_tell_nothing_of_each_other_get_the_nearest_representatives():
    torch.manual_seed(0)
    target, codebook = torch.randn(20, 5 * 4), torch.randn(6, 4)
    found = Metric.of(3 * torch.eye(20), 4, 0.01).assigned(target, codebook)
    nearest = torch.cdist(target.reshape(-1, 4), codebook).argmin(1).reshape(20, 5)
    assert torch.equal(found, nearest)


def test_inputs_that_go_together_make_good_each_others_errors():
    torch.manual_seed(0)
    mixed = torch.randn(100, 6) @ torch.randn(6, 40 * 4) + 0.05 * torch.randn(100, 160)
    h, target, codebook = mixed.T @ mixed / 100, torch.randn(30, 160), torch.randn(5, 4)
    ours = codebook[Metric.of(h, 4, 0.01).assigned(target, codebook)].reshape(30, -1)
    nearest = codebook[torch.cdist(target.reshape(-1, 4), codebook).argmin(1)].reshape(30, -1)

    def error(weight):
        return float((((weight - target) @ h) * (weight - target)).sum())

    assert error(ours) < 0.5 * error(nearest)


def test_moved_weights_answer_other_inputs_as_the_dense_ones_answered_theirs():
    torch.manual_seed(0)
    x, turn = torch.randn(500, 8), torch.eye(8) + 0.3 * torch.randn(8, 8)
    seen, weight = x @ turn, torch.randn(1, 5, 8)
    zero = torch.zeros(1, 8)
    answers = weight @ x.T
    read = _moments.Moments((seen.T @ seen / 500)[None], answers @ seen / 500, zero, zero, zero, 500)
    wanted = np.linalg.lstsq(seen.numpy(), answers[0].numpy().T, rcond=None)[0].T
    found = _sequential._moved(weight, read, [Metric.of(read.small[0], 4, 1e-7)])
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-3)


def test_kernels_of_another_size_may_be_packed_already():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    net.eval()
    first = cluster(net, 3, size=1)
    packed = compression.compress(first.network, first.clustering)
    second = _sequential.correct(model_of(packed), images(), 20, dense=net, progress=False)
    both = compression.compress(second.network, second.clustering)
    assert set(_layers.clustered(both)) == {"0", "2"}
    alone = cluster(packed, 20)  # knows nothing of the dense answers
    assert loss(net, both) < loss(net, alone.network)


def test_transposed_convolutions_get_the_nearest():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    found = cluster(net, 4)
    rows = found.clustering.groups[0]
    sample_weight = net[0].weight.detach().numpy().reshape(18, 9)
    apart = np.square(sample_weight[:, None] - rows.codebook.reshape(1, -1, 9)).sum(2)
    np.testing.assert_array_equal(rows.indices, apart.argmin(1))
    packed = compression.compress(found.network, found.clustering, precision="fp16")
    assert torch.equal(answers(packed), answers(found.network))


def test_labels_are_not_read_and_the_model_stays_as_it_is():
    net = network()
    before = models.fingerprint(net)
    poisoned = replace(images(), labels=torch.full((24,), -1))
    ours = _sequential.correct(model_of(net), poisoned, 5, progress=False)
    assert models.fingerprint(net) == before
    assert models.fingerprint(ours.network) == models.fingerprint(cluster(net, 5).network)
    assert models.fingerprint(ours.network) != models.fingerprint(cluster(net, 5, seed=1).network)


def test_what_cannot_be_is_said():
    with pytest.raises(InvalidValueError, match="damping is 0;"):
        cluster(network(), 4, damping=0)
    with pytest.raises(InvalidValueError, match="n_clusters is 0"):
        cluster(network(), 0)
    with pytest.raises(UnknownNameError, match="unknown precision 'fp8'"):
        cluster(network(), 4, precision="fp8")
    with pytest.raises(InvalidValueError, match="no images"):
        _sequential.correct(
            model_of(network()), _loader.select(images(), torch.tensor([], dtype=torch.int64)), 4
        )


def behind_a_dead_relu(inplace=False):
    """A batch norm that reads channels of which three are constant (case: most networks have some)."""
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=inplace)
    body = [nn.Conv2d(3, 8, 3), relu, nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1)]
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 10)).eval()
    with torch.no_grad():
        net[0].bias[:3] = -1e3
        net[2].running_mean.uniform_(1, 2), net[2].running_var.uniform_(0.1, 0.2), net[2].bias.uniform_(-1, 1)
    return net


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_dead_channels_are_no_obstacle(seed, inplace):
    net = behind_a_dead_relu(inplace)
    found = cluster(net, 16, seed=seed)
    plain = compression.replaced(net, clustering.cluster(kernels.extract(net), 16))
    assert loss(net, found.network) < 0.5 * loss(net, plain)
    assert torch.equal(found.network[2].running_var, net[2].running_var)  # behind a ReLU, it is not theirs


class Heads(nn.Module):
    """A network with a head that runs in training alone, and that answers a dictionary of maps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 3)
        self.aux = nn.Conv2d(12, 8, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return {"aux": self.aux(x), "out": self.out(x)} if self.training else {"out": self.out(x)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_layers_that_do_not_run_get_the_nearest_and_are_noted(scope):
    net = Heads().eval()
    found = cluster(net, 6, scope=scope)
    assert [x for x in found.clustering.notes if "aux" in x] == list(found.clustering.notes)
    assert len(found.clustering.notes) == 1
    bank, stands = kernels.extract(net), _clustering.quantized(found.clustering)
    group = next(x for x in found.clustering.groups if any(y.name == "aux" for y in x.layers))
    rows = bank.layer("aux").rows
    apart = np.square(bank.points[rows][:, None] - group.codebook.reshape(1, -1, 9)).sum(2)
    own = np.square(bank.points[rows] - stands[rows].reshape(-1, 9)).sum(1)
    np.testing.assert_allclose(own, apart.min(1), rtol=1e-5)
    torch.testing.assert_close(found.network.aux.weight.detach().numpy(), stands[rows].reshape(8, 12, 3, 3))


def test_a_network_alone_and_pairs_of_images_and_labels_are_taken():
    net, data = network(), images()
    pairs = torch.utils.data.TensorDataset(data.images, data.labels)
    alone = _sequential.correct(net, pairs, 5, progress=False)
    assert alone.model is alone.network
    plain = models.plain("plain", net)
    given = _sequential.correct(plain, data, 5, progress=False)
    assert given.model == replace(plain, network=given.network)
    assert models.fingerprint(alone.network) == models.fingerprint(given.network)


@pytest.mark.parametrize("kind", ["half", "double", "weight norm"])
def test_networks_of_other_types_are_clustered_in_them(kind):
    net = network(norm=True)
    found = cluster(net, 8)
    if kind == "weight norm":
        net[3] = nn.utils.parametrizations.weight_norm(net[3])
        other = cluster(net, 8)
        assert hasattr(other.network[3], "parametrizations")
    else:
        net = net.half() if kind == "half" else net.double()
        other = _sequential.correct(model_of(net), images(), 8, progress=False)
        assert {x.dtype for x in other.network.parameters()} == {net[0].weight.dtype}
    with torch.no_grad():
        inputs = (images().images.float() / 128 - 1).to(net[0].weight.dtype)
        off = other.network(inputs).float() - answers(found.network)
    assert off.square().mean() < 0.05 * answers(found.network).var()  # rounding moves some assignments


def test_layers_that_read_only_zeros_keep_to_their_weights():
    net = behind_a_dead_relu()
    with torch.no_grad():
        net[0].bias[:] = -1e6
        net[2].bias[:], net[2].running_mean[:] = 0, 0
    found = cluster(net, 4)
    torch.testing.assert_close(answers(found.network), answers(net))
    plain = clustering.cluster(kernels.extract(net), 4)
    assert found.clustering.groups[1].inertia < 1.3 * plain.groups[1].inertia


@pytest.mark.parametrize("damping", [1e-300, 1e-12, 1e-3])
def test_damping_is_raised_where_rounding_leaves_no_solution(damping):
    torch.manual_seed(0)
    few = torch.randn(5, 40)
    factor = _assignment.factor(few.T @ few, damping).double()
    back, h = factor @ factor.T, (few.T @ few).double()
    added = (back - h).diagonal()
    assert torch.isfinite(factor).all()
    assert (
        damping * h.diagonal().mean() * 0.99 < added.max() < max(1e-4, 1.01 * damping) * h.diagonal().mean()
    )


def test_the_nearest_are_found_far_from_zero_and_at_any_scale():
    draw = np.random.default_rng(0)
    points, centres = draw.normal(size=(50, 9)), draw.normal(size=(7, 9))
    wanted = np.square(points[:, None] - centres).sum(2).argmin(1)
    for scale, offset in ((1, 0), (1e-30, 0), (1e25, 0), (1e-3, 1000)):
        moved = (torch.from_numpy((scale * x + offset).astype("f")) for x in (points, centres))
        agree = _assignment.nearest(*moved).numpy() == wanted
        assert agree.all() if offset == 0 else agree.mean() > 0.8


def scaled_weights(net, factor, layer):
    net[layer].weight.data *= factor
    return net


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_weights_scaled_by_a_power_of_two_get_the_same_indices(factor):
    ours, scaled = (cluster(scaled_weights(network(), x, 6), 5, precision="fp32") for x in (1.0, factor))
    for one, other in zip(ours.clustering.groups, scaled.clustering.groups, strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)


def test_blocks_of_channels_change_nothing(monkeypatch):
    torch.manual_seed(0)
    mixed = torch.randn(100, 20) @ torch.randn(20, 40 * 4)
    h, target, codebook = mixed.T @ mixed / 100, torch.randn(10, 160), torch.randn(5, 4)
    metric = Metric.of(h, 4, 0.1)
    at_once = metric.assigned(target, codebook)
    monkeypatch.setattr(_assignment, "_BLOCK", 3)
    assert torch.equal(metric.assigned(target, codebook), at_once)


def test_codebooks_weigh_kernels_by_the_energy_of_what_they_read(monkeypatch):
    seen = []
    kmeans = _sequential.kmeans.fit

    def listening(points, k, *, sample_weight, seed):
        seen.append(sample_weight)
        return kmeans(points, k, sample_weight=sample_weight, seed=seed)

    monkeypatch.setattr(_sequential.kmeans, "fit", listening)
    net, data = network(), images()
    data.images[:, 1] = (data.images[:, 1].float() / 10 + 115).to(torch.uint8)
    _sequential.correct(model_of(net), data, 5, progress=False)
    read = nn.functional.unfold(data.images.float() / 128 - 1, 3, padding=1).transpose(1, 2).flatten(0, 1)
    energy = read.var(0, unbiased=False).reshape(3, 9).mean(1)
    np.testing.assert_allclose(seen[0].reshape(12, 3), (energy / energy.max()).expand(12, 3), rtol=1e-3)
