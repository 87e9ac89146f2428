"""The rows of the methods' table: what ``methods.py`` parses.

A row per method: id | name | source | provided | checked against, then the use, then -> and the heading of
its recipe in docs/methods.md.
"""

ROWS = """\
A1 | DPO | 2305.18290 | loss | authors' code
    `sigmoid`
A2 | cDPO | E. Mitchell's note | option | authors' code
    `sigmoid` with `label_smoothing`, or `soft_labels` per pair
A3 | robust DPO (rDPO) | 2403.00409 | loss | TRL
    `robust`
A4 | IPO | 2310.12036 | loss | TRL
    `ipo`, with `length_normalize=False` for sums
A5 | hinge (RSO) | 2309.06657 | loss | TRL
    `hinge`
A6 | SLiC, SLiC-HF | 2305.10425 | loss | HALOs
    `slic`, its regulariser the NLL of the whole answer; `slic_smooth_ref` with that of 2410.11677
A7 | EXO | 2402.00856 | loss | authors' code
    `exo_pair`; `exo_pair@authors` with the authors' eps and beta
A8 | NCA, InfoNCA | 2402.05369 | loss | authors' code
    `nca_pair` for two answers, `nca` and `infonca` for lists; `nca@authors` and `infonca@authors` with
    the authors' temperature and beta
A9 | BCO on pairs | 2404.04656 | loss | TRL
    `bco_pair`
A10 | SPPO, hard labels | 2405.00675 | loss | authors' code
    `sppo_hard`
A11 | SPPO, soft labels | 2405.00675 | loss | authors' code
    `sppo` with `chosen_win_rate` and `rejected_win_rate`, or `soft_labels`
    -> Rounds of self-play
A12 | AOT, paired | 2406.05882 | loss | TRL
    `aot`, over the batch it is given
    -> Batches over ranks
A13 | AOT, unpaired | 2406.05882 | loss | TRL
    `aot_unpaired`
    -> Batches over ranks
A14 | APO zero (anchored) | 2408.06266 | loss | TRL
    `apo_zero`, unpaired `apo_zero_unpaired`
A15 | APO down (anchored) | 2408.06266 | loss | TRL
    `apo_down`
A16 | DiscoPOP | 2406.08414 | loss | TRL
    `discopop`
A17 | length-normalised DPO | 2411.15124 | loss | TRL
    `sigmoid_norm`
A18 | SimPO | 2405.14734 | loss | authors' code
    `simpo`
A19 | CPO (contrastive) | 2401.08417 | loss | TRL
    `cpo`; TRL's hinge and IPO forms with `comparison`
A20 | CPO-SimPO | 2401.08417 | loss | TRL
    `cpo_simpo`
A21 | AlphaPO | 2501.03884 | option | TRL
    `simpo` or `cpo_simpo` with `alpha`
A22 | ORPO | 2403.07691 | loss | authors' code
    `orpo`; its NLL takes the prompt in with `nll_labels`, in the loop by default (`--nll_on_prompt`)
    -> Prompts in an NLL term
A23 | CPO (constrained) | 2605.20834 | loss | authors' code
    `ccpo` (full), `ccpo_easy` and `ccpo_clip`, on per-token means as the authors' code, whose default is
    the clipped one; `ccpo_easy@authors` with the numbers of its demo
A24 | f-DPO | 2309.16240 | option | TRL
    `f_divergence_type` of `sigmoid`, `hinge`, `ipo`, `robust`, `sigmoid_norm`, `exo_pair`,
    `discopop`; of `sigmoid_norm` and `ipo` with the links' constants, which TRL leaves out
A25 | RPO, iterative RPO, MPO | 2405.16436 | recipe | TRL
    a list of losses with weights
    -> Several losses at once
A26 | SFT term | 2405.16436 | loss | TRL
    `sft`, a mean over tokens; `sft_mean`, over answers; `sft_sum`, of whole answers
A27 | WPO | 2406.11827 | weights | authors' code
    `pair_weights=wpo_weights(...)`; in the loop `--use_weighting`
    -> Weights of pairs
A28 | Sem-DPO | 2507.20133 | weights | spec only
    `pair_weights=semantic_weights(...)`
    -> Weights of pairs
A29 | beta-DPO | 2407.08639 | state | authors' code
    `controllers.BetaController`
    -> A beta per batch
A30 | LD-DPO | 2409.06411 | weights | TRL
    `token_weights=ld_weights(...)`; in the loop `--ld_alpha`
    -> Weights of tokens
A31 | MRPO, multi-reference DPO | 2405.16388 | reference | authors' code
    `ref_combination="mrpo"` or `"harmonic"` of K `ref_logps`, or `reference_logps.mrpo_reference`
    -> Several references
A32 | weighting strategies for MRPO | 2512.10040 | state | spec only
    `controllers.ReferenceWeights`, by accuracy or confidence, for `ReferenceCombination(weights=...)`; the
    sliding window and Thompson sampling could not be read
    -> Several references
A33 | InfiFPO | 2505.13878 | reference | paper
    `sigmoid_norm` with `ref_combination="max_margin"` or `"mean"` of K `ref_logps`, or
    `reference_logps.fused_reference`
    -> Several references
A34 | WRPO | 2412.03187 | loss | authors' code
    `wrpo`
A35 | DPOP | 2402.13228 | loss | OAT
    `dpop`
A36 | length-regularised DPO (R-DPO) | 2403.19159 | option | OAT
    `sigmoid` with `length_penalty`, of the sign of OAT's code for eq. 9; alpha-DPO's repository has the other
A37 | TPO, TPO-L | 2405.16681 | loss | TRL
    `tpo`, `tpo_l`, TRL's hinge and IPO forms with `comparison`; in the loop with a column `reference`
    (`--gold_column`)
    -> A gold answer beside the pair
A38 | HyPO (reference clipping) | 2602.11902 | loss | spec only
    `hypo`, on sums; on per-token means it is `ccpo_clip`
A39 | Cal-DPO | 2412.14516 | loss | authors' code
    `cal_dpo`
A40 | alpha-DPO | 2410.10148 | loss | authors' code
    `alpha_dpo`, standardised over the batch it is given, where the authors take exponential means
    -> Batches over ranks
A41 | RPO (reward-aware) | 2502.00203 | loss | NeMo-Aligner
    `rpo_sq`, `rpo_bwd_kl`, `rpo_fwd_kl` with `reward_gap`; in the loop `--reward_gap_column`
    -> Rewards beside the pairs
A42 | REBEL | 2404.16767 | loss | authors' code
    `rebel` with `reward_gap`; in the loop `--reward_gap_column`
    -> Rewards beside the pairs
A43 | mDPO | 2406.11839 | loss | authors' code
    `sigmoid` with `mdpo_anchor`, `--loss_weights 2 1` and, in the loop, `--image_conditional_pairs`
    -> Several kinds of pairs
B1 | S-DPO | 2406.09215 | loss | authors' code
    `sdpo`
B2 | Plackett-Luce DPO | 2305.18290 app. A.3 | loss | spec only
    `plackett_luce`
B3 | ADPO (anchored DPO) | 2510.18913 | loss | authors' code
    `adpo`
B4 | DDO-RM | 2604.11119 | loss | authors' code
    `ddo_rm`
B5 | BRAIn | 2402.02479 | recipe | spec only
    `infonca` with beta 1 and the proposal as reference
    -> Lists of candidates
B6 | in-context ranking (IRPO) | 2504.15477 | loss | authors' code
    `in_context_ranking` on `segment_sums`
    -> Lists of candidates
B7 | RRHF | 2304.05302 | loss | authors' code
    `rrhf`; the authors' NLL is a mean over padded rows
B8 | TRPA | 2504.04524 | loss | authors' code
    `trpa` and `terms.trust_region`; levels are the group's different scores
    -> Lists of candidates
B9 | BOLT | 2605.02469 | loss | spec only
    `bolt`
B10 | LiPO-lambda | 2402.01878 | loss | others' code
    `lipo_lambda`; no code of the authors is public
B11 | A*-PO | 2505.20686 | loss | authors' code
    `a_star_po` on samples of the reference; on the policy's, `direct_advantage` of reward less value
    -> Lists of candidates
C1 | KTO | 2402.01306 | loss | TRL
    `kto`
    -> Answers without pairs
C2 | BCO | 2404.04656 | loss | TRL
    `bco`
    -> Answers without pairs
C3 | NPO (unlearning) | 2404.05868 | loss | authors' code
    `npo`, with the answers to keep as desirable ones
    -> Answers to forget
C4 | SimNPO (unlearning) | 2410.07163 | loss | authors' code
    `simnpo`
    -> Answers to forget
D1 | DAPO (direct advantage) | 2412.18279 | loss | spec only
    `direct_advantage`
    -> Steps
D2 | TDPO | 2404.11999 | loss | authors' code
    `tdpo1`, `tdpo2`, through `fused_preference_loss` and the loop
    -> Divergences over the vocabulary
D3 | MCTS-DPO, Step-DPO | 2405.00451 | recipe | authors' code
    `suffix_weights` and `search_soft_labels`
    -> Steps
D4 | TP-LLaMA | 2406.07115 | recipe | spec only
    `sigmoid` on the next step of a shared history
    -> Steps
D5 | step-level Q-value models | 2409.09345 | recipe | spec only
    `sigmoid` on steps; Q is `terms.implicit_rewards`
    -> Steps
D6 | Agent Q | 2408.07199 | recipe | spec only
    `sigmoid` with the `ref_logps` stored in the replay buffer
    -> Rounds of self-play
D7 | OPRL, iStar | 2509.19199 | recipe | spec only
    `sigmoid` against the old policy for the reward model; step rewards by `segment_sums`, advantages and
    the clipped policy loss by hand, with an alpha that is not published
    -> Steps
D8 | OPA-DPO | 2501.09695 | recipe | authors' code
    four pairs, token weights and `terms.anchor`, of whole answers: the authors' code takes the sigmoid of
    every token
    -> Several kinds of pairs
D9 | step rejection fine-tuning (SRFT) | abstract only | recipe | spec only
    `sft` with the wrong steps masked out of `nll_labels`
    -> Steps
E1 | AlignDistil | 2503.02832 | loss | authors' code
    `aligndistil`, through `fused_preference_loss` and the loop; per-token means, as the authors' scripts
    -> Divergences over the vocabulary
E2 | HyPO (online KL) | 2406.01462 | term | spec only
    `terms.score_function_kl`
    -> Terms on samples
E3 | implicit reward as the bridge | 2507.00018 | nothing | nothing to check
    its objectives could not be read; its main advice, a smaller SFT learning rate, needs no loss
E4 | self-distillation (ATESD, SERL, Fast-Slow) | citing lists | nothing | nothing to check
    the weightings could not be read; the divergence per token is `token_divergence`
E5 | GKD | 2306.13649 | loss | TRL
    `gkd`, on samples of the policy or on data; who samples is up to you
    -> Divergences over the vocabulary
E6 | MiniLLM | 2306.08543 | loss | authors' code
    `minillm` on samples of the policy, without PPO's clipping and whitening around it
    -> Divergences over the vocabulary
F1 | online and iterative DPO, self-rewarding models | 2402.04792, 2401.10020, 2405.07863 | recipe | TRL
    `sigmoid` or `ipo` on sampled pairs
    -> Rounds of self-play
F2 | online IPO | 2403.08635 | recipe | spec only
    `ipo` with `soft_labels` and `length_normalize=False`: the papers' is of sums
    -> Rounds of self-play
F3 | IPO-MD | 2403.08635 | recipe | spec only
    as online IPO, on samples of the mixture, which the sampler makes
    -> Rounds of self-play
F4 | Nash-MD | 2312.00886 | loss | TRL
    `nash_md`
F5 | XPO | 2405.21046 | loss | TRL
    `xpo` with `chosen_is_reference`; in the loop `--chosen_is_reference_column`
    -> Terms on samples
F6 | APO (accelerated) | 2410.06293 | recipe | spec only
    `reference_updates.extrapolate_parameters` between rounds, from the point that each round reached itself
    -> A reference that moves
F7 | DSPPO | 2605.17342 | recipe | spec only
    `sppo` with win rates by the round's schedule; the preference model and its head are yours
    -> Rounds of self-play
F8 | TR-DPO | 2404.09656 | recipe | TRL
    `reference_updates.mix_parameters` every few hundred steps
    -> A reference that moves
F9 | implicit against explicit rewards (DPORM, EXRM) | 2409.03650 | recipe | spec only
    `terms.implicit_rewards`, `terms.reward_accuracy`
    -> Rewards and reward heads
F10 | SPIN | 2401.01335 | recipe | authors' code
    `sigmoid` or `hinge` under another name: chosen are the data's answers, rejected the policy's own, the
    reference is the policy at the start of the round
    -> Rounds of self-play
G1 | direct preference heads (DPH) | 2405.20053 | head | authors' code
    `heads.direct_preference_head`, `heads.bradley_terry`, `heads.last_token_states`
    -> Rewards and reward heads
G2 | Bradley-Terry reward model | 1909.08593 | head | TRL
    `heads.bradley_terry`
    -> Rewards and reward heads
G3 | COALA | 2605.23244 | nothing | spec only
    a convex solver on frozen features, without a language-model head; `heads.bradley_terry` takes
    its scores and margin
H1 | over-optimisation indicators | 2410.11677 | recipe | paper
    entropy and mass of the top k: `OverOptimisationMonitor` of the loop, statistics of `linear_logprob`
    -> Signs of over-optimisation
I1 | PPO | 1707.06347 | nothing | nothing to check
    reinforcement learning on rollouts: the op gives its log-probabilities, the advantages are data
I2 | GRPO | 2402.03300 | nothing | nothing to check
    as PPO
I3 | GDPO | 2601.05242 | nothing | nothing to check
    as GRPO, with other advantages
I4 | GiGPO | 2505.10978 | nothing | nothing to check
    as GRPO, with other advantages
I5 | DEPO, PPR-GDE, POW3R and others | citing lists | nothing | nothing to check
    advantage shaping for the above
J1 | Diffusion-DPO | 2311.12908 | recipe | authors' code
    `heads.margin_loss` on negative errors
    -> Scores that are no log-probabilities
J2 | Diffusion-DRO | basiclab/DiffusionDRO | recipe | authors' code
    `heads.rank_hinge` on negative errors
    -> Scores that are no log-probabilities
J3 | Distillation-DPO | happyw1nd/DistillationDPO | nothing | authors' code
    a difference of score functions, not of likelihoods
J4 | SuperIntelliAgent, DRIFT | authors' code | nothing | nothing to check
    not language models; a DPO step on generated pairs is Diffusion-DPO
K1 | PUGC | by name | data | nothing to check
    prompts and references out of users' texts, a reward model that orders samples; the loss is `sigmoid`
    or `simpo`
K2 | BDHS | by name | data | nothing to check
    rejected answers sampled with the image hidden; the loss is `sigmoid`
K3 | RLHS | by name | data | nothing to check
    labels given after a simulated outcome; the loss is `sigmoid`
K4 | POPri | by name | data | authors' code
    samples ranked by clients' votes; the loss is `sigmoid` with beta 0.01
K5 | LSPO | 2502.04686 | data | nothing to check
    pairs out of a game solved in a latent space of strategies; the loss is `sigmoid`, in rounds
K6 | VerIPO | 2505.19000 | data | nothing to check
    pairs out of rollouts that a verifier has sorted; the loss of its DPO stage is `sigmoid`, and whether it
    has further terms could not be read
K7 | ReAgent-V, MortgageLLM, Empathy by Design, TinyLLM, Thud | several | nothing | nothing to check
    data sets of a domain; where a loss is stated it is DPO
K8 | DPO and GRPO for autoregressive images | several | loss | nothing to check
    `sigmoid` as it is: image tokens are a vocabulary
"""
