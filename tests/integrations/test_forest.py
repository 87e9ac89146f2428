"""Forests: what shares what, and attention over exactly that, by every backend."""

from __future__ import annotations

import base64
import copy
import importlib.util
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import Forest, forest_batch
from fastdpo.integrations.forest import attention, backends
from fastdpo.integrations.forest.attention import own_attention, restore_attention
from fastdpo.integrations.forest.backends import attend
from fastdpo.integrations.forest.plant import plant
from fastdpo.integrations.model import patch_model, unpatch_model
from fastdpo.types import TokenLayout
from tests.integrations.tiny import make_model

# Two roots; one with a tree of depth three whose inner node has three children.
FOREST = Forest((5, 3, 4, 2, 1, 6, 7), (-1, 0, 1, 1, 1, 0, -1))


def seen_by(forest: Forest) -> Tensor:
    """``(N, N)`` bool: which keys each query sees, from the definition."""
    owner = torch.arange(len(forest.lengths)).repeat_interleave(torch.tensor(forest.lengths))
    on_path = torch.zeros(len(forest.lengths), len(forest.lengths), dtype=torch.bool)
    for segment in range(len(forest.lengths)):
        on_path[segment, list(forest.path(segment))] = True
    return on_path[owner[:, None], owner] & torch.ones(len(owner), len(owner)).tril().bool()


def dense(q: Tensor, k: Tensor, v: Tensor, forest: Forest, **options: Any) -> Tensor:
    """Scores of the whole row, and a mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (options.get("scaling") or q.shape[-1] ** -0.5)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = seen_by(forest)
    if (window := options.get("sliding_window")) is not None:
        position = forest.position_ids[0]
        mask &= position[:, None] - position < window
    scores = scores.masked_fill(~mask, -torch.inf)
    if (sinks := options.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : v.shape[2]] @ v).transpose(1, 2)


def heads(count: int, tokens: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(1, count, tokens, 8, generator=generator, dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def over(q: Tensor, k: Tensor, v: Tensor, forest: Forest, **options: Any) -> Tensor:
    return attend(q, k, v, forest.pieces(), **options)


def assert_alike(forest: Forest, **options: Any) -> None:
    """Values and gradients, with two query heads a key head."""
    inputs = [heads(4, forest.num_tokens), *(heads(2, forest.num_tokens, seed=s) for s in (1, 2))]
    if "s_aux" in options:
        inputs.append(options["s_aux"])
    found, wanted = over(*inputs[:3], forest, **options), dense(*inputs[:3], forest, **options)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((wanted * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.promise(59)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.3},
        {"sliding_window": 3},
        {"sliding_window": 4, "softcap": 1.5},
        {"softcap": 1.5},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)},
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_attention_sees_the_path_and_nothing_else(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_QUERY_BLOCK", 4)
    for forest in (FOREST, Forest.of_sequences((4, 1, 9)), Forest((12,), (-1,)), Forest((6, 9), (-1, 0))):
        assert_alike(forest, **options)


@st.composite
def forests(draw: Any) -> Forest:
    count = draw(st.integers(1, 7))
    lengths = tuple(draw(st.integers(1, 5)) for _ in range(count))
    return Forest(lengths, tuple(draw(st.integers(-1, number - 1)) for number in range(count)))


@pytest.mark.promise(59)
@settings(deadline=None, max_examples=60)
@given(forests(), st.sampled_from([None, 2, 5]))
def test_any_forest(forest: Forest, window: int | None):
    assert_alike(forest, sliding_window=window)
    assert forest.num_pairs == int(seen_by(forest).sum())


def test_the_work_is_that_of_pairs_that_see_each_other(monkeypatch: pytest.MonkeyPatch):
    """A causal kernel is given squares, others the rectangle of their path; none the square of the row."""
    real, work = F.scaled_dot_product_attention, []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        work.append((q.shape[2], k.shape[2], options["is_causal"]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    over(heads(2, 28), heads(2, 28), heads(2, 28), FOREST)
    assert work == [(12, 12, True), (2, 10, False), (1, 9, False), (6, 11, False), (7, 7, True)]


def test_a_variable_length_kernel_gets_each_chains_path(monkeypatch: pytest.MonkeyPatch):
    """What torch's kernel would be given on a GPU, through one that follows its documented contract here."""

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_q.dtype == cu_k.dtype == torch.int32 and enable_gqa
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        found = []
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            one, keys, values = (t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d]))
            gap = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            mask = (gap >= 0) & ((window_size[0] < 0) | (gap <= window_size[0]))
            attend_one = F.scaled_dot_product_attention
            found.append(attend_one(one, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)[0])
        return torch.cat(found, 1).transpose(0, 1)

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(backends, "_varlen_kernel", lambda *_, **__: backends._torch_varlen)
    for forest in (FOREST, Forest.of_sequences((4, 1, 9))):
        for window in (None, 3):
            assert_alike(forest, sliding_window=window)


