"""Every method of the field that users ask for by name, and what of fastdpo it is: a table for the docs.

python -m fastdpo.losses.methods docs/methods.md          # rewrites the tables between their markers
python -m fastdpo.losses.methods docs/methods.md --check  # fails when they are not what this module gives
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from fastdpo.losses.registry import losses_table

# "recipe": the exact call stands in docs/methods.md; "nothing": the last column says why.
PROVISIONS = ("loss", "option", "weights", "reference", "term", "head", "state", "recipe", "nothing")


@dataclass(frozen=True)
class Method:
    """A row of the table. ``use`` is Markdown; ``recipe`` the heading in docs/methods.md, if it has one."""

    id: str
    name: str
    source: str
    provided: str
    use: str
    recipe: str = ""


# A row per method: id | name | source | provided, then the use, then -> and the heading of its recipe.
_ROWS = """\
A1 | DPO | 2305.18290 | loss
    `sigmoid`
A2 | cDPO | E. Mitchell's note | option
    `sigmoid` with `label_smoothing`, or `soft_labels` per pair
A3 | robust DPO (rDPO) | 2403.00409 | loss
    `robust`
A4 | IPO | 2310.12036 | loss
    `ipo`, with `length_normalize=False` for sums
A5 | hinge (RSO) | 2309.06657 | loss
    `hinge`
A6 | SLiC, SLiC-HF | 2305.10425 | loss
    `slic`; `slic_smooth_ref` with the regulariser of 2410.11677
A7 | EXO | 2402.00856 | loss
    `exo_pair`
A8 | NCA, InfoNCA | 2402.05369 | loss
    `nca_pair` for two answers, `nca` and `infonca` for lists
A9 | BCO on pairs | 2404.04656 | loss
    `bco_pair`
A10 | SPPO, hard labels | 2405.00675 | loss
    `sppo_hard`
A11 | SPPO, soft labels | 2405.00675 | loss
    `sppo` with `chosen_win_rate` and `rejected_win_rate`, or `soft_labels`
    -> Rounds of self-play
A12 | AOT, paired | 2406.05882 | loss
    `aot`, over the batch it is given
    -> Batches over ranks
A13 | AOT, unpaired | 2406.05882 | loss
    `aot_unpaired`
    -> Batches over ranks
A14 | APO zero (anchored) | 2408.06266 | loss
    `apo_zero`, unpaired `apo_zero_unpaired`
A15 | APO down (anchored) | 2408.06266 | loss
    `apo_down`
A16 | DiscoPOP | 2406.08414 | loss
    `discopop`
A17 | length-normalised DPO | 2411.15124 | loss
    `sigmoid_norm`
A18 | SimPO | 2405.14734 | loss
    `simpo`
A19 | CPO (contrastive) | 2401.08417 | loss
    `cpo`
A20 | CPO-SimPO | 2401.08417 | loss
    `cpo_simpo`
A21 | AlphaPO | 2501.03884 | option
    `simpo` or `cpo_simpo` with `alpha`
A22 | ORPO | 2403.07691 | loss
    `orpo`; its NLL takes the prompt in with `nll_labels`, in the loop by default (`--nll_on_prompt`)
    -> Prompts in an NLL term
A23 | CPO (constrained) | 2605.20834 | option
    `margin` per pair, or `sigmoid` with `ref_clip`: the paper's own normalisation of the margin
    could not be read, so it is no loss of that name
A24 | f-DPO | 2309.16240 | option
    `f_divergence_type` of `sigmoid`, `hinge`, `ipo`, `robust`, `sigmoid_norm`, `exo_pair`,
    `discopop`
A25 | RPO, iterative RPO, MPO | 2405.16436 | recipe
    a list of losses with weights
    -> Several losses at once
A26 | SFT term | 2405.16436 | loss
    `sft`, a mean over tokens; `sft_mean`, over answers; `sft_sum`, of whole answers
A27 | WPO | 2406.11827 | weights
    `pair_weights=wpo_weights(...)`; in the loop `--use_weighting`
    -> Weights of pairs
A28 | Sem-DPO | 2507.20133 | weights
    `pair_weights=semantic_weights(...)`
    -> Weights of pairs
A29 | beta-DPO | 2407.08639 | state
    `controllers.BetaController`
    -> A beta per batch
A30 | LD-DPO | 2409.06411 | weights
    `token_weights=ld_weights(...)`; in the loop `--ld_alpha`
    -> Weights of tokens
A31 | MRPO, multi-reference DPO | 2405.16388 | reference
    `ref_combination="mrpo"` or `"harmonic"` of K `ref_logps`, or `reference_logps.mrpo_reference`
    -> Several references
A32 | weighting strategies for MRPO | 2512.10040 | state
    `controllers.ReferenceWeights`, by accuracy or confidence, for `ReferenceCombination(weights=...)`; the
    sliding window and Thompson sampling could not be read
    -> Several references
