"""State across batches: values, determinism, checkpoints, refusals; and the updates of parameters."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import PairLogps, build_objective
from fastdpo.losses.controllers import BetaController, KLEstimate, ReferenceWeights, RunningMean
from fastdpo.losses.gather import gather_pairs
from fastdpo.losses.reference_updates import extrapolate_parameters, mix_parameters
from tests.losses.common import mean_loss, random_pair


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_running_mean_is_the_mean_of_all_numbers() -> None:
    numbers = torch.randn(37, generator=torch.Generator().manual_seed(0))
    mean = RunningMean()
    assert mean.value.item() == 0
    for part in numbers.split([1, 10, 6, 20]):
        mean.update(part.requires_grad_())
    assert mean.value.item() == pytest.approx(numbers.mean().item(), abs=1e-6)
    assert not mean.value.requires_grad
    before = mean.value
    assert torch.equal(mean.update(torch.zeros(0)), before)
    other = RunningMean()
    other.load_state_dict(through_a_file(mean.state_dict()))
    assert torch.equal(other.update(numbers[:3]), mean.update(numbers[:3]))


def test_exponential_mean_and_kl() -> None:
    mean = RunningMean(0.9)
    mean.update(torch.tensor([1.0, 3.0]))
    assert mean.value.item() == 2.0
    mean.update(torch.tensor([12.0]))
    assert mean.value.item() == pytest.approx(3.0)
    kl = KLEstimate()
    assert kl.value.item() == 0.0
    assert kl.update(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])).item() == 1.0
    assert kl.update(torch.tensor([-3.0]), torch.tensor([0.0])).item() == 0.0  # each batch for itself
    slow = KLEstimate(0.5)
    slow.update(torch.tensor([-1.0]), torch.tensor([0.0]))
    assert slow.update(torch.tensor([4.0]), torch.tensor([0.0])).item() == 1.5  # clamped when read, not kept
    again = KLEstimate(0.5)
    again.load_state_dict(through_a_file(slow.state_dict()))
    assert torch.equal(again.value, slow.value)
    with pytest.raises(ValueError, match="momentum: got 1.0"):
        KLEstimate(1.0)
    with pytest.raises(ValueError, match=r"ref_logps: got shape \(1,\), wanted \(2,\)"):
        kl.update(torch.zeros(2), torch.zeros(1))


def test_beta_dpo_switched_off_is_dpo() -> None:
    pair = random_pair()
    step = BetaController(0.3, alpha=0.0, rho=0.0).step(pair.delta)
    assert step.beta.item() == pytest.approx(0.3) and step.num_pairs == 5
    got = build_objective(
        "sigmoid", beta=step.beta, pair_weights=step.pair_weights, num_pairs=step.num_pairs
    ).loss(pair)
    torch.testing.assert_close(got, mean_loss("sigmoid", pair, beta=0.3))


def test_beta_dpo_by_hand() -> None:
    controller = BetaController(0.1, alpha=0.5, rho=0.0, warm_start=False)
    step = controller.step(torch.tensor([2.0, 4.0]))
    assert step.beta.item() == pytest.approx(0.1 * (1 + 0.5 * (3 - 0.3)))  # M0 = 0.1 * 3
    step = controller.step(torch.tensor([10.0]))  # one pair has no spread
    assert step.beta.item() == pytest.approx(0.1 * (1 + 0.5 * (10 - 1.27)))  # M0 = 0.9 * 0.3 + 0.1 * 10
    assert BetaController(alpha=1.0, rho=0.0, warm_start=False).step(torch.tensor([-1e3])).beta.item() == (
        pytest.approx(1e-3)
    )
    equal = BetaController(0.2).step(torch.full((10,), 7.0))
    assert equal.beta.item() == pytest.approx(0.2) and equal.num_pairs == 8
    assert equal.pair_weights.sum() == 8
    assert BetaController(rho=0.5).step(torch.randn(5)).num_pairs == 2  # floor(2.5)
    assert BetaController(rho=0.9).step(torch.randn(3)).num_pairs == 1  # never none


def test_beta_dpo_keeps_what_is_near_the_mean_and_gives_the_rest_no_gradient() -> None:
    gaps = torch.cat([torch.zeros(8), torch.tensor([1e6, -1e6])])
    controller = BetaController(rho=0.2)
    controller._std = 1.0
    kept = controller.step(gaps).pair_weights
    assert kept.sum() == 8
    controller = BetaController(rho=0.3, warm_start=False)
    for _ in range(30):
        controller.step(torch.randn(64))
    far = controller.step(torch.cat([torch.zeros(7), torch.tensor([50.0, -50.0, 60.0])]))
    assert far.pair_weights.tolist() == [1.0] * 7 + [0.0] * 3
    pair = random_pair(pairs=10)
    loss = build_objective("sigmoid", pair_weights=far.pair_weights, num_pairs=far.num_pairs).loss(pair)
    (grad,) = torch.autograd.grad(loss, pair.chosen)
    assert torch.equal(grad != 0, far.pair_weights.bool())


def test_beta_dpo_is_deterministic_through_a_checkpoint() -> None:
    def run(controller: BetaController, steps: range) -> list[Any]:
        return [controller.step(torch.randn(20, generator=torch.Generator().manual_seed(i))) for i in steps]

    whole = run(BetaController(seed=3), range(6))
    first = BetaController(seed=3)
    run(first, range(3))
    second = BetaController(seed=99)
    second.load_state_dict(through_a_file(first.state_dict()))
    for got, want in zip(run(second, range(3, 6)), whole[3:], strict=True):
        assert torch.equal(got.beta, want.beta) and torch.equal(got.pair_weights, want.pair_weights)
    assert any(
        not torch.equal(a.pair_weights, b.pair_weights)
        for a, b in zip(run(BetaController(seed=4), range(6)), whole, strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"min_beta": -1.0}, "min_beta: got -1.0"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"rho": 1.0}, "rho: got 1.0"),
        ({"momentum": 1.5}, "momentum: got 1.5"),
    ],
)
def test_beta_controller_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BetaController(**arguments)  # type: ignore[arg-type]


def test_bad_gaps_leave_the_state_alone() -> None:
    controller = BetaController()
    controller.step(torch.ones(4))
    before = copy.deepcopy(controller.state_dict())
    for gaps in (torch.tensor([1.0, torch.nan]), torch.zeros(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="gaps: got"):
            controller.step(gaps)
    after = controller.state_dict()
    assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])) for key in before)


def test_reference_weights() -> None:
    weights = ReferenceWeights(2)
    assert weights.weights().tolist() == [0.5, 0.5]
    weights.update(torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert weights.accuracy.tolist() == [1.0, 0.5]
    assert weights.confidence.tolist() == [1.0, 3.0]
    assert weights.weights("accuracy").tolist() == pytest.approx([2 / 3, 1 / 3])
    assert weights.weights("confidence").tolist() == [0.25, 0.75]
    other = ReferenceWeights(2)
    other.load_state_dict(through_a_file(weights.state_dict()))
    assert torch.equal(other.weights(), weights.weights())
    with pytest.raises(ValueError, match="state: got 2 references, wanted 3"):
        ReferenceWeights(3).load_state_dict(weights.state_dict())
    with pytest.raises(ValueError, match="kind: got 'thompson'"):
        weights.weights("thompson")
    for shape, said in (((3, 2), r"\(3, 2\)"), ((2,), r"\(2,\)"), ((2, 1, 1), r"\(2, 1, 1\)")):
        with pytest.raises(ValueError, match=rf"chosen: got shape {said}, wanted \(2, P\)"):
            weights.update(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="num_references: got 0"):
        ReferenceWeights(0)


def test_parameter_updates() -> None:
    policy = [torch.tensor([2.0, 4.0]), torch.tensor([1.0])]
    reference = [torch.zeros(2), torch.tensor([3.0])]
    mix_parameters(reference, policy, 0.0)
    assert reference[0].tolist() == [0.0, 0.0]
    mix_parameters(reference, policy, 0.25)
    assert reference[0].tolist() == [0.5, 1.0] and reference[1].tolist() == [2.5]
    mix_parameters(iter(reference), iter(policy), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(reference, policy, strict=True))
    current = [torch.tensor([2.0]).requires_grad_()]
    last_end = [torch.tensor([1.0])]
    extrapolate_parameters(current, last_end, 0.0)
    assert current[0].item() == last_end[0].item() == 2.0
    # Rounds that move by 1 each: a step is from the last round's end, not from where that was taken on to.
    current, last_end, starts = [torch.zeros(1)], [torch.zeros(1)], []
    for _ in range(4):
        current[0] += 1.0
        extrapolate_parameters(current, last_end, 0.3)
        starts.append(current[0].item())
    assert starts == pytest.approx([1.3, 2.69, 4.107, 5.5321])
    assert last_end[0].item() == pytest.approx(5.107)
    for call, message in (
        (lambda: mix_parameters(reference, policy, 1.1), "weight: got 1.1"),
        (lambda: mix_parameters(reference, policy[:1]), "parameters: got 2 and 1"),
        (lambda: mix_parameters(reference, policy[::-1]), r"parameters\[0\]: got shapes \(2,\) and \(1,\)"),
        (lambda: extrapolate_parameters(reference, policy, -1.0), "alpha: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def some(pair: PairLogps, keep: slice) -> PairLogps:
    return PairLogps(**{k: None if v is None else v.detach()[keep] for k, v in vars(pair).items()})


def gather_and_check(rank: int, world: int, store: str, result: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    own = some(random_pair(pairs=7), slice(0, 5) if rank == 0 else slice(5, 7))  # unequal numbers
    own.chosen.requires_grad_()
    value = build_objective("aot").loss(gather_pairs(own))
    value.backward()
    torch.save((value.detach(), own.chosen.grad), f"{result}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_aot_over_two_processes_is_aot_of_all_pairs(tmp_path: Path) -> None:
    arguments = (2, str(tmp_path / "store"), str(tmp_path / "out"))
    torch.multiprocessing.spawn(gather_and_check, arguments, nprocs=2)
    pair = random_pair(pairs=7)
    want = build_objective("aot").loss(pair)
    (grad,) = torch.autograd.grad(want, pair.chosen)
    results: list[tuple[Tensor, Tensor]] = [torch.load(f"{arguments[2]}.{rank}") for rank in range(2)]
    for value, _ in results:
        torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(torch.cat([part for _, part in results]), grad)