def test_keys_that_lie_in_order_are_not_copied():
    """Of packed sequences, of one path, and of none but these."""

    def index(forest: Forest, num_keys: int) -> Tensor | None:
        return backends._bounds(forest.pieces(), num_keys, torch.device("cpu"))[1]

    assert index(Forest.of_sequences((4, 1, 9)), 14) is None
    assert index(Forest((6, 9), (-1, 0)), 15) is None
    found = index(Forest((3, 2, 1), (-1, 0, 0)), 6)
    assert found is not None and found.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    # Of a chunk of the second sequence alone: keys before it are there.
    second = backends._bounds(Forest.of_sequences((2, 3)).pieces(2, 5), 5, torch.device("cpu"))[1]
    assert second is not None and second.tolist() == [2, 3, 4]


def test_which_kernel_where(monkeypatch: pytest.MonkeyPatch):
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    def chosen(
        query: Any = OnGpu, dropout: float = 0.0, softcap: float | None = None, sinks: bool = False
    ) -> Any:
        return backends._varlen_kernel(query, dropout=dropout, softcap=softcap, has_sinks=sinks)

    assert chosen() is backends._torch_varlen
    assert chosen(heads(2, 3)) is None and chosen(sinks=True) is None
    assert chosen(type("InFp32", (OnGpu,), {"dtype": torch.float32})) is None
    monkeypatch.setattr(backends, "_flash_attn", lambda: None)
    assert chosen(softcap=2.0) is None and chosen(dropout=0.1) is None
    seen: dict[str, Any] = {}

    def flash(q: Tensor, *_: Any, **options: Any) -> Tensor:
        seen.update(options)
        return q

    monkeypatch.setattr(backends, "_flash_attn", lambda: flash)
    q = heads(2, 28)
    assert chosen(softcap=2.0)(q, q, q, FOREST.pieces(), 0.5, 6).shape == (1, 28, 2, 8)
    assert seen == {
        "dropout_p": 0.0, "softmax_scale": 0.5, "causal": True, "window_size": (5, 0), "softcap": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ((), (), "got 0 lengths and 0 parents"),
        ((3,), (-1, 0), "got 1 lengths and 2 parents"),
        ((3, 0), (-1, 0), "got 0 tokens in segment 1"),
        ((3, 2), (-1, 1), "got parent 1 of segment 1"),
        ((3, 2), (-2, 0), "got parent -2 of segment 0"),
    ],
)
def test_what_is_no_forest(lengths: tuple[int, ...], parents: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        Forest(lengths, parents)


def texts(*words: str) -> list[tuple[int, Tensor]]:
    return [(number, torch.tensor([*word.encode()])) for number, word in enumerate(words)]


def spelled(words: tuple[str, ...], shortest: int) -> list[tuple[list[str], tuple[int, ...], dict[int, int]]]:
    trees = plant(texts(*words), shortest=shortest)
    return [(["".join(map(chr, s)) for s in tree.segments], tree.parents, tree.ends) for tree in trees]


def test_what_is_shared():
    words = ("the cat sat", "the cat ran", "a dog", "the cat", "the cow", "", "the cat ran")
    assert spelled(words, 1) == [
        (["the c", "at", " ", "sat", "ran", "ow"], (-1, 0, 1, 2, 2, 0), {3: 1, 0: 3, 1: 4, 6: 4, 4: 5}),
        (["a dog"], (-1,), {2: 0}),
    ]
    # Beginnings of six tokens and more: that of "the cow" is shorter.
    assert spelled(words, 6) == [
        (["the cat", " ", "sat", "ran"], (-1, 0, 1, 1), {3: 0, 0: 2, 1: 3, 6: 3}),
        (["a dog"], (-1,), {2: 0}),
        (["the cow"], (-1,), {4: 0}),
    ]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.text("ab", max_size=9), min_size=1, max_size=8), st.integers(1, 4))
def test_every_sequence_is_spelled_by_its_path(words: list[str], shortest: int):
    trees = plant(texts(*words), shortest=shortest)
    found = {}
    for tree in trees:
        ids = torch.cat(tree.segments)
        for number, segment in tree.ends.items():
            found[number] = "".join(map(chr, ids[tree.forest.places(segment)]))
    assert found == {number: word for number, word in enumerate(words) if word}
    if shortest == 1:  # then each beginning is there once
        beginnings = {word[:end] for word in words for end in range(1, len(word) + 1)}
        assert sum(tree.num_tokens for tree in trees) == len(beginnings)


# In a loop of one's own


