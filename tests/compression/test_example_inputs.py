import threading
import time

import torch
from torch import nn

from kclib.compression import _example_inputs


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.01)
        return x + torch.rand(())


def test_trials_in_threads_leave_the_process_as_it_was():
    import torch._dynamo  # a trial lets be what is not imported

    drawn = torch.random.get_rng_state()
    together, answers = threading.Barrier(2), []

    def trials(lag):
        together.wait()
        for _ in range(10):
            time.sleep(lag)  # so that each begins while the other's is under way, and ends after it
            answers.extend(_example_inputs.run(Slow(), ((torch.zeros(1),), {})))

    threads = [threading.Thread(target=trials, args=(lag,)) for lag in (0, 0.005)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert len(answers) == 20
    assert all(torch.equal(answer, answers[0]) for answer in answers)
