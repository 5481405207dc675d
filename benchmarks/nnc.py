"""The reference software of ISO/IEC 15938-17 (Neural Network Coding), in an environment of its own.

`nncodec` is what a user would take today to make a network's file small. It asks for another numpy than this
project, so it is installed beside it once, and is given arrays.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kclib
from kclib import models
from kclib._util import files
from kclib.kernels import _copying
from kclib.recovery import _calibration, _moments

NAME = "ISO/IEC 15938-17 (nncodec)"
CORRECTED = f"{NAME}, gains and biases corrected"
NEEDS = ("nncodec==2.1.3", "numpy<2")
# Runs there: codes the arrays of a file, decodes what came, and writes that and how many bytes it took.
_CODE = """
import sys
import numpy as np
from nncodec import nn
source, target, qp = sys.argv[1:]
with np.load(source) as arrays:
    coded = nn.encode(dict(arrays), {"qp": int(qp), "verbose": False})
np.savez(target, **nn.decode(coded), **{"/bytes": len(coded)})
"""


def environment() -> Path:
    """Return the Python of an environment that has nncodec; the first call makes it, in about two minutes."""
    folder = files.cache_dir() / "nncodec"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing {' '.join(NEEDS)} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
        ready.touch()
    return python


def coded(network: kclib.Model | nn.Module, qp: int) -> tuple[kclib.Model | nn.Module, int]:
    """Return a network whose convolutions were coded and decoded, and the bytes of these.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    qp : int
        Quantization parameter: four more is a step twice as wide. All other settings are the software's own.
    """
    given, network = network, _copying.copied(models.network_of(network))
    convolutions = nn.ModuleDict(
        {name.replace(".", "/"): x for name, x in network.named_modules() if isinstance(x, nn.Conv2d)}
    )
    state = convolutions.state_dict()
    floats = {name: x.float().numpy() for name, x in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.npz"), Path(folder, "target.npz")
        np.savez(source, **floats)
        command = [environment(), "-c", _CODE, source, target, str(qp)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nncodec failed: {done.stderr[-2000:]}")
        with np.load(target) as found:
            decoded = {name: torch.from_numpy(found[name]) for name in floats}
            n_bytes = int(found["/bytes"])
    convolutions.load_state_dict(decoded)  # they are the network's own
    return models.like(given, network), n_bytes


def corrected(model: kclib.Model, dense: kclib.Model, images: kclib.ImageSet) -> tuple[kclib.Model, int]:
    """Return a coded network with a gain for each filter and its bias fitted, and the bytes of the gains.

    Layer by layer, what a filter answers to what it now reads gets the mean and the variance that the dense
    filter's answers have, by a bias and a gain (fp16). Coarse steps leave filters weaker: with means alone
    put right, or gains by least squares, less and less of what they answer is above 0.
    """
    n_bytes = 0
    small, network = _copying.copied(model.network).eval(), dense.network
    batches = _moments.batches(images, model.preprocess, 64, "cpu")
    names = {name for name, x in small.named_modules() if isinstance(x, nn.Conv2d)}
    for i, step in enumerate(_moments.steps(network, next(batches())[:1], names)):
        module, original = small.get_submodule(step.name), network.get_submodule(step.name)
        read = _moments.measure(network, small, step, batches, n_images=len(images), seed=i)
        norms, weight = _calibration.norms_behind(step, network, small), _moments.grouped(module)
        power = read.power(weight)
        gain = torch.where(power > 0, (read.answer_power / power).sqrt(), 1).half().reshape(-1)
        module.weight.data *= gain[:, None, None, None].float()
        n_bytes += gain.nbytes
        _calibration.absorb(read, _moments.grouped(module), original, module, norms)
    return models.like(model, small), n_bytes
