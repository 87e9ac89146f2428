"""Names that nobody knows, found before torch and transformers are loaded, which take seconds.

The names of the settings stand here, so that their dataclasses, which need both, are not asked
(`tests/test_start.py` holds the two against each other); those of transformers are read from its source. What
is not certain here, as names of a loss of one's own, is left to the parser of all settings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastdpo.training.settings.names import ALIASES, SWITCHES, UNSUPPORTED, hint_for, our_names
from fastdpo.training.settings.words import ArgumentError
from fastdpo.training.settings.yaml_file import read_settings

_MODEL = """
load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage model tokenizer
chat_template dtype ref_model teacher_model attn_implementation revision trust_remote_code use_kernels
model_init_kwargs
"""
_TRAIN = """
dataset dataset_split dataset_weights dataset_streaming eval_dataset eval_dataset_split held_out use_peft
lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_task_type
lora_modules_to_save use_rslora use_dora max_length truncation_mode on_bad_row beta_column margin_column
pair_weight_column soft_label_column reward_gap_column chosen_win_rate_column rejected_win_rate_column
chosen_is_reference_column assistant_only allow_bad_rows max_bad_rows ignore_columns image_folder
image_conditional_pairs images_column images_rejected_column prompt_column chosen_column rejected_column
completion_column completions_column label_column scores_column ranks_column advantages_column
win_rate_column loss_type loss_weights beta loss_options ld_alpha use_weighting wpo_max_weight
nll_on_prompt gold_column dynamic_beta over_optimisation_monitor gather_batch_losses shuffle_buffer_size
dataset_num_proc pad_to_multiple_of batch_layout row_arrangement max_tokens_per_batch context_chunk
context_device_mib context_host_mib context_directory offload_activations longest_batch_first engine
tp_size sp_size dp_replicate_size reference sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
reference_cache_dir reference_batch_size freeze_vision_tower router_aux_loss_coef disable_dropout mode
backend logits_dtype workspace_mib cache_mib on_nonfinite_loss overwrite_output_dir label_smoothing
length_penalty f_divergence_type f_alpha_divergence_coef length_normalize discopop_tau penalty
calibration_weight delta regularizer gamma alpha exploration_weight nll_weight comparison tau
reward_scale kl_weight desirable_weight undesirable_weight score_temperature normalize_scores eta
value_temperature rank_weight length_power mean_nll anisotropy source_weight beta2 teacher_mode jsd_beta
discount
"""
_SAMPLE = """
dataset dataset_split output overwrite_output seed use_cpu prompt_column ignore_columns skip_rows max_rows
num_samples num_reference_samples num_mixture_samples mixture_weight temperature top_p max_new_tokens
generation_kwargs batch_size on_bad_row sampler
"""
_JUDGE = """
dataset dataset_split output overwrite_output seed use_cpu reward_model function pairwise judge_model
reward_dtype trust_remote_code reward_max_length judge_batch_size judge_prompt judge_pattern judge_samples
judge_temperature judge_top_p judge_max_new_tokens comparisons both_orders format pairs min_margin max_pairs
win_rate_against drop_unfinished
"""
# Of each command all names that are not transformers'.
SETTINGS = {
    "train": (*_MODEL.split(), *_TRAIN.split()),
    "score": (*_MODEL.split(), *_TRAIN.split(), "output"),
    "sample": (*_MODEL.split(), *_SAMPLE.split()),
    "judge": tuple(_JUDGE.split()),
}
_OF_ALL = ("config", "import", "help", "help_all")


def check_words(command: str, argv: Sequence[str]) -> None:
    """Raise ArgumentError, as the parser of all settings would, for names that it cannot know."""
    words = [word for word in argv if word.startswith("--")]
    if command not in SETTINGS or {"--help", "--help-all", "--help_all", "-h"} & {*argv}:
        return
    if any(word.partition("=")[0] == "--import" for word in words):
        return  # whose losses have options of their own
    file = _file_of(argv)
    in_file = read_settings(file) if file is not None else {}
    known = [*SETTINGS[command], *(transformers_settings() if command in ("train", "score") else ())]
    if "import" in in_file or len(known) == len(SETTINGS[command]) and command in ("train", "score"):
        return
    taken = {*known, *ALIASES, *SWITCHES, *UNSUPPORTED, *_OF_ALL}
    unknown = [word for word in words if _name_of(word) not in taken and word != "--"]
    if unknown:
        raise ArgumentError("\n  ".join(unknown_argument(word, known) for word in unknown))
    _, problems = our_names(in_file, known)
    raise_problems(problems, f"{file}: ")


def _name_of(word: str) -> str:
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    return name.removeprefix("no_")


def _file_of(argv: Sequence[str]) -> Path | None:
    """The YAML file that is told, first or after ``--config``."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        return Path(argv[0])
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or argv[place + 1 : place + 2]):
            return Path(value if equals else argv[place + 1])
    return None


def unknown_argument(word: str, known: Collection[str]) -> str:
    """What is said of a word of the command line that is none of ours."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if word.endswith((".yaml", ".yml")):
        return f"unknown argument {word}: a YAML file comes first, or after --config"
    if not word.startswith("-"):
        return f"unknown argument {word}: wanted settings as --NAME VALUE"
    return f"unknown argument {word}{hint_for(name, known, '--')}"


def raise_problems(problems: Sequence[str], where: str) -> None:
    """Raise ArgumentError with all that is wrong with a file's names, if anything is."""
    if problems:
        raise ArgumentError(where + (problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])))


@cache
def transformers_settings() -> tuple[str, ...]:
    """The fields of the installed ``TrainingArguments``, from its source; none where that reads otherwise."""
    found = find_spec("transformers")
    path = Path(found.origin).with_name("training_args.py") if found and found.origin else None
    if path is None or not path.is_file():
        return ()
    # Of 3000 lines of methods and texts the fields are a small part; only what stands before is parsed.
    text = path.read_text(encoding="utf-8")
    begin, end = text.find("\nclass TrainingArguments"), text.find("\n    def __post_init__")
    if not 0 < begin < end:
        return ()
    (body,) = ast.parse(re.sub(r"\A\n", "", text[begin:end])).body
    return tuple(
        item.target.id
        for item in getattr(body, "body", ())
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )
