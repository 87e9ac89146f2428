"""LD-DPO's weights of tokens and WPO's weights of pairs in the loop: ``ld_alpha`` and ``use_weighting``."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastdpo.cli import main
from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.batches.pair_tokens import spread_sums
from fastdpo.training.data.row import LD_COLUMN, REF_COLUMNS, Row
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from tests.cli_cases import model_dir  # noqa: F401  (a fixture)
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import COSTS, with_answers, with_numbers
from tests.training.conftest import make_rows, read_metrics, tiny_llama, write_jsonl
from tests.training.loop.kinds_data import real_rows
from tests.training.loop.pair_formulas import (
    CASES,
    LAYOUTS,
    PAIRS,
    assert_step,
    logistic,
    looped,
    sides,
    truth_and_eager,
)
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]
BETA, ALPHA = 0.4, 0.3
COUNTS = (len(PAIRS), 40)
NAMES = (0, 1)
# Each token is right to 1e-5 nats in fp32 at this width, an answer has at most 12, a margin four sums.
LIMIT = 4 * 12 * 1e-5 * BETA


def ld_batch(layout: str, arrangement: str, pairs: Sequence[Any] = PAIRS, alpha: float = ALPHA) -> Any:
    if layout == "padded":
        return PaddedCollator(0, ld_alpha=alpha)(pairs)
    return RowCollator(0, layout, COSTS, (arrangement,), ld_alpha=alpha)(pairs)


def ld_sums(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
    """``(2, P)``: the first min(|y_w|, |y_l|) tokens whole, the others times alpha."""
    found = []
    for own, other in (NAMES, NAMES[::-1]):
        (tokens,) = sides(model, pairs, own)
        shared = [min(len(pair.answers[own].ids), len(pair.answers[other].ids)) for pair in pairs]
        sums = [
            (item.logps[item.mask][:n], item.logps[item.mask][n:])
            for item, n in zip(tokens, shared, strict=True)
        ]
        found.append(torch.stack([first.sum() + ALPHA * rest.sum() for first, rest in sums]))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["copy", "precomputed"])
def test_ld_dpo_in_every_layout(kind: str) -> None:
    """Loss and gradients by the rule; the truth is the paper's formula on the logits in fp64."""
    model, reference = make_model("llama"), make_model("llama", seed=1)
    with torch.no_grad():
        ref = ld_sums(copy.deepcopy(reference).double(), PAIRS)
        scored = [with_numbers(pair, ref_logps=both.float()) for pair, both in zip(PAIRS, ref.T, strict=True)]

    def formula(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
        places = [pair.number - 1 for pair in pairs]
        chosen, rejected = ld_sums(model, pairs) - ref[:, places]
        return logistic(BETA * (chosen - rejected)).sum() / len(PAIRS)

    truth, eager = truth_and_eager(model, formula)
    patch_model(model)
    patch_model(reference)
    given = Reference(kind, reference if kind == "copy" else None)
    for case in CASES:
        batch = ld_batch(*case, scored)
        for settings in ({}, {"fp16": True}):  # in one call of the head, and in two where a scaler may come
            ours = looped(model, batch, given, counts=COUNTS, ld_alpha=ALPHA, beta=BETA, **settings)
            assert_step(ours, truth, eager, loss_limit=LIMIT, name=str(case))
    plain = looped(
        model, ld_batch("padded", "auto", scored, 1.0), given, counts=COUNTS, ld_alpha=1.0, beta=BETA
    )
    assert abs(plain.loss.item() - truth.loss.item()) > 100 * LIMIT


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_first_pairs_keep_their_weights(case: tuple[str, str]) -> None:
    model = patch_model(make_model("llama"))
    settings = {"counts": COUNTS, "ld_alpha": ALPHA}
    part = looped(model, ld_batch(*case).first(3), Reference("precomputed"), **settings)
    alone = looped(model, ld_batch(*case, PAIRS[:3]), Reference("precomputed"), **settings)
    assert part.loss.item() == pytest.approx(alone.loss.item(), abs=LIMIT)


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sums_put_on_single_tokens_are_the_sums(case: tuple[str, str], alpha: float) -> None:
    pairs = [*PAIRS, with_answers(PAIRS[0], torch.zeros(0, dtype=torch.int64), PAIRS[0].answers[1].ids)]
    batch = ld_batch(*case, pairs, alpha)
    weights, mask, bounds = batch.token_weights, batch.mask, batch.bounds
    sums = torch.arange(1.0, 11.0)
    sums[4] = 0.0  # an empty answer
    if alpha == 0.0:
        sums[9] = 0.0  # none of whose tokens counts beside it
    spread = spread_sums(sums, weights, mask, bounds) * weights
    ends = bounds.tolist() if bounds is not None else [n * mask.shape[1] for n in range(11)]
    found = torch.stack([spread.reshape(-1)[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)])
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=0)