A33 | InfiFPO | 2505.13878 | reference
    `sigmoid_norm` with `ref_combination="max_margin"` or `"mean"` of K `ref_logps`, or
    `reference_logps.fused_reference`
    -> Several references
A34 | WRPO | 2412.03187 | loss
    `wrpo`
A35 | DPOP | 2402.13228 | loss
    `dpop`
A36 | length-regularised DPO (R-DPO) | 2403.19159 | option
    `sigmoid` with `length_penalty`; the sign the paper prints could not be checked
A37 | TPO, TPO-L | 2405.16681 | loss
    `tpo`, `tpo_l`; in the loop with a column `reference` (`--gold_column`)
    -> A gold answer beside the pair
B1 | S-DPO | 2406.09215 | loss
    `sdpo`
B2 | Plackett-Luce DPO | 2305.18290 app. A.3 | loss
    `plackett_luce`
B3 | ADPO (anchored DPO) | 2510.18913 | loss
    `adpo`
B4 | DDO-RM | 2604.11119 | loss
    `ddo_rm`
B5 | BRAIn | 2402.02479 | recipe
    `infonca` with beta 1 and the proposal as reference
    -> Lists of candidates
B6 | in-context ranking (IRPO) | 2504.15477 | loss
    `in_context_ranking` on `segment_sums`
    -> Lists of candidates
B7 | RRHF | 2304.05302 | loss
    `rrhf`
B8 | TRPA | 2504.04524 | loss
    `trpa` and `terms.trust_region`
    -> Lists of candidates
B9 | BOLT | 2605.02469 | loss
    `bolt`
C1 | KTO | 2402.01306 | loss
    `kto`
    -> Answers without pairs
C2 | BCO | 2404.04656 | loss
    `bco`
    -> Answers without pairs
D1 | DAPO (direct advantage) | 2412.18279 | loss
    `direct_advantage`
    -> Steps
D2 | TDPO | 2404.11999 | loss
    `tdpo1`, `tdpo2`, through `fused_preference_loss` and the loop
    -> Divergences over the vocabulary
D3 | MCTS-DPO, Step-DPO | 2405.00451 | recipe
    `suffix_weights` and `search_soft_labels`
    -> Steps
D4 | TP-LLaMA | 2406.07115 | recipe
    `sigmoid` on the next step of a shared history
    -> Steps
D5 | step-level Q-value models | 2409.09345 | recipe
    `sigmoid` on steps; Q is `terms.implicit_rewards`
    -> Steps
D6 | Agent Q | 2408.07199 | recipe
    `sigmoid` with the `ref_logps` stored in the replay buffer
    -> Rounds of self-play
D7 | OPRL, iStar | 2509.19199 | recipe
    `sigmoid` against the old policy, step rewards by `segment_sums`
    -> Steps
D8 | OPA-DPO | 2501.09695 | recipe
    token weights, several pairs and `terms.anchor`
    -> Several kinds of pairs
D9 | step rejection fine-tuning (SRFT) | abstract only | recipe
    `sft` with the wrong steps masked out of `nll_labels`
    -> Steps
E1 | AlignDistil | 2503.02832 | loss
    `aligndistil`, through `fused_preference_loss` and the loop
    -> Divergences over the vocabulary
E2 | HyPO (online KL) | 2406.01462 | term
    `terms.score_function_kl`
    -> Terms on samples
E3 | implicit reward as the bridge | 2507.00018 | nothing
    its objectives could not be read; its main advice, a smaller SFT learning rate, needs no loss
E4 | self-distillation (ATESD, SERL, Fast-Slow) | citing lists | nothing
    the weightings could not be read; the divergence per token is `token_divergence`
F1 | online and iterative DPO, self-rewarding models | 2402.04792, 2401.10020, 2405.07863 | recipe
    `sigmoid` or `ipo` on sampled pairs
    -> Rounds of self-play
F2 | online IPO | 2403.08635 | recipe
    `ipo` with `soft_labels`
    -> Rounds of self-play
F3 | IPO-MD | 2403.08635 | recipe
    `ipo` on samples of the mixture, which the sampler makes
    -> Rounds of self-play
F4 | Nash-MD | 2312.00886 | loss
    `nash_md`
F5 | XPO | 2405.21046 | term
    `terms.exploration_bonus`
    -> Terms on samples
F6 | APO (accelerated) | 2410.06293 | recipe
    `reference_updates.extrapolate_parameters` between rounds
    -> A reference that moves
F7 | DSPPO | 2605.17342 | recipe
    `sppo` with win rates of the round
    -> Rounds of self-play
F8 | TR-DPO | 2404.09656 | recipe
    `reference_updates.mix_parameters` every few hundred steps
    -> A reference that moves
