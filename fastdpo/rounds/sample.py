"""``fastdpo sample``: answers of a model to the prompts of a data set, kept while they are drawn.

Prompts are sorted by length and cut into batches, each with a seed of its own: which process draws a batch,
and whether the run was killed in between, changes no answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastdpo.rounds.generation import Drawing, Drawn, Sampler, TransformersSampler, VllmSampler
from fastdpo.rounds.partial import PartialWork, digest, stamp
from fastdpo.rounds.prompts import Prompt, read_prompts
from fastdpo.rounds.ranks import Ranks
from fastdpo.rounds.settings import SOURCES, SampleArguments
from fastdpo.training.data.row_numbers import row_list, row_name
from fastdpo.training.data.source import RowSource, read_rows
from fastdpo.training.loop.models import told_tokenizer
from fastdpo.training.settings.hub import check_there
from fastdpo.training.settings.row_checks import CHECKS
from fastdpo.training.settings.run import ModelArguments

logger = logging.getLogger(__name__)


def sample(model: ModelArguments, args: SampleArguments) -> str:
    """Draw answers and write them: ``prompt``, ``completions``, ``finished``, and the row's other columns.

    With answers of other sources than the policy ``sources`` says which each is from. What is there of the
    same run is gone on with.

    Returns:
        A line that says what became of the rows.

    Raises:
        ValueError: prompts that the model cannot go on from, an output in use, another run's unfinished work.
        ImportError: a sampler that is not installed.
    """
    for name in ("model", "tokenizer", "ref_model"):
        if getattr(model, name) is not None:
            check_there(name, getattr(model, name))
    ranks = Ranks.joined(args.use_cpu)
    if args.sampler == "vllm":
        _check_vllm(args, ranks)
    tokenizer = told_tokenizer(model)
    skips = args.on_bad_row == "skip"
    source = _chosen_rows(read_rows(args.dataset, split=args.dataset_split), args)
    prompts, bad = read_prompts(
        source, tokenizer, prompt_column=args.prompt_column, ignored=args.ignore_columns or (), skips=skips
    )
    told = _told(model, args, prompts)
    work = ranks.together(lambda: PartialWork(args.path, told, ranks, overwrite=args.overwrite_output))
    drawing = _Drawing(model, args, tokenizer, source.name, skips)
    ranks.together(lambda: drawing.run(work, prompts, ranks))
    records = work.records()
    ranks.wait()
    too_long = {number for record in records for number in record["too_long"]}
    if too_long:
        bad["long_prompt"] = sorted(too_long)
    rows = list(drawing.rows(prompts, records, too_long))
    if not rows:
        raise ValueError(f"{source.name}: no prompt left that is short enough")
    ranks.together(lambda: work.finish(rows))
    return _summary(source.name, len(source), len(prompts) - len(too_long), args, bad)


def _chosen_rows(source: RowSource, args: SampleArguments) -> RowSource:
    end = len(source) if args.max_rows is None else args.skip_rows + args.max_rows
    if args.skip_rows >= len(source) or end > len(source):
        raise ValueError(
            f"skip_rows and max_rows: got rows {args.skip_rows + 1} to {end} of {source.name}, which has "
            f"{len(source)}"
        )
    if not args.skip_rows and end == len(source):
        return source
    places = range(args.skip_rows, end)
    return replace(
        source,
        rows=[source.rows[place] for place in places],
        numbers=[source.numbers[place] for place in places],
        fingerprint=None,
    )


def _check_vllm(args: SampleArguments, ranks: Ranks) -> None:
    if args.num_mixture_samples:
        raise ValueError(
            "num_mixture_samples: got a value with vllm, wanted --sampler transformers: vLLM has one model"
        )
    if ranks.count > 1 or args.use_cpu:
        got = f"{ranks.count} processes" if ranks.count > 1 else "use_cpu"
        raise ValueError(
            f"sampler: got 'vllm' with {got}, wanted one process with a GPU, or --sampler transformers"
        )


def _told(model: ModelArguments, args: SampleArguments, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides on the answers."""
    names = ("counts", "mixture_weight", "temperature", "top_p", "max_new_tokens", "generation", "batch_size",
             "seed", "sampler", "on_bad_row")  # fmt: skip
    return {
        "model": stamp(model.model),
        "ref_model": stamp(model.ref_model),
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "revision": model.revision,
        "prompts": digest([(prompt.number, prompt.value, prompt.ids, prompt.columns) for prompt in prompts]),
        **{name: getattr(args, name) for name in names},
    }


