"""One head with its tokens, what is asked of it, and the truth in fp64 that every contender is held to.

Data are peaked as those of trained models: logits of standard deviation 3, every third label the argmax;
zeros would run faster than anything real. Sequences are equally long, a share of each is prompt (before) and
padding (behind) without a label. Chosen answers stand first, then the rejected ones, as in TRL and Liger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender
from fastdpo import TokenLayout
from fastdpo.testing.accuracy import capability_of, gradient_bound, logps_bound, total_bound

# (hidden, vocabulary) of real models.
MODELS = {
    "gemma-3-270m": (640, 262144),
    "qwen2.5-0.5b": (896, 151936),
    "llama-3.2-1b": (2048, 128256),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "gemma-2-9b": (3584, 256000),
    "llama-3-70b": (8192, 128256),
    "small": (256, 32000),
    "tiny": (64, 1003),
}
# What is asked for, with the products over the labelled tokens that no method can do without.
PASSES = {"score": 1, "stash": 2, "cache": 3, "pairs-frozen": 2, "pairs": 3, "ce": 3}
TASKS = {
    "score": "log-probabilities, no gradient",
    "stash": "log-probabilities and dhidden for any upstream gradient per token: the head is frozen",
    "cache": "log-probabilities, dhidden and dweight for any upstream gradient per token",
    "pairs-frozen": "DPO loss of pairs and dhidden: the head is frozen",
    "pairs": "DPO loss of pairs, dhidden and dweight",
    "ce": "mean cross-entropy, dhidden and dweight",
}
WITH_DWEIGHT = ("cache", "pairs", "ce")
OF_PAIRS = ("pairs", "pairs-frozen")
MAX_LENGTH = 1024
IGNORED = -100
BETA = 0.1

# Peers round logits to the inputs' dtype: `_explained` says by how much a value may be off for it. Their
# gradients are summed in bf16, over up to 64 chunks: 1e-2 (torch 2.13, Liger), three times that. What is
# scaled by 1.05 is refused all the same.
PEER_GRADIENT_BOUND = {
    torch.float32: 2**-11,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-7,
    torch.float64: 2**-36,
}
CHECKED = 256


@dataclass(frozen=True)
class Size:
    """One problem: a model's head, N positions, and the share of them without a label.

    ``vocab`` and ``sequence_length`` replace the model's vocabulary and the usual length of a sequence.
    """

    model: str
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16
    ignored_percent: int = 0
    vocab: int | None = None
    sequence_length: int | None = None

    @property
    def hidden_size(self) -> int:
        return MODELS[self.model][0]

    @property
    def vocab_size(self) -> int:
        return self.vocab or MODELS[self.model][1]

    @property
    def length(self) -> int:
        """T, positions of a sequence: at least two pairs fill the N positions, unless it is given."""
        return self.sequence_length or min(MAX_LENGTH, self.num_tokens // 4)

    @property
    def num_sequences(self) -> int:
        return self.num_tokens // self.length

    @property
    def answer_length(self) -> int:
        return self.length - self.length * self.ignored_percent // 100

    @property
    def num_labelled(self) -> int:
        return self.num_sequences * self.answer_length

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def flop(self, task: str) -> int:
        """Of the products that the task cannot do without."""
        return PASSES[task] * 2 * self.num_labelled * self.hidden_size * self.vocab_size

    @property
    def bytes_held(self) -> int:
        """Inputs, gradients and an fp64 copy of the weight, which every check makes."""
        width, vocab = self.hidden_size, self.vocab_size
        tensors = 2 * (self.num_tokens * width + vocab * width) * self.dtype.itemsize
        return tensors + vocab * width * 8 + 3 * CHECKED * vocab * 8

    def bytes_needed(self, task: str) -> int:
        """What is held, and the floor's N x V buffers."""
        return self.bytes_held + self.floor_bytes(task)

    def floor_bytes(self, task: str) -> int:
        """What the floor holds while all take turns: its N x V buffers, its rows and their gradient."""
        buffers = 1 if task == "score" else 2
        products = buffers * self.num_labelled * self.vocab_size
        rows = 2 * self.num_labelled * self.hidden_size + self.vocab_size * self.hidden_size
        return (products + rows) * self.dtype.itemsize


