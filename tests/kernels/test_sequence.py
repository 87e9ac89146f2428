"""Every backend of the sequence kernel against the contract of ``fastdpo/kernels/sequence.py``.

``cuda-emulated`` is the CUDA kernel's own source on a CPU (``emulation/``). ``triton`` runs on a GPU where
there is one; elsewhere ``test_triton_under_the_interpreter`` runs this file's Triton cases in a process of
its own, as ``test_rows.py`` does.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.kernels import sequence_cpu
from fastdpo.kernels.sequence import SequenceKernels, SigmoidOutputs, SigmoidTerms
from tests.kernels.conftest import folder_of_all_workers
from tests.kernels.emulation.sequence import SequenceEmulator
from tests.kernels.sequence_cases import (
    LENGTHS,
    PairCase,
    Tokens,
    assert_rounded_once,
    bits,
    exact_sums,
    loss_and_gradient,
    make_pairs,
    make_tokens,
    mixed_cases,
    run_pairs,
    run_sums,
    sum_tolerances,
)
from tests.kernels.triton_processes import run_interpreted

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = mixed_cases(2 if IS_INTERPRETED else 6)
LONG = 20_000 if IS_INTERPRETED else 100_000
LN_2 = torch.tensor(math.log(2.0), dtype=torch.float64).float().item()

BACKENDS = [
    "reference",
    "cpu",
    "cuda-emulated",
    *(
        [pytest.param("triton", marks=pytest.mark.gpu if HAS_GPU else ())]
        if HAS_GPU or IS_INTERPRETED
        else []
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """At least two, whatever the run is given: one thread has only one order to add in."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    kernels: SequenceKernels

    def sums(self, tokens: Tokens, fill: float = math.nan) -> Tensor:
        return run_sums(self.kernels, tokens, self.device, fill)

    def pairs(self, tokens: Tokens, terms: SigmoidTerms, fill: float = math.nan) -> SigmoidOutputs:
        return run_pairs(self.kernels, tokens, terms, self.device, fill)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> SequenceEmulator:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return SequenceEmulator(folder_of_all_workers(tmp_path_factory))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if name == "cuda-emulated":
        return Backend(name, "cpu", request.getfixturevalue("emulator"))
    if IS_INTERPRETED and name == "triton" and HAS_GPU:
        pytest.skip("TRITON_INTERPRET=1 is set on a machine with a GPU")
    module: Any = importlib.import_module(f"fastdpo.kernels.sequence_{name}")
    device = "cuda" if name == "cuda" or (name == "triton" and HAS_GPU) else "cpu"
    if reason := module.unavailable_reason(torch.device(device)):
        pytest.skip(f"{name}: {reason}")
    return Backend(name, device, module)


def assert_same_bits(a: SigmoidOutputs, b: SigmoidOutputs) -> None:
    for name, ours, theirs in zip(SigmoidOutputs._fields, a, b, strict=True):
        assert bits(ours) == bits(theirs), name


def assert_sums_are_exact(sums: Tensor, tokens: Tokens) -> None:
    error = (sums.double() - torch.tensor(exact_sums(tokens), dtype=torch.float64)).abs()
    assert (error <= sum_tolerances(tokens)).all(), (sums, exact_sums(tokens))


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])
def test_sums_loss_and_gradient(backend: Backend, case: PairCase):
    """Against ``fastdpo.losses``; then the same bits again, and from ``sequence_sums``."""
    data = make_pairs(case)
    results = backend.pairs(data.tokens, data.terms)
    assert_sums_are_exact(results.sums, data.tokens)
    loss, gradient = loss_and_gradient(data, results.sums)
    assert_rounded_once(results.loss.float(), loss, "loss")
    assert_rounded_once(results.g, gradient, "g")
    assert (results.g[~data.tokens.counts] == 0).all()
    assert_same_bits(results, backend.pairs(data.tokens, data.terms, fill=0.0))
    assert bits(backend.sums(data.tokens)) == bits(results.sums)


def test_the_cases_are_worth_something():
    """Each option moves the loss or the gradient of some case, and some losses are far from saturated."""
    steep = []
    for case in CASES:
        data = make_pairs(case)
        sums = torch.tensor(exact_sums(data.tokens)).float()
        _, gradient = loss_and_gradient(data, sums)
        beta = torch.as_tensor(data.terms.beta).max().item() if LENGTHS[case.lengths] else 1.0
        steep += [(gradient.abs() > 0.01 * beta / 7).any().item()]
    assert sum(steep) > len(CASES) / 3


