"""The optimiser for short trainings."""

import copy

import pytest
import torch
from torch import nn

from allpet import Autoencoder, Denoiser
from allpet.optimizers import Muon, hidden_weights, orthogonalize


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(8, 8), (16, 144), (144, 16), (40, 50)])
def test_orthogonalizing_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    matrix = torch.randn(shape)
    result = orthogonalize(matrix, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    in_its_own_vectors = left.T @ result @ right.T
    values = in_its_own_vectors.diagonal()
    assert (in_its_own_vectors - values.diag()).abs().max() < 1e-3
    assert values.min() > 0.3
    assert values.max() < 1.25


def test_orthogonalizing_follows_the_published_iteration():
    matrix = torch.randn(12, 100)
    expected = matrix / matrix.norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalize(matrix, 5), expected, rtol=0, atol=1e-4)


def test_orthogonalizing_does_not_depend_on_scale_and_survives_zeros():
    matrix = torch.randn(10, 30)
    torch.testing.assert_close(orthogonalize(1e4 * matrix), orthogonalize(matrix), rtol=0, atol=1e-4)
    assert (orthogonalize(torch.zeros(4, 9)) == 0).all()
    low_rank = torch.randn(20, 1) @ torch.randn(1, 90)
    assert torch.isfinite(orthogonalize(low_rank)).all()


def test_two_dimensional_weights_move_as_with_the_optimizer_of_torch():
    weight = torch.randn(24, 40)
    ours, theirs = (nn.Parameter(weight.clone()) for _ in range(2))
    optimizers = (
        Muon([ours], [], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(24, 40)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (ours - weight).norm()
    assert (ours - theirs).norm() < 0.03 * moved, "torch's own iterates in bfloat16, and differs by no more than that"


def test_all_other_parameters_move_as_with_adamw():
    values = torch.randn(7)
    ours, theirs = (nn.Parameter(values.clone()) for _ in range(2))
    optimizers = (Muon([], [ours], lr=0.01, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1))
    for _ in range(5):
        gradient = torch.randn(7)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened():
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
    optimizer = Muon([network[0].weight, network[2].weight], [network[0].bias, network[2].bias], lr=0.01)
    batches = torch.randn(6, 5, 2, 4, 4)

    def train(network, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            network(batch).square().mean().backward()
            optimizer.step()

    train(network, optimizer, batches[:3])
    stored = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    train(network, optimizer, batches[3:])
    again = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
    again.load_state_dict(stored[0])
    resumed = Muon([again[0].weight, again[2].weight], [again[0].bias, again[2].bias], lr=0.5)
    resumed.load_state_dict(stored[1])
    train(again, resumed, batches[3:])
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "network", [Autoencoder(channels=(8, 16)), Denoiser(channels=(32, 32), attention=(False, True))]
)
def test_hidden_weights_are_matrices_between_the_first_layer_and_the_last(network):
    hidden = set(map(id, hidden_weights(network)))
    names = {name for name, weight in network.named_parameters() if id(weight) in hidden}
    rest = {name for name, _ in network.named_parameters()} - names
    assert names
    assert all(weight.ndim >= 2 for weight in hidden_weights(network))
    assert not any(".conv_in." in name or ".conv_out." in name for name in names)
    by_name = dict(network.named_parameters())
    assert all(
        by_name[name].ndim == 1 or "conv_in" in name or "conv_out" in name or name in ("tracer.weight", "region.weight")
        for name in rest
    )


def test_vectors_are_refused_as_hidden_weights():
    with pytest.raises(ValueError, match=r"shape \(3,\).*give it to others"):
        Muon([nn.Parameter(torch.zeros(3))], [])