def wpo_formula(bound: float | None) -> Any:
    def formula(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
        total = 0.0
        for pair, chosen, rejected in zip(pairs, *sides(model, pairs, *NAMES), strict=True):
            ref = pair.numbers["ref_logps"] @ torch.tensor([1.0, -1.0])
            margin = chosen.logps[chosen.mask].sum() - rejected.logps[rejected.mask].sum() - ref
            means = [(item.logps - item.log_sum_sq)[item.mask].mean() for item in (chosen, rejected)]
            weight = (means[0] + means[1]).exp().detach()
            weight = weight if bound is None else weight.clamp(max=bound)
            total = total + weight * pair.numbers["pair_weights"] * logistic(BETA * margin)
        return total / len(PAIRS)  # type: ignore[return-value]

    return formula


@pytest.mark.parametrize("bound", [None, 0.01])
def test_wpo_in_every_layout(bound: float | None) -> None:
    """The policy's own weights, times those of the data; the truth is the paper's formula in fp64."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # sharp distributions give random answers weights of 1e-10
    pairs = [with_numbers(pair, pair_weights=0.5 + pair.number) for pair in PAIRS]
    truth, eager = truth_and_eager(model, wpo_formula(bound), pairs)
    other, _ = truth_and_eager(model, wpo_formula(None if bound else 0.01), pairs)
    patch_model(model)
    settings = {"use_weighting": True, "wpo_max_weight": bound, "beta": BETA, "pair_weight_column": "w"}
    for layout, arrangement in CASES:
        collator = PaddedCollator(0) if layout == "padded" else RowCollator(0, layout, COSTS, (arrangement,))
        ours = looped(model, collator(pairs), Reference("precomputed"), counts=COUNTS, **settings)
        # A pair's weight here is below 5 times its own from the data, and the margin's part of the loss beta.
        assert_step(ours, truth, eager, loss_limit=20 * LIMIT, name=f"{layout} {arrangement}")
    assert abs(other.loss.item() - truth.loss.item()) > 100 * 20 * LIMIT


def test_the_weights_are_trls(tmp_path: Path) -> None:
    """The loss that TRL's own trainer computes of the same pairs, with ``use_weighting`` and ``ld_alpha``."""
    trl = pytest.importorskip("trl")
    from tests.integrations import trl_runs as runs

    rows = runs.pairs()
    for changes in ({"use_weighting": True}, {"ld_alpha": ALPHA}, {"use_weighting": True, "ld_alpha": ALPHA}):
        settings = runs.settings(tmp_path / "trl", **changes)
        theirs = trl.DPOTrainer(
            model=runs.policy("llama"), ref_model=runs.policy("llama", seed=5), train_dataset=rows,
            args=trl.DPOConfig(**settings), processing_class=runs.make_tokenizer(),
        )  # fmt: skip
        batch = theirs.data_collator([theirs.train_dataset[i] for i in range(4)])
        wanted = theirs._compute_loss(theirs.model, batch, False)
        parts = [
            [torch.tensor(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
            for row in (theirs.train_dataset[i] for i in range(4))
        ]
        pairs = [with_answers(Row(i, prompt, ()), *answers) for i, (prompt, *answers) in enumerate(parts)]
        model, reference = (patch_model(runs.policy("llama", **seed)) for seed in ({}, {"seed": 5}))
        collator = PaddedCollator(0, ld_alpha=changes.get("ld_alpha"))
        ours = looped(model, collator(pairs), Reference("copy", reference), counts=(4, 1), **changes)
        assert ours.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


SETTINGS = [{"ld_alpha": ALPHA}, {"use_weighting": True}, {"use_weighting": True, "ld_alpha": ALPHA}]
IDS = ["LD-DPO", "WPO", "both"]
# Each setting and each layout once: what they make together is held to the formulas above.
SETTING_AND_LAYOUT = list(zip(SETTINGS, LAYOUTS, strict=True))


def made_trainer(
    args: PreferenceConfig, tokenizer: Any, *callbacks: Any, rows: Any = None, **options: Any
) -> Any:
    return PreferenceTrainer(
        tiny_llama(1), args, train_dataset=rows or make_rows(16), processing_class=tokenizer,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_step_however_it_is_cut(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: Any) -> None:
    results = []
    for batch, accumulate, layout in (
        (8, 1, "padded"),
        (2, 4, "padded"),
        (4, 2, "packed"),
        (2, 4, "shared_prompt"),
    ):
        kept = KeepGradients()
        args = make_args(
            output_dir=str(tmp_path / f"{batch}-{layout}"), per_device_train_batch_size=batch, max_steps=1,
            batch_layout=layout, gradient_accumulation_steps=accumulate, max_grad_norm=0.0, **settings,
        )  # fmt: skip
        made_trainer(args, tokenizer, kept, ref_model=tiny_llama(2)).train()
        results.append((kept.steps[0], read_metrics(args.output_dir)[0]))
    (grads, log), *others = results
    largest = max(gradient.abs().max().item() for gradient in grads.values())
    for other_grads, other_log in others:
        assert other_log["loss"] == pytest.approx(log["loss"], rel=1e-5)
        for name, gradient in grads.items():
            torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=2e-6 * max(largest, 1.0))


@pytest.mark.parametrize(("settings", "layout"), SETTING_AND_LAYOUT, ids=IDS)
def test_every_kind_of_reference(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: Any, layout: str
) -> None:
    """A copy, the policy without its adapter, and scores made beforehand give the same curve."""
    logs = {}
    for kind in ("copy", "adapter", "precomputed"):
        args = make_args(
            output_dir=str(tmp_path / kind),
            batch_layout=layout,
            reference=kind,
            max_steps=3,
            learning_rate=1e-2,
            **settings,
        )
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules="all-linear")
        trainer = made_trainer(args, tokenizer, peft_config=adapter, eval_dataset=make_rows(5, 2))
        trainer.train()
        logs[kind] = [entry["loss"] for entry in read_metrics(args.output_dir)]
        logs[kind].append(trainer.evaluate()["eval_loss"])
        if kind == "precomputed":
            assert (LD_COLUMN in trainer.train_dataset.numbers) == ("ld_alpha" in settings)
    assert logs["adapter"] == pytest.approx(logs["copy"], abs=1e-5)
    assert logs["precomputed"] == pytest.approx(logs["copy"], abs=1e-5)


def test_beta_dpo_sees_the_weighted_gaps(make_args: MakeArgs, tokenizer: Any) -> None:
    """Scores of a step made ahead of it, and with its only micro-batch, are the same."""
    logs = []
    for size, accumulate in ((8, 1), (4, 2)):
        args = make_args(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_steps=1,
            ld_alpha=ALPHA, dynamic_beta={"rho": 0.3}, overwrite_output_dir=True,
        )  # fmt: skip
        trainer = made_trainer(args, tokenizer, ref_model=tiny_llama(2))
        trainer.train()
        logs.append((read_metrics(args.output_dir)[0]["loss"], trainer.loss_state.betas.state_dict()["mean"]))
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_reference_weighted_otherwise_is_refused(make_args: MakeArgs, tokenizer: Any) -> None:
    sums = [{**row, REF_COLUMNS[0]: -1.0, REF_COLUMNS[1]: -2.0} for row in make_rows(4)]
    weighted = [{**row, LD_COLUMN: ALPHA} for row in sums]
    for rows, alpha, got in ((sums, ALPHA, "None"), (weighted, None, "0.3"), (weighted, 0.5, "0.3")):
        with pytest.raises(ValueError, match=f"made with ld_alpha={got}, wanted {alpha}"):
            made_trainer(make_args(ld_alpha=alpha, reference="precomputed"), tokenizer, rows=rows)
    trainer = made_trainer(make_args(ld_alpha=ALPHA, reference="precomputed"), tokenizer, rows=weighted)
    assert trainer.reference.kind == "precomputed"
    again = made_trainer(make_args(ld_alpha=ALPHA), tokenizer, rows=trainer.train_dataset)
    assert again.reference.kind == "precomputed"
    assert (
        made_trainer(make_args(ld_alpha=ALPHA, reference="copy"), tokenizer, rows=sums).reference.kind
        == "copy"
    )


def test_scores_of_another_alpha_are_not_read(make_args: MakeArgs, tokenizer: Any) -> None:
    found = []
    for alpha in (None, 0.3, 0.6):
        trainer = made_trainer(make_args(ld_alpha=alpha, reference="precomputed"), tokenizer)
        found.append(trainer._with_reference(trainer.train_dataset).numbers["ref_logps"].values)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(found[a], found[b])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ld_alpha": 1.5}, r"ld_alpha: got 1.5, wanted a number in \[0, 1\]"),
        ({"ld_alpha": float("nan")}, "ld_alpha: got nan"),
        ({"ld_alpha": 0.5, "loss_type": "sft"}, "ld_alpha: got 0.5 with sft"),
        ({"ld_alpha": 0.5, "loss_type": "kto"}, "ld_alpha: got 0.5 with kto"),
        ({"ld_alpha": 0.5, "loss_type": "tdpo2"}, "ld_alpha: got 0.5 with tdpo2"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting: got True with aot"),
        ({"use_weighting": True, "loss_type": "bco"}, "use_weighting: got True with bco"),
        ({"use_weighting": True, "loss_type": "tdpo1"}, "use_weighting: got True with tdpo1"),
        ({"wpo_max_weight": 1.0}, "wpo_max_weight: got 1.0 without use_weighting"),
        (
            {"wpo_max_weight": -1.0, "use_weighting": True},
            "wpo_max_weight: got -1.0, wanted a number above 0",
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(make_args: MakeArgs, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_a_collator_of_ones_own_has_no_weights(make_args: MakeArgs, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"data_collator: got one with ld_alpha=0.3"):
        made_trainer(make_args(ld_alpha=ALPHA), tokenizer, data_collator=PaddedCollator(0))


def test_the_flags() -> None:
    words = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    config = parse_train([*words, "--ld_alpha", "0.3", "--use_weighting", "--wpo_max_weight", "1"]).config
    assert (config.ld_alpha, config.use_weighting, config.wpo_max_weight) == (0.3, True, 1.0)
    assert not config.makes_loss_in_head
    plain = parse_train(words).config
    assert (plain.ld_alpha, plain.use_weighting) == (None, False) and plain.makes_loss_in_head
    assert parse_train([*words, "--ld_alpha", "0.3"]).config.makes_loss_in_head  # still in one call


def test_scored_rows_say_how_they_were_weighted(model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    data, scored = write_jsonl(tmp_path / "pairs.jsonl", make_rows(4)), tmp_path / "scored.jsonl"
    words = f"--model {model_dir} --output_dir {tmp_path / 'out'} --use_cpu --max_steps 1".split()
    words += [
        "--disable_tqdm",
        "true",
        "--reference_cache_dir",
        str(tmp_path / "cache"),
        "--per_device_train_batch_size",
        "2",
    ]
    assert main(["score", *words, "--dataset", str(data), "--ld_alpha", "0.5", "--output", str(scored)]) == 0
    assert [json.loads(line)[LD_COLUMN] for line in scored.read_text().splitlines()] == [0.5] * 4
    # Scoring again is of this run's own settings, whatever the rows have already.
    again = ["score", *words, "--dataset", str(scored), "--output", str(tmp_path / "again.jsonl")]
    for alpha in ([], ["--ld_alpha", "0.4"], ["--ld_alpha", "0.5"]):
        assert main([*again, *alpha]) == 0
        written = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
        wanted = pytest.approx(float(alpha[1])) if alpha else None  # in fp32
        assert all(row.get(LD_COLUMN) == wanted for row in written)
    assert written == [json.loads(line) for line in scored.read_text().splitlines()]
    assert main(["train", *words, "--dataset", str(scored), "--ld_alpha", "0.5"]) == 0
    assert main(["train", *words, "--dataset", str(scored), "--overwrite_output_dir"]) == 2


def test_adapters_on_the_head(make_args: MakeArgs) -> None:
    """LoRA on ``lm_head``: weights of tokens and of pairs as without."""
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    patch_model(model)
    for case in CASES:
        step = looped(
            model, ld_batch(*case), Reference("adapter"), counts=COUNTS, ld_alpha=ALPHA, use_weighting=True
        )
        assert step.grads and all(gradient.isfinite().all() for gradient in step.grads.values())


@pytest.mark.parametrize(("settings", "layout"), SETTING_AND_LAYOUT, ids=IDS)
def test_the_loss_falls_on_real_data(make_args: MakeArgs, tokenizer: Any, settings: Any, layout: str) -> None:
    args = make_args(max_steps=12, learning_rate=3e-3, max_length=256, batch_layout=layout, **settings)
    made_trainer(args, tokenizer, rows=real_rows("preference_en.jsonl", 8)).train()
    losses = [entry["loss"] for entry in read_metrics(args.output_dir)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
