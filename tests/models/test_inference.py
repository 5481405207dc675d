import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kclib import clustering, compression, datasets, evaluation, kernels, models
from kclib.errors import InvalidValueError, NotEnoughMemoryError, StoppedError
from kclib.evaluation import _accuracy, _methods, attribution, damage
from kclib.models import _inference
from kclib.recovery import sensitivity

Pair = namedtuple("Pair", "logits aux_logits")
Other = namedtuple("Other", "first second")


@dataclass
class Holder:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Output(OrderedDict):
    """A Hugging Face output: a mapping whose items are attributes too; what is None is no item."""

    def __getattr__(self, name):
        return self[name]


class Net(nn.Module):
    """A convolution, a mean and a layer, whose answer is wrapped."""

    def __init__(self, wrap=lambda y: y, channels=3):
        super().__init__()
        self.conv, self.head, self.wrap = nn.Conv2d(channels, 8, 3), nn.Linear(8, 10), wrap

    def forward(self, x):
        return self.wrap(self.head(self.conv(x).mean((2, 3))))


class LeNet(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.c1, self.c2, self.f = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(256, 10)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        x = torch.max_pool2d(torch.relu(self.c1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.c2(x)), 2)
        return self.f(x.view(x.size(0), -1))


class Sized(nn.Module):
    def forward(self, x):
        assert x.shape[-1] == 224, f"width {x.shape[-1]} is not 224"


class Two(nn.Module):
    def forward(self, x, mask):
        return x * mask


class OnMeta(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1, device="meta")

    def forward(self, x):
        return super().forward(x) * self.scale


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def images(n=40, channels=3, size=28):
    torch.manual_seed(1)
    drawn = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return datasets.ImageSet("drawn/test", drawn, torch.arange(n) % 10, tuple("abcdefghij"), "f" * 64)


def evaluated(network, data=None, **options):
    return evaluation.evaluate(network, data or images(), progress=False, **options)


def test_logits_are_found_in_whatever_they_are_wrapped_in():
    x, wrong = torch.rand(4, 3, 8, 8), torch.rand(4, 10)
    expected = Net()(x) * 0
    wraps = {
        "tensor": lambda y: y,
        "map of one position": lambda y: y[:, :, None, None],
        "logits": lambda y: {"loss": None, "logits": y, "hidden": wrong},
        "out": lambda y: OrderedDict(out=y, aux=wrong),
        "tuple": lambda y: (y, wrong),
        "list": lambda y: [y, None],
        "nested": lambda y: ({"logits": y}, wrong),
        "named": lambda y: Pair(y, wrong),
        "named otherwise": lambda y: Other(y, wrong),
        "an object": lambda y: Holder(y),
        "Hugging Face": lambda y: Output(logits=y),
        "half": lambda y: y.half(),
    }
    for name, wrap in wraps.items():
        torch.manual_seed(0)
        network = Net(wrap)
        expected = network.head(network.conv(x).mean((2, 3)))
        answer = _inference.answers(network, x)
        assert answer.dtype == torch.float32, name
        torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda y: y[:1], r"shape \(1, 10\) to 4 images"),
        (lambda y: y.sum(), r"shape \(\)"),
        (lambda y: y.argmax(1), r"shape \(4,\)"),
        (lambda y: y[:, :, None, None].expand(-1, -1, 5, 6), r"\(4, 10, 5, 6\).*AdaptiveAvgPool2d"),
        (lambda y: {"out": y[:, :, None, None].expand(-1, -1, 5, 6)}, "mean over positions"),
        (lambda y: {"boxes": y, "scores": y}, "boxes"),
        (lambda y: {"boxes": y}, "boxes"),
        (lambda y: [{"boxes": y, "scores": y}], "list"),
        (lambda y: (y.sum(), y), r"tuple \(\(\), \(4, 10\)\)"),
        (lambda y: None, "NoneType"),
        (lambda y: y.detach().numpy(), "ndarray"),
        (lambda y: (), "tuple"),
        (lambda y: {}, "dict"),
        (lambda y: y + 1j, "logits"),
        (lambda y: y.to_sparse(), "logits"),
        (lambda y: y.tolist(), "list"),
    ],
)
def test_other_answers_are_refused_with_what_came(wrap, says):
    with pytest.raises(InvalidValueError, match=says):
        _inference.answers(Net(wrap), torch.rand(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Sized(), r"Sized.*\(2, 3, 8, 8\), float32.*AssertionError in test_inference.py, line \d+.*not 224"),
        (Two(), r"Two.*forward wants \(x, mask\)"),
        (Raising(KeyError("labels")), "KeyError in test_inference.py.*'labels'"),
        (Raising(IndexError("out of range")), "IndexError"),
        (Raising(StopIteration()), "StopIteration"),
        (nn.ModuleList(), "ModuleList.*NotImplementedError"),
        (Net(channels=1), "reads 1 channel and the images have 3"),
        (Net(channels=4), "reads 4 channels and the images have 3"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "size it was made for"),
        (Net().double(), r"network.float\(\)"),
        (nn.Embedding(10, 10), "size it was made for"),
        (OnMeta(), "register that as a buffer"),
    ],
)
def test_whatever_a_network_raises_is_one_sentence_with_its_cause(network, says):
    with pytest.raises(InvalidValueError, match=says) as found:
        _inference.answers(network, torch.rand(2, 3, 8, 8))
    assert found.value.__cause__ is not None