@pytest.mark.parametrize("has_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("has_weights", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("lengths", [(), (0,), (3,), (0, 0, 1), (17, 0, 300, 4097, 1)], ids=str)
def test_sums_of_any_number_of_sequences(
    backend: Backend, lengths: tuple[int, ...], has_weights: bool, has_mask: bool
):
    tokens = make_tokens(lengths, has_weights=has_weights, has_mask=has_mask)
    sums = backend.sums(tokens)
    assert_sums_are_exact(sums, tokens)
    assert bits(sums) == bits(backend.sums(tokens, fill=0.0))


@pytest.mark.parametrize("value", [-0.1, 1e-30, 3e33])
def test_a_long_sequence_loses_nothing(backend: Backend, value: float):
    """In fp32, added one after the other, 100,000 tokens of -0.1 nats are 1.4 nats off."""
    tokens = make_tokens((LONG, 3))
    tokens.values.fill_(value)
    assert_sums_are_exact(backend.sums(tokens), tokens)
    results = backend.pairs(tokens, SigmoidTerms(beta=0.1))
    assert_sums_are_exact(results.sums, tokens)


def test_cancelling_values_keep_their_digits(backend: Backend):
    """Terms of 1e4 that cancel to about 1: fp32 sums would be wrong in the third digit."""
    tokens = make_tokens((2001, 2001))
    tokens.values[:2000:2] = 1e4 + torch.randn(1000)
    tokens.values[1:2000:2] = -tokens.values[:2000:2]
    assert_sums_are_exact(backend.sums(tokens), tokens)


@pytest.mark.parametrize("has_mask", [False, True], ids=["all", "masked"])
def test_a_sequence_has_the_same_bits_wherever_it_lies(backend: Backend, has_mask: bool):
    lengths = (1025, 700, 3, 5000)
    tokens = make_tokens(lengths, scale=30.0, has_weights=True, has_mask=has_mask)
    whole = backend.sums(tokens)
    for number, span in enumerate(tokens.spans()):
        for before in (0, 1, 7, 300):
            other = make_tokens((before, lengths[number], 40), has_weights=True, has_mask=has_mask)
            place = slice(before, before + lengths[number])
            other.values[place] = tokens.values[span]
            other.weights[place] = tokens.weights[span]
            if has_mask:
                other.mask[place] = tokens.mask[span]
            assert bits(backend.sums(other)[1:2]) == bits(whole[number : number + 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("num_pairs", [1, 3, 20 if IS_INTERPRETED else 600])
def test_policy_equal_to_reference_is_ln_2_exactly(backend: Backend, num_pairs: int, smoothing: float):
    if backend.name == "cuda-emulated":  # ten milliseconds a pair
        num_pairs = min(num_pairs, 40)
    tokens = make_tokens((40, 70) * num_pairs, scale=9.0)
    ref_sums = backend.sums(tokens)
    terms = SigmoidTerms(beta=0.1, preferred=1 - smoothing, divisor=float(num_pairs), ref_sums=ref_sums)
    results = backend.pairs(tokens, terms)
    assert results.loss.float().item() == LN_2
    g = torch.tensor((0.5 - (1 - smoothing)) * 0.1 / num_pairs, dtype=torch.float64)
    sign = torch.tensor([1.0] * 40 + [-1.0] * 70, dtype=torch.float64).repeat(num_pairs)
    assert_rounded_once(results.g, g * sign, "g")


def test_many_pairs_are_added_up(backend: Backend):
    """More than the 512 that the last block or program takes at once."""
    num_pairs = 520
    tokens = make_tokens((1, 0) * num_pairs)
    weights = torch.randint(1, 1000, (num_pairs,)).float()
    terms = SigmoidTerms(beta=0.1, pair_weights=weights, ref_sums=torch.zeros(2 * num_pairs))
    tokens.values.zero_()
    results = backend.pairs(tokens, terms)
    truth = weights.double().sum() * torch.tensor(2.0, dtype=torch.float64).log()
    assert_rounded_once(results.loss.float(), truth, "loss")


@pytest.mark.parametrize("h", [0.0, 1e-6, 0.5, 3.0, 12.0, 30.0, 45.0, 80.0, 104.0, 800.0, 1e30])
def test_losses_and_gradients_keep_their_digits(backend: Backend, h: float):
    """Of one pair, since among many a large loss hides the small ones; either answer preferred."""
    tokens = make_tokens((1, 0))
    for sign in (1.0, -1.0):
        tokens.values[0] = sign * h
        results = backend.pairs(tokens, SigmoidTerms(beta=1.0))
        x = tokens.values.double()
        assert_rounded_once(results.loss.float(), -torch.nn.functional.logsigmoid(x)[0], "loss")
        assert_rounded_once(results.g, -torch.sigmoid(-x), "g")


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_bad_token_stays_in_its_pair(backend: Backend, value: str):
    """The same bits in all other pairs."""
    case = PairCase("ordinary", has_ref=True, has_weights=True)
    data = make_pairs(case)
    clean = backend.pairs(data.tokens, data.terms)
    first, last = data.tokens.offsets[4].item(), data.tokens.offsets[6].item()  # pair 2
    data.tokens.values[first + 3], data.tokens.weights[first + 3] = float(value), 1.0
    results = backend.pairs(data.tokens, data.terms)
    others = torch.ones(len(results.g), dtype=torch.bool)
    others[first:last] = False
    assert bits(results.g[others]) == bits(clean.g[others])
    assert bits(results.sums[:4]) == bits(clean.sums[:4]) and bits(results.sums[5:]) == bits(clean.sums[5:])
    if value == "nan":
        assert results.loss.isnan() and results.sums[4].isnan() and results.g[first:last].isnan().all()
    else:  # an answer that cannot be: an infinite loss with a finite gradient
        assert results.loss == torch.inf and results.sums[4] == -torch.inf
        assert results.g[first:last].isfinite().all() and (results.g[first:last] != 0).any()


@pytest.mark.parametrize("has_mask", [False, True], ids=["empty", "masked"])
def test_a_pair_without_tokens_counts_nowhere(backend: Backend, has_mask: bool):
    lengths = (4, 9, 5, 6, 8, 2) if has_mask else (4, 9, 0, 0, 8, 2)
    tokens = make_tokens(lengths)
    if has_mask:
        tokens.mask = torch.ones(len(tokens.values), dtype=torch.bool)
        tokens.mask[13:24] = False
    good, bad = torch.full((3,), 0.5), torch.tensor([0.5, math.nan, 0.5])
    ref = torch.zeros(6)
    clean = backend.pairs(tokens, SigmoidTerms(good, good, good, good, 2.0, ref))
    bad_ref = ref.clone()
    bad_ref[2:4] = math.inf
    results = backend.pairs(tokens, SigmoidTerms(bad, bad, bad, bad, 2.0, bad_ref))
    assert_same_bits(results, clean)
    alone = Tokens(tokens.values[torch.arange(len(tokens.values)) < 13], tokens.offsets[:3], None, None)
    last = Tokens(tokens.values[-10:], torch.tensor([0, 8, 10]), None, None)
    terms = SigmoidTerms(0.5, 0.5, 0.5, 0.5, 2.0)
    parts = [backend.pairs(part, terms).loss for part in (alone, last)]
    # fp64 throughout: the losses of parts add up to the whole but for the rounding of three additions.
    assert abs(results.loss - sum(parts)) <= 4 * torch.finfo(torch.float64).eps * sum(parts)
    assert (results.g[13:-10] == 0).all() and results.loss > 0


@pytest.mark.parametrize("preferred", [0.0, 1.0])
@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
def test_an_impossible_outcome_costs_nothing(backend: Backend, preferred: float, is_tensor: bool):
    """h is infinite, on the side of the outcome that is certain: 0 * inf would be NaN."""
    tokens = make_tokens((3, 2))
    tokens.values[4 if preferred else 1] = -torch.inf
    q = torch.tensor([preferred]) if is_tensor else preferred
    results = backend.pairs(tokens, SigmoidTerms(beta=0.1, preferred=q))
    assert results.loss == 0 and (results.g == 0).all()


def test_a_nan_preference_is_not_hidden(backend: Backend):
    tokens = make_tokens((3, 2, 4, 4))
    results = backend.pairs(tokens, SigmoidTerms(beta=0.1, preferred=torch.tensor([0.5, math.nan])))
    assert results.loss.isnan() and results.g[5:].isnan().all() and results.g[:5].isfinite().all()


def test_no_pair_is_a_loss_of_0(backend: Backend):
    results = backend.pairs(make_tokens(()), SigmoidTerms(beta=0.1))
    assert results.loss == 0 and len(results.sums) == len(results.g) == 0


@pytest.mark.parametrize(
    "offsets", [(-5, 1 << 40, 3, 3, -(1 << 62)), (9, 4, 2, 1, 0), (0, 10, 10, 10, 11)], ids=str
)
def test_wrong_offsets_touch_no_other_memory(backend: Backend, offsets: tuple[int, ...]):
    """Every run checks the guards around the outputs; the far offsets would leave the process's memory."""
    tokens = make_tokens((3, 2, 4, 1), has_weights=True, has_mask=True)
    tokens.offsets = torch.tensor(offsets)
    backend.sums(tokens)
    backend.pairs(tokens, SigmoidTerms(beta=0.1))


def test_outputs_depend_on_every_option(backend: Backend):
    """No term is dropped: moving one moves the loss and g."""
    tokens = make_tokens((5, 6, 7, 8))
    base = SigmoidTerms(0.1, 0.2, 0.9, 1.0, 2.0, -torch.rand(4))
    before = backend.pairs(tokens, base)
    moved: dict[str, Any] = {name: 0.3 for name in ("beta", "margin", "preferred", "pair_weights", "divisor")}
    moved["ref_sums"] = base.ref_sums - torch.tensor([1.0, 0.0, 0.0, 1.0])
    for name, value in moved.items():
        after = backend.pairs(tokens, replace(base, **{name: value}))
        assert after.loss != before.loss and (after.g != before.g).all(), name
        if name != "divisor" and name != "ref_sums":  # a tensor of the same number is the same, and per pair
            both = backend.pairs(tokens, replace(base, **{name: torch.full((2,), value)}))
            assert_rounded_once(both.loss.float(), after.loss, name)
            one = backend.pairs(tokens, replace(base, **{name: torch.tensor([value, getattr(base, name)])}))
            # A tensor is fp32, which moves the number by up to eps / 2 of itself.
            torch.testing.assert_close(one.g[:11], after.g[:11], rtol=1e-6, atol=0)
            torch.testing.assert_close(one.g[11:], before.g[11:], rtol=1e-6, atol=0)


@pytest.mark.skipif(sequence_cpu.unavailable_reason() is not None, reason="fastdpo._C is not built")
def test_the_number_of_threads_changes_no_bit():
    case = PairCase("ordinary", has_ref=True, has_weights=True, has_mask=True, pair_weights="tensor")
    data = make_pairs(case)
    long = make_tokens((50_000, 40_000, 3, 60_000))  # enough for several threads
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(
            [
                *run_pairs(sequence_cpu, data.tokens, data.terms, "cpu"),
                *run_pairs(sequence_cpu, long, SigmoidTerms(beta=0.1), "cpu"),
                run_sums(sequence_cpu, long, "cpu"),
            ]
        )
    for other in results[1:]:
        assert all(bits(a) == bits(b) for a, b in zip(results[0], other, strict=True))


BAD_MEMORY: dict[str, dict[str, Any]] = {
    "values": {"values": torch.zeros(5, dtype=torch.float64)},
    "offsets": {"offsets": torch.tensor([0, 2, 5], dtype=torch.int32)},
    "weights": {"weights": torch.zeros(4)},
    "mask": {"mask": torch.zeros(5, dtype=torch.uint8)},
    "sums": {"outputs": SigmoidOutputs(torch.zeros(3), torch.zeros((), dtype=torch.float64), torch.zeros(5))},
    "loss": {"outputs": SigmoidOutputs(torch.zeros(2), torch.zeros(()), torch.zeros(5))},
    "g": {
        "outputs": SigmoidOutputs(torch.zeros(2), torch.zeros((), dtype=torch.float64), torch.zeros(10)[::2])
    },
    "beta": {"terms": SigmoidTerms(beta=torch.tensor(0.1))},
    "preferred": {"terms": SigmoidTerms(beta=0.1, preferred=torch.ones(1, dtype=torch.float64))},
    "divisor": {"terms": SigmoidTerms(beta=0.1, divisor=torch.ones(1))},
    "ref_sums": {"terms": SigmoidTerms(beta=0.1, ref_sums=torch.zeros(1))},
}


@pytest.mark.skipif(sequence_cpu.unavailable_reason() is not None, reason="fastdpo._C is not built")
@pytest.mark.parametrize("name", [None, *BAD_MEMORY])
def test_memory_the_compiled_kernels_cannot_take_is_refused(name: str | None):
    call: dict[str, Any] = {
        "values": torch.zeros(5),
        "offsets": torch.tensor([0, 2, 5]),
        "terms": SigmoidTerms(beta=0.1),
        "outputs": SigmoidOutputs(torch.zeros(2), torch.zeros((), dtype=torch.float64), torch.zeros(5)),
    }
    if name is None:
        sequence_cpu.sigmoid_pairs(**call)
        return
    with pytest.raises(ValueError, match=f"^{name}: "):
        sequence_cpu.sigmoid_pairs(**(call | BAD_MEMORY[name]))


@pytest.mark.skipif(sequence_cpu.unavailable_reason() is not None, reason="fastdpo._C is not built")
def test_an_odd_number_of_answers_is_refused():
    outputs = SigmoidOutputs(torch.zeros(1), torch.zeros((), dtype=torch.float64), torch.zeros(5))
    with pytest.raises(ValueError, match=r"^offsets: .* 1 sequences"):
        sequence_cpu.sigmoid_pairs(torch.zeros(5), torch.tensor([0, 5]), SigmoidTerms(beta=0.1), outputs)


@pytest.mark.skipif(IS_INTERPRETED or HAS_GPU, reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, at_least=len(mixed_cases(2)) + 1, chosen="triton")