class _Drawing:
    """The answers of one run, batch by batch."""

    def __init__(
        self, model: ModelArguments, args: SampleArguments, tokenizer: Any, source: str, skips: bool
    ) -> None:
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.source, self.skips = source, skips

    def run(self, work: PartialWork, prompts: Sequence[Prompt], ranks: Ranks) -> None:
        """Draw what is not there yet."""
        done = {(record["source"], record["batch"]) for record in work.records()}
        if done:
            logger.info("going on: %d batches are there", len(done))
        for source, count in self.args.counts.items():
            batches = self.batches(prompts, count)
            mine = [place for place in range(len(batches)) if place % ranks.count == ranks.rank]
            missing = [place for place in mine if (source, place) not in done]
            if not missing:
                continue
            sampler = self._sampler(source)
            found = self._check_lengths(prompts, sampler.limit)
            for place in missing:
                kept = [prompt for prompt in batches[place] if prompt.number not in found]
                drawn = sampler.draw([p.ids for p in kept], count, self._seed(source, place)) if kept else []
                answers = {
                    str(prompt.number): [[self._text(prompt, one), one.finished] for one in of_prompt]
                    for prompt, of_prompt in zip(kept, drawn, strict=True)
                }
                too_long_here = sorted({prompt.number for prompt in batches[place]} & found)
                work.add({"source": source, "batch": place, "answers": answers, "too_long": too_long_here})
                logger.info("%s: batch %d of %d", source, place + 1, len(batches))
            sampler.close()
        work.close()

    def batches(self, prompts: Sequence[Prompt], count: int) -> list[list[Prompt]]:
        """Prompts of like length together, the longest first: what does not fit in memory shows at once."""
        order = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
        size = max(1, self.args.batch_size // count)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def rows(
        self, prompts: Sequence[Prompt], records: Sequence[Mapping[str, Any]], too_long: set[int]
    ) -> Iterator[dict[str, Any]]:
        """What is written, in the order of the data."""
        by_row: dict[int, list[tuple[str, str, bool]]] = {}
        for record in sorted(records, key=lambda record: SOURCES.index(record["source"])):
            for number, drawn in record["answers"].items():
                answers = [(record["source"], text, end) for text, end in drawn]
                by_row.setdefault(int(number), []).extend(answers)
        for prompt in prompts:
            if prompt.number in too_long:
                continue
            found = by_row[prompt.number]
            texts: list[Any] = [text for _, text, _ in found]
            if prompt.is_chat:
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            row = {**prompt.columns, "prompt": prompt.value, "completions": texts}
            row["finished"] = [end for _, _, end in found]
            if tuple(self.args.counts) != ("policy",):
                row["sources"] = [source for source, _, _ in found]
            yield {**row, "prompt_row": row_name(prompt.number)}

    def _sampler(self, source: str) -> Sampler:
        args, model = self.args, self.model
        how = Drawing(args.temperature, args.top_p, args.max_new_tokens, args.generation)
        # A revision is of the model; weights that are not trained keep the checkpoint's dtype.
        loading = model.loading_options(adapted=True)
        others = {name: value for name, value in loading.items() if name != "revision"}
        reference = str(model.ref_model)
        if args.sampler == "vllm":
            named = model.name if source == "policy" else reference
            tokenizer = model.tokenizer or model.name
            return VllmSampler(
                named, tokenizer, self.tokenizer, how, loading=loading if source == "policy" else others
            )
        models = {"model": model.name, "ref_model": reference}
        wanted = {"policy": ["model"], "reference": ["ref_model"], "mixture": ["model", "ref_model"]}[source]
        return TransformersSampler(
            {what: models[what] for what in wanted}, self.tokenizer, how,
            loading=loading if source == "policy" else others, use_cpu=args.use_cpu,
            mixture_weight=args.mixture_weight,
        )  # fmt: skip

    def _check_lengths(self, prompts: Sequence[Prompt], limit: int | None) -> set[int]:
        """Rows that leave no room for an answer. Raises ValueError unless such are to be left out."""
        if limit is None:
            return set()
        room = limit - self.args.max_new_tokens
        found = [prompt.number for prompt in prompts if len(prompt.ids) > room]
        if found and not self.skips:
            longest = max(len(prompt.ids) for prompt in prompts)
            raise ValueError(
                f"{self.source}: got prompts of up to {longest} tokens in {row_list(found)}, wanted "
                f"{max(room, 0)} at most: the model has {limit} positions, of which max_new_tokens takes "
                f"{self.args.max_new_tokens}. Lower --max_new_tokens, or leave such rows out: --on_bad_row "
                "skip"
            )
        return set(found)

    def _seed(self, source: str, batch: int) -> int:
        return int(digest([self.args.seed, source, batch]), 16) % 2**62

    def _text(self, prompt: Prompt, drawn: Drawn) -> str:
        """An answer's text: of a string what the tokens add to the prompt's, which may begin with a space."""
        decode = self.tokenizer.decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        if prompt.is_chat:
            return str(decode(drawn.ids, **options))
        before, whole = decode(list(prompt.ids), **options), decode([*prompt.ids, *drawn.ids], **options)
        return str(whole[len(before) :] if whole.startswith(before) else decode(drawn.ids, **options))


def _summary(name: str, num_rows: int, kept: int, args: SampleArguments, bad: dict[str, list[int]]) -> str:
    drawn = ", ".join(f"{count} of the {source}" for source, count in args.counts.items())
    said = {check: CHECKS[check].message for check in bad} | {"long_prompt": "a prompt that leaves no room"}
    left_out = [f"{len(rows)} with {said[check]} ({row_list(rows)})" for check, rows in bad.items()]
    skipped = f"; skipped {', '.join(left_out)}" if left_out else ""
    return f"{name}: {kept} of {num_rows} prompts, {drawn} each, written to {args.path}{skipped}"
