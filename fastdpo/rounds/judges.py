"""The four judges, each as a function from rows, and the places of what is judged of them, to verdicts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, Protocol

from fastdpo.rounds.candidates import Candidates, Verdict
from fastdpo.rounds.functions import call, load_function
from fastdpo.rounds.generation import Drawing, TransformersSampler
from fastdpo.rounds.judge_settings import JudgeArguments
from fastdpo.rounds.partial import digest
from fastdpo.rounds.prompts import PromptReader
from fastdpo.rounds.reward_model import RewardModel
from fastdpo.training.loop.models import load_tokenizer
from fastdpo.training.settings.row_checks import BadRow

Asked = Sequence[tuple[Candidates, Sequence[int]]]


class Judge(Protocol):
    """Judges rows, some at a time."""

    def check(self, rows: Asked) -> None:
        """Raise ValueError for rows that cannot be judged, before any is."""

    def judge(self, rows: Asked) -> list[Verdict]:
        """A verdict of each row, on the answers at the places given. Raises ValueError, naming the row."""


def make_judge(args: JudgeArguments) -> Judge:
    """The judge that the settings name. Raises ValueError for one that cannot be had."""
    if args.reward_model is not None:
        return _Reward(args)
    if args.function is not None:
        return _Function(args.function)
    if args.pairwise is not None:
        return _Pairwise(args, args.pairwise)
    return _Writer(args)


class _Reward:
    def __init__(self, args: JudgeArguments) -> None:
        options = {"trust_remote_code": True} if args.trust_remote_code else {}
        self.model = RewardModel(
            str(args.reward_model), dtype=args.reward_dtype, max_length=args.reward_max_length,
            batch_size=args.judge_batch_size, use_cpu=args.use_cpu, **options,
        )  # fmt: skip

    def check(self, rows: Asked) -> None:
        self.model.check(rows)

    def judge(self, rows: Asked) -> list[Verdict]:
        return [Verdict(list(scores)) for scores in self.model.score(rows)]


class _Function:
    def __init__(self, name: str) -> None:
        self.function = load_function("function", name)

    def check(self, rows: Asked) -> None:
        pass  # it may look at what it likes

    def judge(self, rows: Asked) -> list[Verdict]:
        asked = [(row, place) for row, places in rows for place in places]
        given = {
            "prompts": [row.prompt for row, _ in asked],
            "completions": [row.answers[place] for row, place in asked],
        }
        found = iter(_named(rows, "function", self.function, given, [row for row, _ in asked]))
        return [Verdict([next(found) for _ in places]) for _, places in rows]


class _Pairwise:
    """Scores are shares of won comparisons."""

    def __init__(self, args: JudgeArguments, name: str) -> None:
        self.function, self.args = load_function("pairwise", name), args

    def check(self, rows: Asked) -> None:
        pass

    def judge(self, rows: Asked) -> list[Verdict]:
        wins: list[list[list[float | None]]] = [[[None] * len(places) for _ in places] for _, places in rows]
        meetings = [self._meetings(row, len(places)) for row, places in rows]
        games = [next(meeting, None) for meeting in meetings]
        while any(games):
            # One round of all rows at a time: what meets next may hang on who won.
            asked = [(at, game) for at, found in enumerate(games) for game in found or ()]
            for (at, (i, j)), chance in zip(asked, self._ask(rows, asked), strict=True):
                wins[at][i][j], wins[at][j][i] = chance, 1 - chance
            games = [
                None if found is None else _next(meeting, [wins[at][i][j] for i, j in found])
                for at, (meeting, found) in enumerate(zip(meetings, games, strict=True))
            ]
        return [Verdict([_share(of_one) for of_one in table], table) for table in wins]

    def _meetings(self, row: Candidates, count: int) -> Iterator[list[tuple[int, int]]]:
        if self.args.comparisons == "all":
            if count > 1:
                yield list(combinations(range(count), 2))
            return
        left = list(range(count))
        random.Random(digest([self.args.seed, row.number, "bracket"])).shuffle(left)
        while len(left) > 1:
            games = list(zip(left[::2], left[1::2], strict=False))
            chances: Any = yield games
            through = [i if chance >= 0.5 else j for (i, j), chance in zip(games, chances, strict=True)]
            left = through + left[len(games) * 2 :]

    def _ask(self, rows: Asked, asked: Sequence[tuple[int, tuple[int, int]]]) -> list[float]:
        chances = self._ask_once(rows, asked)
        if self.args.both_orders:
            turned = self._ask_once(rows, [(at, (j, i)) for at, (i, j) in asked])
            chances = [(one + 1 - other) / 2 for one, other in zip(chances, turned, strict=True)]
        return chances

    def _ask_once(self, rows: Asked, asked: Sequence[tuple[int, tuple[int, int]]]) -> list[float]:
        of = [rows[at] for at, _ in asked]
        given = {
            "prompts": [row.prompt for row, _ in of],
            "first": [row.answers[places[i]] for (row, places), (_, (i, _)) in zip(of, asked, strict=True)],
            "second": [row.answers[places[j]] for (row, places), (_, (_, j)) in zip(of, asked, strict=True)],
        }
        found = _named(rows, "pairwise", self.function, given, [row for row, _ in of])
        for (row, _), chance in zip(of, found, strict=True):
            if not 0 <= chance <= 1:
                raise ValueError(
                    f"pairwise: got {chance:g} for {row.where}, wanted a probability in [0, 1], or true or "
                    "false"
                )
        return found


class _Writer:
    """A causal model that writes a judgement, which has a score in it; LLM-as-a-judge."""

    def __init__(self, args: JudgeArguments) -> None:
        name = str(args.judge_model)
        options = {"trust_remote_code": True} if args.trust_remote_code else {}
        self.args, self.template, self.pattern = args, args.judge_template(), re.compile(args.judge_pattern)
        self.tokenizer = load_tokenizer(name, what="judge_model", **options)
        how = Drawing(args.judge_temperature, args.judge_top_p, args.judge_max_new_tokens)
        self.sampler = TransformersSampler(
            {"judge_model": name}, self.tokenizer, how, use_cpu=args.use_cpu,
            loading={"dtype": args.reward_dtype, **options},
        )  # fmt: skip
        self.reader = PromptReader("judge_prompt", self.tokenizer)

    def check(self, rows: Asked) -> None:
        limit = self.sampler.limit
        for row, places in rows if limit is not None else ():
            longest = max((len(self._ids(row, place)) for place in places), default=0)
            if limit is not None and longest + self.args.judge_max_new_tokens > limit:
                raise ValueError(
                    f"judge_model: {row.where}: the question has {longest} tokens and the judgement up to "
                    f"{self.args.judge_max_new_tokens}, wanted {limit} together at most, the model's "
                    "positions"
                )

    def judge(self, rows: Asked) -> list[Verdict]:
        asked = [(row, place) for row, places in rows for place in places]
        size = max(1, self.args.judge_batch_size // self.args.judge_samples)
        scores: list[float | None] = []
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            seed = int(digest([self.args.seed, *((row.number, place) for row, place in part)]), 16) % 2**62
            drawn = self.sampler.draw([self._ids(*one) for one in part], self.args.judge_samples, seed)
            scores += [self._score([self.tokenizer.decode(one.ids) for one in found]) for found in drawn]
        found = iter(scores)
        return [Verdict([next(found) for _ in places]) for _, places in rows]

    def _ids(self, row: Candidates, place: int) -> tuple[int, ...]:
        said = row.answers[place]
        prompt = row.prompt if not row.is_chat else "\n".join(message["content"] for message in row.prompt)
        answer = said if not row.is_chat else "\n".join(message["content"] for message in said)
        text = self.template.replace("{prompt}", "\0").replace("{completion}", answer).replace("\0", prompt)
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        value: Any = [{"role": "user", "content": text}] if has_template else text
        try:
            return self.reader.read({"prompt": value}, row.number).ids
        except BadRow as error:
            raise ValueError(f"judge_model: {row.where}: {error}") from None

    def _score(self, texts: Sequence[str]) -> float | None:
        found = [list(self.pattern.finditer(text)) for text in texts]
        numbers = []
        for matches in found:
            try:
                numbers.append(float(matches[-1].group(1)))
            except (IndexError, TypeError, ValueError):
                continue  # a judgement without a score is none
        return sum(numbers) / len(numbers) if numbers else None


def _named(
    rows: Asked,
    setting: str,
    function: Callable[..., Any],
    given: dict[str, list[Any]],
    of: Sequence[Candidates],
) -> list[float]:
    """``call`` with the columns of each row; an error says in which rows."""
    if not of:
        return []
    names = dict.fromkeys(name for row in of for name in row.columns if name not in given)
    columns = {name: [row.columns.get(name) for row in of] for name in names}
    try:
        return call(setting, function, given, columns)
    except ValueError as error:
        first, last = rows[0][0].where, rows[-1][0].where
        where = first if first == last else f"{first} to {last.rpartition(', ')[2]}"
        raise ValueError(f"{error} ({where})") from error.__cause__


def _next(meeting: Any, chances: list[Any]) -> Any:
    try:
        return meeting.send(chances)
    except StopIteration:
        return None


def _share(won: Sequence[float | None]) -> float:
    met = [chance for chance in won if chance is not None]
    return sum(met) / len(met) if met else 0.5
