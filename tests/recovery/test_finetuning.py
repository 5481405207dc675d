import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kclib import clustering, compression, datasets, kernels, models, recovery
from kclib import training as train_module
from kclib.compression import _precisions, _replacement
from kclib.compression._layers import by_codebook, clustered
from kclib.errors import InvalidValueError
from kclib.kmeans import symmetric
from kclib.models import Model
from kclib.recovery import _finetuning
from kclib.training import Recipe

RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=1e-2, weight_decay=0, label_smoothing=0, shift=1, square=2,
                held_back=40)  # fmt: skip
CALLS = 3 + 1  # of preprocess an epoch: three of 8 images, then the held-back ones
BLOCK_BYTES = 600  # so few that layers are decoded in several blocks
HOW = [{}, {"scaled": True}, {"turned": True}, {"scaled": True, "turned": True}]
EACH = pytest.mark.parametrize("how", HOW, ids=["plain", "scaled", "turned", "both"])

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 2),
    ).eval()


@pytest.fixture
def last_is_best(monkeypatch):
    """The last check counts as the best, so that what is returned was trained."""
    monkeypatch.setattr(train_module, "_score", lambda row: row["epoch"])


def wide() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 3),
    ).eval()  # fmt: skip


def pictures(n: int, seed: int) -> datasets.ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 10, 10), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    return datasets.ImageSet("made up", images, labels, tuple("abc"), f"made up {seed}")


@torch.no_grad()
def apart(model: Model, network: nn.Module, images: datasets.ImageSet) -> float:
    """Return the mean squared difference of a network's answers from the model's."""
    inputs = images.images.float()
    return float((network(inputs) - model.network(inputs)).square().mean())


def compressed(network=None, *, n_clusters=5, precision="fp16", **how) -> Model:
    network = dense() if network is None else network
    found = clustering.cluster(kernels.extract(network), n_clusters, scope="global", **how)
    network = compression.compress(network, found, precision=precision, block_bytes=BLOCK_BYTES)
    return Model("tiny", network, scaler(), ("dark", "bright"))