def test_where_memory_ends_a_smaller_batch_is_advised():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(NotEnoughMemoryError, match="batch_size"):
            _inference.answers(Raising(error), torch.rand(2, 3, 8, 8))


def test_an_interruption_passes():
    with pytest.raises(KeyboardInterrupt):
        _inference.answers(Raising(KeyboardInterrupt()), torch.rand(2, 3, 8, 8))


def test_channels_last_is_given_up_once():
    network = LeNet().eval()
    found = evaluated(network, batch_size=10)
    assert network.seen == [True, False, False, False, False]
    with torch.no_grad():
        expected = network(images().images.float() / 255).argmax(1)
    assert found.predictions.tolist() == expected.tolist()


def test_channels_last_is_kept_where_the_network_stands_it():
    network = Net().eval()
    layouts = []
    network.conv.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    evaluated(network, batch_size=10)
    assert layouts == [True] * 4


def test_a_network_that_runs_on_no_layout_raises_its_own_error():
    with pytest.raises(InvalidValueError, match="not 224"):
        evaluated(Sized())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_networks_of_every_precision_run_in_their_own(dtype, precision):
    seen = []
    network = Net().to(dtype).eval()
    network.conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found = evaluated(network, precision=precision)
    assert seen == [dtype]
    expected = network(images().images.to(dtype) / 255).argmax(1)
    assert (found.predictions == expected.numpy()).mean() > 0.9


def test_a_network_with_one_channel_reads_grey_images():
    network = LeNet(channels=1)
    grey, colour = images(channels=1), images(channels=3)
    for data in (grey, colour):
        assert len(evaluated(network, data).predictions) == 40


def test_nothing_is_copied_and_every_mode_is_left_as_it_was():
    network = Net().train()
    network.conv.eval()
    network.lock, features = threading.Lock(), {}
    network.head.register_forward_hook(
        lambda module, args, output: features.update(training=module.training, output=output)
    )
    evaluated(network)
    assert not features["training"]
    assert not features["output"].is_inference()
    assert (network.training, network.conv.training, network.head.training) == (True, False, True)
    assert network.conv.weight.is_contiguous()


def test_a_mode_is_given_back_also_after_an_error():
    network = Net(lambda y: None).train()
    with pytest.raises(InvalidValueError):
        evaluated(network)
    assert all(module.training for module in network.modules())


def test_a_train_method_of_the_networks_own_is_called():
    class Merging(Net):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    network = Merging().train()
    seen = []
    network.head.register_forward_hook(lambda *_: seen.append(network.merged))
    evaluated(network)
    assert seen == [True]
    assert not network.merged


def test_batch_statistics_do_not_move():
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1)).train()
    before = models.fingerprint(network)
    evaluated(network)
    assert models.fingerprint(network) == before


def test_a_network_without_values_is_refused():
    for network in (nn.Sequential(nn.LazyConv2d(10, 3)), nn.Conv2d(3, 10, 3, device="meta")):
        with pytest.raises(InvalidValueError, match="no values"):
            evaluated(network)


def test_one_output_names_no_class():
    network = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid())
    with pytest.raises(InvalidValueError, match=r"torch.cat\(\(-x, x\), 1\)"):
        evaluated(network)


def test_a_network_that_was_given_up_on_is_tried_in_no_other_layout_again():
    network = LeNet().eval()
    x = torch.rand(2, 3, 28, 28).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        _inference.answers(network, x)
    assert network.seen == [True, False, False, False]
    other = Sized()
    for _ in range(2):  # what runs in no layout is no reason to give one up
        with pytest.raises(InvalidValueError, match="not 224"):
            _inference.run(other, x)
    assert network in _inference._CONTIGUOUS
    assert other not in _inference._CONTIGUOUS


def test_power_of_what_kernels_read_needs_no_logits():
    segmenting = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    bank = kernels.extract(segmenting)
    found = sensitivity.importance(segmenting, images(), bank, kind="input", progress=False)
    assert len(found) == len(bank)
    assert found[:3] == pytest.approx(float((images().images / 255).square().mean()), rel=0.1)


