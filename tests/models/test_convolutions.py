from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.models.batch_norm import reestimate, statistics_kept
from eckart.models.calling import call, logits_of, split_labels
from eckart.models.convolutions import convolutions, placed


class Twice(nn.Module):
    """Calls one convolution on pictures of two sizes, and shares the kernel of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.one, self.other = (nn.Conv2d(2, 2, 3) for _ in range(3))
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(self.shared(self.shared(x))))


def test_every_call_counts_and_tied_kernels_are_left_out():
    (ref,) = convolutions(Twice(), torch.ones(1, 2, 12, 10))
    assert (ref.name, ref.sizes, ref.shape) == ("shared", ((12, 10), (10, 8)), (2, 18))
    assert ref.macs == 36 * (10 * 8 + 8 * 6)


def test_modules_are_put_back_even_after_an_error():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    before = list(model)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))

    def fails() -> None:
        with placed(model, {"0": nn.Tanh()}):
            assert isinstance(model[0], nn.Tanh)
            model(torch.ones(1))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(model) == before
    model(torch.ones(1))
    assert len(calls) == 2, "hooks stay with the place"


def test_batch_norms_get_the_averages_of_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    batches = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    momentum = model[0].momentum
    reestimate(model, batches)
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)
    assert model[0].momentum == momentum
    assert not model[0].training


@pytest.mark.parametrize("kept", [True, False])
def test_statistics_go_back_unless_they_are_kept(kept):
    norm = nn.BatchNorm1d(1)
    with statistics_kept(norm) as keep:
        reestimate(norm, [torch.tensor([[1.0], [3.0]])])
        if kept:
            keep.append(True)
    assert norm.running_mean.item() == (2.0 if kept else 0.0)


def test_batches_and_answers_of_every_form():
    x, y = torch.ones(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="a batch must be a tensor, a tuple or a dictionary, not str"):
        call(nn.Identity(), "text")
    assert split_labels((x, y))[1] is y
    assert split_labels((x,)) == ((x,), None)
    assert split_labels(x) == (x, None)
    assert logits_of((x, y)) is x
    with pytest.raises(ValueError, match=r"answers with str, .*give score="):
        logits_of("text")