def data(n: int = 64) -> datasets.ImageSet:
    """Noise, dark or bright."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (n, 1, 10, 10), dtype=torch.uint8, generator=draw)
    images[1::2] += 55
    return datasets.ImageSet("noise/train", images, torch.arange(n) % 2, ("dark", "bright"), str(n))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, one_thread) -> nn.Module:
    path = tmp_path_factory.mktemp("teacher") / "a.pt"
    return train_module.train(dense(1), data(200), scaler(), replace(RECIPE, epochs=3), path).model


def scaler(interrupted_at: int = -1):
    calls = itertools.count()

    def preprocess(images):
        if next(calls) == interrupted_at:
            raise InterruptedError
        return images.float() / 64 - 2

    return preprocess


def finetuned(model, path, recipe=RECIPE, **options):
    return recovery.finetune(model, data(), path, recipe=recipe, **options)


def equal(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def members(network: nn.Module) -> np.ndarray:
    return np.concatenate([module.members() for module in clustered(network).values()])


def index_order(convolution: nn.Module) -> np.ndarray:
    """Return, for each index of a layer, the row of its kernel in the weight as torch stores it."""
    n = convolution.weight.shape[0] * convolution.weight.shape[1]
    return _replacement.output_order(convolution)(np.arange(n))


@EACH
@pytest.mark.parametrize("reassignable", [False, True])
def test_the_gradient_of_a_representative_is_the_sum_over_its_members(how, reassignable):
    network = compressed(**how).network
    plain, ordinary = clustered(network), compression.expand(network)
    if reassignable:
        network = _finetuning._with_latents(network)
    for each in (network, ordinary):
        each(torch.randn(4, 1, 10, 10, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    ((codebook, layers),) = by_codebook(network)
    expected, turns = np.zeros(codebook.table().shape), symmetric.transforms(3)
    for name, layer in layers.items():
        convolution = ordinary.get_submodule(name)
        gradients = convolution.weight.grad.reshape(-1, 9).numpy()[index_order(convolution)]
        if hasattr(layer, "latent"):
            np.testing.assert_allclose(layer.latent.grad, gradients, rtol=1e-4, atol=1e-4)
        for i, (member, gradient) in enumerate(zip(plain[name].members(), gradients, strict=True)):
            index, turn = divmod(member, 8) if how.get("turned") else (member, 0)
            scale = layer.scales[i].item() if how.get("scaled") else 1
            expected[index, turns[turn]] += scale * gradient
    np.testing.assert_allclose(codebook.values.grad.flatten(1), expected, rtol=1e-3, atol=1e-3)
    movable = [hasattr(layer, "latent") for layer in layers.values()]
    assert movable == [reassignable and not how] * 3


@pytest.mark.parametrize("interrupted_at", [0, 5, 11, 12, 19])
def test_a_resumed_fine_tune_equals_one_in_one_go_to_the_bit(tmp_path, teacher, last_is_best, interrupted_at):
    model = compressed(n_clusters=14)

    def run(path, cut=-1):
        recipe, each = replace(RECIPE, peak_rate=0.1), replace(model, preprocess=scaler(cut))
        return finetuned(each, tmp_path / path, recipe, teacher=teacher, reassigned=2)

    whole = run("whole.pt")
    with pytest.raises(InterruptedError):
        run("cut.pt", interrupted_at)
    resumed = run("cut.pt")
    assert resumed.history == whole.history
    assert equal(resumed.model.network, whole.model.network)
    assert run("cut.pt", 2).history == whole.history  # only the teacher is asked again, for each part
    assert [row["epoch"] for row in whole.history] == [0, 1, 2, 3, 4]
    assert (members(whole.model.network) != members(model.network)).any()
    assert {path.name for path in tmp_path.glob("cut*")} == {"cut.pt", "cut.reassigned.pt"}


def test_labels_are_not_read_where_there_is_a_teacher(tmp_path, teacher):
    wrong = replace(data(), labels=torch.full((64,), -1), classes=("something", "else", "altogether"))
    taught, poisoned = (
        recovery.finetune(
            compressed(), images, tmp_path / f"{i}.pt", recipe=RECIPE, teacher=teacher, reassigned=1
        )
        for i, images in enumerate((data(), wrong))
    )
    assert taught.history == poisoned.history
    assert equal(taught.model.network, poisoned.model.network)


def test_labels_of_a_network_without_names_are_the_outputs_that_folders_number(tmp_path):
    unnamed = replace(compressed(), classes=())
    numbered = replace(data(), labels=1 - data().labels, classes=("1", "0"))
    found = [
        recovery.finetune(unnamed, images, tmp_path / f"{i}.pt", recipe=RECIPE)
        for i, images in enumerate((replace(data(), classes=("0", "1")), numbered))
    ]
    assert found[0].history == found[1].history
    with pytest.raises(InvalidValueError, match="classes="):
        recovery.finetune(unnamed, replace(data(), classes=("a", "b", "c")), tmp_path / "c.pt", recipe=RECIPE)


def test_labels_are_read_in_the_order_of_the_models_classes(tmp_path):
    swapped = replace(data(), labels=1 - data().labels, classes=("bright", "dark"))
    found = [
        recovery.finetune(compressed(), images, tmp_path / f"{i}.pt", recipe=RECIPE)
        for i, images in enumerate((data(), swapped))
    ]
    assert found[0].history == found[1].history


def test_a_start_that_training_only_harms_is_returned_as_it_was(tmp_path, teacher):
    model = compressed(teacher, n_clusters=14)
    recipe = replace(RECIPE, peak_rate=5.0)
    found = finetuned(model, tmp_path / "a.pt", recipe, teacher=teacher, reassigned=1)
    first, *later = (row["agreement"] for row in found.history)
    assert max(later) <= first == found.held_back
    assert equal(found.model.network, model.network)


@pytest.mark.parametrize("reassigned", [0, 2])
def test_fine_tuning_wins_agreement_back(tmp_path, teacher, reassigned):
    model, recipe = compressed(teacher, n_clusters=2), replace(RECIPE, epochs=4)
    with torch.no_grad():  # so much that it answers wrongly on any processor
        model.network[-1].bias += torch.tensor([4.0, -4.0])
    found = finetuned(model, tmp_path / "a.pt", recipe, teacher=teacher, reassigned=reassigned)
    assert found.history[0]["agreement"] < 90
    assert found.held_back > found.history[0]["agreement"]
    assert found.history[-1]["loss"] < found.history[1]["loss"]


@pytest.mark.parametrize("precision", _precisions.PRECISIONS)
@pytest.mark.parametrize("how", [{}, {"scaled": True, "turned": True}], ids=["plain", "both"])
def test_what_is_returned_comes_back_from_a_file_to_the_bit(tmp_path, last_is_best, precision, how):
    model = compressed(n_clusters=14, precision=precision, **how)
    found = finetuned(model, tmp_path / "a.pt", replace(RECIPE, peak_rate=0.1), reassigned=2).model.network
    compression.save(found, tmp_path / "a.safetensors")
    loaded = compression.load(
        tmp_path / "a.safetensors", architecture=dense(), block_bytes=BLOCK_BYTES
    ).network
    assert equal(found, loaded)
    images = scaler()(data().images)
    assert torch.equal(found(images), loaded(images))
    for name, layer in clustered(found).items():
        before = clustered(model.network)[name]
        assert type(layer) is type(before)
        assert (layer.indices.shape, layer.codebook.bits) == (before.indices.shape, before.codebook.bits)
        assert layer.codebook.values.shape == before.codebook.values.shape
        assert not torch.equal(layer.codebook.values, before.codebook.values)
    assert (members(found) == members(model.network)).all() == bool(how)


def test_what_trains_on_is_not_rounded(tmp_path):
    finetuned(compressed(precision="int8"), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    values = state["network"]["0.codebook.values"]
    assert not torch.equal(_precisions.restore(_precisions.store(values, "int8")), values)
    kept = state["best"]["0.codebook.values"]
    assert torch.equal(_precisions.restore(_precisions.store(kept, "int8")), kept)


@pytest.mark.parametrize("reassigned", [0, 1])
def test_the_callers_networks_are_untouched(tmp_path, teacher, reassigned):
    model = compressed()
    before = [models.fingerprint(x) for x in (model.network, teacher)]
    kinds = [type(module) for module in model.network.modules()]
    found = finetuned(model, tmp_path / "a.pt", teacher=teacher, reassigned=reassigned)
    assert [models.fingerprint(x) for x in (model.network, teacher)] == before
    assert not model.network.training
    assert not found.model.network.training
    assert [type(module) for module in model.network.modules()] == kinds


def test_patience_ends_each_part_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_module, "_answers", lambda network, held, *rest: held.labels
    )  # all equally good
    recipe = replace(RECIPE, epochs=5, patience=2)
    found = finetuned(compressed(), tmp_path / "a.pt", recipe, reassigned=4)
    assert [row["epoch"] for row in found.history] == [0, 1, 2, 3, 4, 5, 6]


def test_a_dense_network_trains_as_long_for_comparison(tmp_path):
    model = replace(compressed(), network=dense())
    found = finetuned(model, tmp_path / "a.pt", reassigned=1)
    assert len(found.history) == 4
    assert found.model.network.state_dict().keys() == dense().state_dict().keys()
    assert not equal(found.model.network, model.network)


def of_two(signs) -> nn.Module:
    """Return a network that answers the brightness or its negative for each of so many classes."""
    network = nn.Sequential(nn.Conv2d(1, len(signs), 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(signs)[:, None, None, None] * torch.eye(3))
    return compressed(network.eval(), n_clusters=2).network


def test_reassignment_finds_the_indices_of_a_teacher_and_lowers_the_loss(tmp_path, last_is_best):
    teacher, wrong = of_two([1.0, -1, 1, -1]), of_two([1.0, -1, -1, -1])
    recipe = Recipe(epochs=1, batch_size=8, peak_rate=0.1, weight_decay=0, shift=0, square=0, held_back=8)
    model, losses, found = Model("two", wrong, scaler(), ()), [], []
    for reassigned in (0, 8):
        longer = replace(recipe, epochs=9 - reassigned)
        found.append(
            finetuned(model, tmp_path / f"{reassigned}.pt", longer, teacher=teacher, reassigned=reassigned)
        )
        losses.append(found[-1].history[-1]["loss"])
    agree = [(x.model.network[0].weight * teacher[0].weight).sum((1, 2, 3)) > 0 for x in found]
    assert [signs.tolist() for signs in agree] == [[True, True, False, True], [True] * 4]
    assert losses[1] < 0.5 * losses[0]


def test_layers_that_share_indices_keep_sharing_them(tmp_path, last_is_best):
    network = dense()
    network[3] = nn.Conv2d(6, 6, 3, padding=1)
    network[2] = nn.Conv2d(6, 6, 3, padding=1)
    network[2].weight = network[3].weight
    model = compressed(network.eval(), n_clusters=3)
    movable = _finetuning._with_latents(model.network)
    assert movable[2].latent is movable[3].latent
    found = finetuned(model, tmp_path / "a.pt", replace(RECIPE, peak_rate=0.1), reassigned=2).model.network
    assert found[2].indices is found[3].indices
    assert (members(found) != members(model.network)).any()


@pytest.mark.parametrize("reassigned", [-1, 1.5, True])
def test_a_wrong_number_of_epochs_is_refused_in_a_sentence(tmp_path, reassigned):
    with pytest.raises(InvalidValueError) as caught:
        finetuned(compressed(), tmp_path / "a.pt", reassigned=reassigned)
    assert str(caught.value) == f"reassigned is {reassigned!r}; it must be a whole number, at least 0."


def test_representatives_that_outgrow_their_precision_are_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="finite fp16"):
        finetuned(compressed(), tmp_path / "a.pt", replace(RECIPE, peak_rate=1e5))