def test_every_verb_takes_a_network_and_images_however_they_come():
    network = Net().eval()
    with torch.no_grad():
        network.conv.weight.mul_(20)
    model, data = models.plain("net", network), images()
    pairs = list(zip(data.images, data.labels.tolist(), strict=True))
    loader = DataLoader(TensorDataset(data.images.float() / 255, data.labels), batch_size=7)
    expected = evaluated(model, data)
    for one in (network, model):
        for some in (data, pairs, loader, (data.images, data.labels)):
            found = evaluation.evaluate(one, some, classes="by position", progress=False)
            assert found.predictions.tolist() == expected.predictions.tolist()
    bank = kernels.extract(network)
    made = clustering.cluster(bank, 2, progress=False)
    table = damage.by_cluster(bank, made)
    calls = [
        lambda x: attribution.by_layer(x, made, data, progress=False),
        lambda x: damage.won_back(x, made, table, data, [1], progress=False),
        lambda x: compression.footprint(x, made),
        lambda x: pd.Series(sensitivity.importance(x, data, bank, progress=False)),
        lambda x: _methods.quantized(x, 4).bytes,
        lambda x: models.fingerprint(x),
    ]
    for call in calls:
        first, second = call(network), call(model)
        assert first.equals(second) if hasattr(first, "equals") else first == second


def test_images_of_unknown_class_are_counted_nowhere():
    data = images()
    right = evaluated(Net().eval(), data)
    unknown = replace(data, labels=torch.where(torch.arange(40) < 15, -1, data.labels))
    network = Net().eval()
    whole, part = evaluated(network, data), evaluated(network, unknown)
    assert part.predictions.tolist() == whole.predictions.tolist()
    assert len(part.correct) == 25
    assert part.correct.tolist() == whole.correct[15:].tolist()
    assert part.top1.estimate == pytest.approx(100 * whole.correct[15:].mean())
    assert part.top5.estimate == pytest.approx(100 * whole.in_top5[15:].mean())
    assert any("15 of 40" in note for note in part.notes)
    assert not any("known" in note for note in whole.notes)
    lost = evaluation.drop(part, part)
    assert lost.points.high == pytest.approx(_accuracy.paired(part.correct, part.correct).points.high)
    assert attribution.flipped(part, replace(part, predictions=(part.predictions + 1) % 10)).image.min() == 15
    assert attribution.by_class(part, part).images.sum() == 25
    assert right.classes == part.classes


def test_classes_of_one_name_stay_two():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = replace(images(), classes=("crane", "cat", "crane"), labels=torch.arange(40) % 3)
    found = evaluated(models.Model("m", network, models.plain("m", network).preprocess, data.classes), data)
    assert attribution.by_class(found, found)["name"].tolist() == ["crane (0)", "cat", "crane (2)"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_networks_that_torch_made_of_others_are_evaluated():
    network = Net(wrap=nn.Identity()).eval()
    x = torch.rand(40, 3, 28, 28)
    made = {
        "scripted": torch.jit.script(network),
        "frozen": torch.jit.freeze(torch.jit.script(network)),
        "traced": torch.jit.trace(network, x),
        "fx": torch.fx.symbolic_trace(network),
        "exported": torch.export.export(network, (x,)).module(),
        "data parallel": nn.DataParallel(network),
    }
    expected = evaluated(network).predictions.tolist()
    for name, one in made.items():
        assert evaluated(one).predictions.tolist() == expected, name


def test_weights_are_laid_out_like_the_inputs_from_the_second_batch_on_and_given_back():
    network, seen = Net().eval(), []
    network.conv.register_forward_pre_hook(lambda module, _: seen.append(module.weight.is_contiguous()))
    parameter, memory = network.conv.weight, network.conv.weight.data_ptr()
    evaluated(network, batch_size=10)
    assert seen == [True, False, False, False]
    assert network.conv.weight is parameter
    assert (parameter.data_ptr(), parameter.is_contiguous()) == (memory, True)

    def stop(share):
        return share > 0.5

    with pytest.raises(StoppedError):
        evaluation.evaluate(network, images(), batch_size=10, progress=stop)
    assert network.conv.weight.is_contiguous()


class Standardised(Net):
    """A network that reshapes its weights, as weight standardisation does."""

    def forward(self, x):
        weight = self.conv.weight / self.conv.weight.view(8, -1).std(1)[:, None, None, None]
        return self.head(nn.functional.conv2d(x, weight).mean((2, 3)))


def test_a_network_that_reshapes_its_weights_keeps_their_layout():
    network = Standardised().eval()
    found = evaluated(network, batch_size=7)
    with torch.no_grad():
        expected = network(images().images.float() / 255).argmax(1)
    assert found.predictions.tolist() == expected.tolist()
    assert network.conv.weight.is_contiguous()