SEQUENCES = [[*range(3, 30), *tail] for tail in ([40, 41, 42], [40, 41, 50, 51], [60])] + [[70, 71, 72, 73]]
LABELS = [[-100] * 27 + sequence[27:] for sequence in SEQUENCES[:3]] + [[-100, -100, 72, 73]]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "gpt-neox", "granite", "olmo", "mixtral"])
def test_a_plain_loop(family: str):
    """The docstring's four lines: log-probabilities and gradients of the sequences by themselves."""
    model = make_model(family)
    alone = copy.deepcopy(model)
    rows = forest_batch(SEQUENCES, LABELS)
    (call,) = rows.calls
    assert call["input_ids"].shape == (1, 29 + 1 + 2 + 1 + 4)
    out = patch_model(model)(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True)
    out.logps.square().sum().backward()
    wanted = []
    for sequence, label in zip(SEQUENCES, LABELS, strict=True):
        ids, targets = torch.tensor([sequence]), torch.tensor(label[1:])
        logps = alone(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scored = targets != -100
        wanted.append(logps[scored].gather(1, targets[scored, None])[:, 0])
    torch.cat(wanted).square().sum().backward()
    torch.testing.assert_close(out.logps, torch.cat(wanted), rtol=0, atol=2e-5)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            assert (ours.grad - theirs.grad).norm() <= 2e-5 * theirs.grad.norm().clamp(min=1e-3), name


def test_other_calls_of_the_model_are_what_they_were():
    model = patch_model(make_model("gemma3"))
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    before = model(**padded).logits
    own = own_attention(model.config)
    rows = forest_batch(SEQUENCES, LABELS)
    model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True)
    assert model.config._attn_implementation != own == own_attention(model.config)
    assert torch.equal(model(**padded).logits, before)
    assert "_in_forests" not in model.config.to_json_string()
    assert torch.equal(
        model.generate(**padded, max_new_tokens=3, do_sample=False)[:, :4], padded["input_ids"]
    )
    restore_attention(model)
    assert model.config._attn_implementation == own


def test_a_model_in_another_process_knows_its_attention():
    """One that was used on forests, pickled; and what unpatch_model leaves."""
    model = patch_model(make_model("llama"))
    rows = forest_batch(SEQUENCES, LABELS)
    wanted = model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True).logps
    text = base64.b64encode(pickle.dumps((model, rows))).decode()
    program = (
        "import base64, pickle, sys; model, rows = pickle.loads(base64.b64decode(sys.stdin.read()));"
        "out = model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True);"
        "print(float(out.logps.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) == pytest.approx(float(wanted.sum()), rel=1e-6)
    assert unpatch_model(model).config._attn_implementation == "sdpa"


def test_older_transformers_are_for_all_else(monkeypatch: pytest.MonkeyPatch):
    """Without a registry the hook is imported all the same, and forests say what they need."""
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    spec: Any = importlib.util.spec_from_file_location("older", attention.__file__)
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    with pytest.raises(ValueError, match=r"forest: got transformers \d.*, wanted 4.53 or newer"):
        with older.attention_by(make_model("llama"), attention.OverForest(Forest.of_sequences([3]))):
            pass


def test_checkpointed_layers_see_the_forest_again():
    rows, grads = forest_batch(SEQUENCES, LABELS), []
    for is_checkpointed in (False, True):
        model = patch_model(make_model("llama")).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True)
        rows = forest_batch(SEQUENCES[:2], LABELS[:2])  # of the next batch, before this one's backward pass
        model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True)
        rows = forest_batch(SEQUENCES, LABELS)
        out.logps.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forest": [5]}, "forest: got list, wanted a Forest"),
        ({"forest": Forest((9,), (-1,))}, r"input_ids: got shape \(1, 37\), wanted \(1, 9\)"),
        ({"attention_mask": torch.ones(1, 37)}, "attention_mask: got a value together with forest"),
        ({"use_cache": True}, "use_cache: got"),
    ],
)
def test_calls_that_no_forest_goes_with(changes: dict[str, Any], message: str):
    model = patch_model(make_model("llama"))
    rows = forest_batch(SEQUENCES, LABELS)
    with pytest.raises(ValueError, match=message):
        model(row_batches=[{**rows.calls[0], **changes}], token_layout=rows.tokens, return_logps=True)


@pytest.mark.parametrize(
    ("sequences", "labels", "message"),
    [
        ([], [], "sequences: got 0 with 0 labels"),
        ([[3, 4]], [[3, 4], [5]], "sequences: got 1 with 2 labels"),
        ([[3, 4]], [[-100, 4, 5]], r"shapes \(2,\) and \(3,\) of sequence 0"),
        ([[3, 4], [3, 5]], [[-100, 4], [-100, 6]], "other tokens than sequence 1 has"),
    ],
)
def test_sequences_that_are_none(sequences: Any, labels: Any, message: str):
    with pytest.raises(ValueError, match=message):
        forest_batch(sequences, labels)


def test_positions_may_be_left_out():
    model = patch_model(make_model("llama"))
    rows = forest_batch(SEQUENCES, LABELS)
    (call,) = rows.calls
    calls = [call, {"input_ids": call["input_ids"], "forest": call["forest"]}]
    found = [model(row_batches=[c], token_layout=rows.tokens, return_logps=True).logps for c in calls]
    assert torch.equal(*found)


def test_a_layout_by_hand_is_that_of_the_sequences():
    rows = forest_batch(SEQUENCES[:2], LABELS[:2])
    wanted = TokenLayout(
        torch.tensor([26, 27, 28, 26, 27, 28, 30]), torch.tensor([40, 41, 42, 40, 41, 50, 51]),
        torch.tensor([0, 0, 0, 1, 1, 1, 1]), (3, 4),
    )  # fmt: skip
    assert rows.tokens.lengths == wanted.lengths
    for name in ("token_index", "target_ids", "sequence_ids"):
        assert torch.equal(getattr(rows.tokens, name), getattr(wanted, name)), name