F9 | implicit against explicit rewards (DPORM, EXRM) | 2409.03650 | recipe
    `terms.implicit_rewards`, `terms.reward_accuracy`
    -> Rewards and reward heads
G1 | direct preference heads (DPH) | 2405.20053 | head
    `heads.direct_preference_head`, `heads.bradley_terry`, `heads.last_token_states`
    -> Rewards and reward heads
G2 | Bradley-Terry reward model | 1909.08593 | head
    `heads.bradley_terry`
    -> Rewards and reward heads
G3 | COALA | 2605.23244 | nothing
    a convex solver on frozen features, without a language-model head; `heads.bradley_terry` takes
    its scores and margin
H1 | over-optimisation indicators | 2410.11677 | recipe
    entropy and mass of the top k: `OverOptimisationMonitor` of the loop, statistics of `linear_logprob`
    -> Signs of over-optimisation
I1 | PPO | 1707.06347 | nothing
    reinforcement learning on rollouts: the op gives its log-probabilities, the advantages are data
I2 | GRPO | 2402.03300 | nothing
    as PPO
I3 | GDPO | 2601.05242 | nothing
    as GRPO, with other advantages
I4 | GiGPO | 2505.10978 | nothing
    as GRPO, with other advantages
I5 | DEPO, PPR-GDE, POW3R and others | citing lists | nothing
    advantage shaping for the above
J1 | Diffusion-DPO | 2311.12908 | recipe
    `heads.margin_loss` on negative errors
    -> Scores that are no log-probabilities
J2 | Diffusion-DRO | basiclab/DiffusionDRO | recipe
    `heads.rank_hinge` on negative errors
    -> Scores that are no log-probabilities
J3 | Distillation-DPO | happyw1nd/DistillationDPO | nothing
    a difference of score functions, not of likelihoods
J4 | SuperIntelliAgent, DRIFT | authors' code | nothing
    not language models; a DPO step on generated pairs is Diffusion-DPO
K1 | PUGC | by name | recipe
    how pairs are made; the loss is `sigmoid` or `simpo`
    -> Methods that only make data
K2 | BDHS | by name | recipe
    how pairs are made; the loss is `sigmoid`
    -> Methods that only make data
K3 | RLHS | by name | recipe
    how pairs are labelled; the loss is `sigmoid`
    -> Methods that only make data
K4 | POPri | by name | recipe
    how pairs are made; the loss is `sigmoid` with beta 0.01
    -> Methods that only make data
K5 | LSPO | 2502.04686 | recipe
    how pairs are made; the loss is `sigmoid`, in rounds
    -> Methods that only make data
K6 | VerIPO | 2505.19000 | recipe
    how pairs are made; the loss of its DPO stage is `sigmoid`
    -> Methods that only make data
K7 | ReAgent-V, MortgageLLM, Empathy by Design, TinyLLM, Thud | several | nothing
    data sets of a domain; where a loss is stated it is DPO
K8 | DPO and GRPO for autoregressive images | several | loss
    `sigmoid` as it is: image tokens are a vocabulary
"""


def _parse(text: str) -> tuple[Method, ...]:
    methods: list[Method] = []
    for line in text.splitlines():
        part = line.strip()
        if not line.startswith(" "):
            identity, name, source, provided = (cell.strip() for cell in line.split("|"))
            methods.append(Method(identity, name, source, provided, use=""))
        elif part.startswith("-> "):
            methods[-1] = replace(methods[-1], recipe=part.removeprefix("-> "))
        else:
            methods[-1] = replace(methods[-1], use=f"{methods[-1].use} {part}".strip())
    return tuple(methods)


METHODS = _parse(_ROWS)


def methods_table() -> str:
    """The methods as a Markdown table, a row per method."""
    rows = ["| | method | source | what it is here | use |", "|---|---|---|---|---|"]
    for method in METHODS:
        use = method.use
        if method.recipe:
            use += f" ([{method.recipe}](#{anchor_of(method.recipe)}))"
        rows.append(f"| {method.id} | {method.name} | {_link(method.source)} | {method.provided} | {use} |")
    return "\n".join(rows)


def anchor_of(heading: str) -> str:
    """GitHub's anchor of a heading."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def _link(source: str) -> str:
    parts = source.split(", ")
    return ", ".join(
        f"[{part}](https://arxiv.org/abs/{part.split()[0]})" if part[:4].isdigit() else part for part in parts
    )


def render(text: str) -> str:
    """A page with its two tables replaced. Raises ValueError unless each pair of markers is there once."""
    for name, table in (("methods", methods_table()), ("losses", losses_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"page: wanted {begin} and {end} once each, in this order")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` only compare; 1 if it differs."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/methods.md.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    text = arguments.page.read_text(encoding="utf-8")
    wanted = render(text)
    if arguments.check:
        return int(text != wanted)
    arguments.page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