class Outcome(NamedTuple):
    """What a method gives: values, which are log-probabilities of the labelled tokens (N_labelled,), of
    answers (2P,) for tasks of pairs, or the loss () for ``ce``; and the gradients asked for."""

    values: Tensor
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


class Wrong(AssertionError):
    """A contender's result is not what it has to be."""


class HeadProblem:
    """Inputs of one size on a device: hidden (N, H), weight (V, H), labels (N,), -100 where there is none."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.size, self.device = size, device

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(size.dtype)

        self.hidden = normal(size.num_tokens, size.hidden_size, std=1.0)
        self.weight = normal(size.vocab_size, size.hidden_size, std=3 / size.hidden_size**0.5)
        labels = torch.randint(size.vocab_size, (size.num_tokens,), generator=generator, device=device)
        for start in range(0, size.num_tokens, 512):
            best = (self.hidden[start : start + 512] @ self.weight.t()).argmax(-1)
            labels[start : start + 512 : 3] = best[::3]
        position = torch.arange(size.num_tokens, device=device) % size.length
        before = (size.length - size.answer_length) // 2
        is_labelled = (position >= before) & (position < before + size.answer_length)
        self.labels = labels.masked_fill(~is_labelled, IGNORED)
        self.index = is_labelled.nonzero()[:, 0]  # (N_labelled,), sequence by sequence
        self.targets = labels[self.index]
        self.upstream = torch.randn(size.num_labelled, generator=generator, device=device)
        sequence = self.index // size.length
        pair_by_pair = (sequence % (size.num_sequences // 2)).argsort(stable=True)
        self.layout = TokenLayout(
            self.index[pair_by_pair], self.targets[pair_by_pair], sequence[pair_by_pair],
            (size.answer_length,) * size.num_sequences,
        )  # fmt: skip

    def values_of(self, task: str, logps: Tensor) -> Tensor:
        """The task's values from the labelled tokens' log-probabilities."""
        # A caller sums in fp32: a sum of 512 tokens in bf16 is off by 8 nats, which is no peer's mistake.
        logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
        if task in OF_PAIRS:
            return logps.view(self.size.num_sequences, -1).sum(1)
        return -logps.mean() if task == "ce" else logps

    def loss_of(self, task: str, values: Tensor) -> Tensor:
        """What is differentiated: the DPO loss without a reference, the mean, or the upstream's sum."""
        if task == "ce":
            return values
        if task in OF_PAIRS:
            chosen, rejected = values.chunk(2)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()
        return (values * self.upstream.to(values.dtype)).sum()

    def compose(self, task: str, token_logps: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        """The task on top of a method that gives the labelled tokens' log-probabilities, by autograd."""
        hidden = self.hidden.detach().requires_grad_(task != "score")
        weight = self.weight.detach().requires_grad_(task in WITH_DWEIGHT)
        with torch.set_grad_enabled(task != "score"):
            values = self.values_of(task, token_logps(hidden, weight))
            if task == "score":
                return Outcome(values)
            loss = self.loss_of(task, values)
        wanted = (hidden, weight) if task in WITH_DWEIGHT else (hidden,)
        return Outcome(values.detach(), *torch.autograd.grad(loss, wanted))

    @cached_property
    def _truth(self) -> dict[str, Tensor]:
        """fp64: logps and logsumexp of all labelled tokens, and the largest logit."""
        weight = self.weight.double()
        logps, lse = torch.empty(2, len(self.index), dtype=torch.float64, device=self.device)
        largest = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in torch.arange(len(self.index), device=self.device).split(CHECKED):
            logits = self.hidden[self.index[rows]].double() @ weight.t()
            lse[rows] = logits.logsumexp(1)
            logps[rows] = logits.gather(1, self.targets[rows, None])[:, 0] - lse[rows]
            largest = torch.maximum(largest, logits.abs().max())
        return {"logps": logps, "lse": lse, "largest": largest}

    @cached_property
    def _directions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In fp64, evenly spread: tokens and their D W, entries of the vocabulary and their columns of D."""
        hidden, weight, lse = self.hidden[self.index], self.weight.double(), self._truth["lse"]
        num = len(self.index)
        tokens = torch.linspace(0, num - 1, min(CHECKED, num), device=self.device).round().long().unique()
        p = torch.exp(hidden[tokens].double() @ weight.t() - lse[tokens, None])
        dw = weight[self.targets[tokens]] - p @ weight
        # Entries that are labels, whose gradient is large, and entries that need not be.
        even = torch.linspace(0, len(weight) - 1, CHECKED, device=self.device).round().long()
        entries = torch.cat((even, self.targets[tokens])).unique()
        d = -torch.exp(hidden.double() @ weight[entries].t() - lse[:, None])
        d += (self.targets[:, None] == entries).double()
        return tokens, dw, entries, d

    def _gradients_at(self, task: str, values: Tensor) -> dict[str, Tensor]:
        """dhidden of the checked tokens, dweight of the checked entries, for a loss of these values; fp64."""
        if task == "ce":
            g = torch.full_like(self._truth["logps"], -1 / len(self.index))
        else:
            leaf = values.detach().double().requires_grad_()
            (g,) = torch.autograd.grad(self.loss_of(task, leaf), leaf)
            g = g.repeat_interleave(len(self.index) // len(g))
        tokens, dw, _, d = self._directions
        hidden = self.hidden[self.index].double()
        return {"dhidden": g[tokens, None] * dw, "dweight": d.t() @ (g[:, None] * hidden)}

    def check(self, task: str, outcome: Outcome, *, is_exact: bool) -> dict[str, float]:
        """Errors against fp64: of values in nats, of gradients relative to their norm.

        Args:
            is_exact: held to what fastdpo promises (``fastdpo.testing.accuracy``); otherwise to what logits
                rounded to the inputs' dtype explain.

        Raises:
            Wrong: with what is off and by how much.
        """
        dtype = self.size.dtype
        truth = self.values_of(task, self._truth["logps"])
        off_by = outcome.values.double() - truth
        error = off_by.abs().max().item()
        errors = {"logps_error_nats": error}
        what = {"ce": "the loss is", "pairs": "sums of log-probabilities are"}.get(
            task.removesuffix("-frozen"), "log-probabilities are"
        )
        allowed = self._allowed(task, outcome.values, is_exact)
        if not error <= allowed:
            raise Wrong(f"{what} off by {error:.3e} nats, allowed {allowed:.1e}; not timed")
        mean, of_mean = abs(off_by.mean().item()), self._allowed_mean(task, outcome.values, is_exact)
        if not mean <= of_mean:
            raise Wrong(f"{what} off by {mean:.3e} nats on average, allowed {of_mean:.1e}; not timed")
        if outcome.dhidden is None:
            return errors
        tokens, _, entries, _ = self._directions
        limit = self._gradient_bound if is_exact else PEER_GRADIENT_BOUND[dtype]
        true_gradients = self._gradients_at(task, truth)
        # A margin that is off moves a pair's whole gradient: no mistake in it, and it shows in the errors.
        own_gradients = self._gradients_at(task, outcome.values)
        got = {"dhidden": outcome.dhidden[self.index[tokens]]}
        if outcome.dweight is not None:
            got["dweight"] = outcome.dweight[entries]
        for name, tensor in got.items():
            off = _relative(tensor, own_gradients[name])
            if not off <= limit:
                raise Wrong(f"{name} is off by {off:.3e} of its norm, allowed {limit:.1e}; not timed")
            errors[f"{name}_relative_error"] = _relative(tensor, true_gradients[name])
        if outcome.dhidden[self.labels == IGNORED].count_nonzero():
            raise Wrong("dhidden is not 0 where there is no label; not timed")
        tensors = [tensor for tensor in outcome if tensor is not None]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise Wrong("a result is not finite; not timed")
        return errors

    def _explained(self, tokens: int, values: Tensor, truth: float) -> tuple[float, float]:
        """What rounding alone explains of an error, in nats: of a sum over ``tokens``, and of its result.

        With M the largest |logit| and eps the dtype's spacing at 1, half a spacing is at most h = eps M / 2.
        A token's log-probability has the label's logit off by h, the logsumexp by h (a mean of what its
        logits are off by), and where it is itself rounded, |logp| <= 2 M, by 2 h: b = 4 h = 2 eps M at most.
        Roundings of unlike tokens have random signs and a uniform density, so the sum of n has a standard
        deviation of at most sqrt(n (1 + 1 + 4) / 3) h = 0.35 b sqrt(n); b sqrt(n) is 2.8 of them were all
        logits as large as M, and some ten with logits of standard deviation 3. Not random is what rounding
        adds to a logsumexp: half the variance of a logit's rounding, h^2 / 6 a token. A result that is
        returned in 16 bits is rounded once more, by half a spacing of its own.
        """
        eps = torch.finfo(self.size.dtype).eps
        largest = self._truth["largest"].item()
        rounding = 2 * eps * largest * tokens**0.5 + tokens * (eps * largest / 2) ** 2 / 6
        return rounding, torch.finfo(values.dtype).eps / 2 * truth if values.dtype.itemsize == 2 else 0.0

    @cached_property
    def _logps_bound(self) -> float:
        """What is promised of one of our log-probabilities here, in nats: the hardware's sum and 1e-5."""
        return logps_bound(self.size.hidden_size, self.size.dtype, capability_of(self.device))

    @cached_property
    def _gradient_bound(self) -> float:
        """And of our gradients, relative to their norm."""
        size = self.size
        return gradient_bound(
            size.dtype, hidden_size=size.hidden_size, vocab_size=size.vocab_size,
            num_tokens=size.num_labelled, capability=capability_of(self.device),
        )  # fmt: skip

    def _allowed(self, task: str, values: Tensor, is_exact: bool) -> float:
        """By how much any one value may be off, in nats."""
        count = {"ce": len(self.index)}.get(task, self.size.answer_length if task in OF_PAIRS else 1)
        share = count if task == "ce" else 1  # a mean, not a sum
        promise = total_bound(self._logps_bound, count) / share
        if is_exact:
            return promise
        truth = self.values_of(task, self._truth["logps"]).abs().max().item()
        rounding, of_result = self._explained(count, values, truth)
        return promise + rounding / share + of_result

    def _allowed_mean(self, task: str, values: Tensor, is_exact: bool) -> float:
        """By how much the mean of the values may be off: signs are random, so by less than any of them."""
        if task == "ce":
            return self._allowed(task, values, is_exact)
        tokens = self.size.answer_length if task in OF_PAIRS else 1
        count = len(self.index) // tokens
        promise = total_bound(self._logps_bound, len(self.index)) / count
        if is_exact:
            return promise
        truth = self.values_of(task, self._truth["logps"]).abs().max().item()
        rounding, of_result = self._explained(len(self.index), values, truth)
        return promise + rounding / count + of_result / count**0.5

    def floor(self, task: str) -> Contender:
        """The task's products over the labelled rows as plain GEMMs; D is random: zeros run faster."""
        size = self.size
        hidden = self.hidden[self.index]
        logits = torch.empty(size.num_labelled, size.vocab_size, dtype=size.dtype, device=self.device)
        d = torch.randn_like(logits) if task != "score" else logits
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(self.weight)

        def run() -> None:
            torch.mm(hidden, self.weight.t(), out=logits)
            if task != "score":
                torch.mm(d, self.weight, out=dhidden)
            if task in WITH_DWEIGHT:
                torch.mm(d.t(), hidden, out=dweight)

        return Contender("gemm", run)


@lru_cache(maxsize=1)
def problem_of(size: Size, device: torch.device) -> HeadProblem:
    """One problem at a time, with its truth: the tasks of a size follow each other."""
    return HeadProblem(size, device)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()
