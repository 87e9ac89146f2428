"""What is checked in the data: one table, which the encoders, their reports and ``docs/data.md`` go by.

Every check has one name, whatever kind of data a row is of. What it finds has one of four effects:

* ``left out``: nothing can be learnt from the row, or not what it says. It is skipped and counted, or an
  error, as ``on_bad_row`` says; ``allow_bad_rows`` trains on it all the same where that is possible.
* ``mended``: there is one way to read the row; it is read so, and counted.
* ``named``: the row is used as it is; the report says so.
* ``refused``: an error whatever ``on_bad_row`` says, as the file or the settings are at fault, not a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LEFT_OUT, MENDED, NAMED, REFUSED = EFFECTS = ("left out", "mended", "named", "refused")


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: of the table, and in ``allow_bad_rows``.
        effect: one of ``EFFECTS``.
        message: what reports and errors say of a row, after "with".
        what: what is looked at.
        remedy: what to do.
        may_stay: whether the row can be trained on all the same.
    """

    name: str
    effect: str
    message: str
    what: str
    remedy: str
    may_stay: bool = False


class Finding(NamedTuple):
    """What a check found in a row: the check's name, and more for the message."""

    check: str
    detail: str = ""

    @property
    def message(self) -> str:
        """The check's."""
        return CHECKS[self.check].message


class BadRow(Exception):
    """A row that cannot be rendered; the encoder leaves it out."""

    def __init__(self, check: str, detail: str = "") -> None:
        super().__init__(f"{CHECKS[check].message}: {detail}" if detail else CHECKS[check].message)
        self.finding = Finding(check, detail)


_TABLE = (
    # Texts
    Check(
        "no_text", LEFT_OUT, "a text that is missing",
        "A prompt or answer is null, or a prompt not there, in a row of a file that has the column.",
        "Fill the column in, or remove the row.",
    ),
    Check(
        "not_text", LEFT_OUT, "content that is not text",
        "The content of a message, or its reasoning, is a number, an object, or a part that is neither text "
        "nor, with a model that sees images, an image. A list of text parts is the text of its parts; null "
        "is the empty text.",
        "Give text; for images, a model of images and text with its processor.",
    ),
    # Images
    Check(
        "not_image", LEFT_OUT, "an image that is none",
        "An item of `images`, or a message's part, is a number, an empty object, or the like.",
        "Give a path, bytes, base64 text, a data URL, or an image of PIL or `datasets`.",
    ),
    Check(
        "image_missing", LEFT_OUT, "an image that is not there",
        "The file of an image does not exist. Paths are relative to the data file, or to `image_folder`.",
        "Repair the path, or say `--image_folder FOLDER`.",
    ),
    Check(
        "image_broken", LEFT_OUT, "an image that cannot be decoded",
        "The image is cut off, or of no format that Pillow reads.",
        "Repair the image, or remove the row.",
    ),
    Check(
        "image_remote", LEFT_OUT, "an image that would have to be fetched",
        "The image is an address on a network, which is read in no run.",
        "Fetch the images first, and give their files.",
    ),
    Check(
        "image_refused", LEFT_OUT, "an image that the model's processor refuses",
        "The processor raises an error on the image (too small, or too far from square).",
        "Look at the error; remove the row.",
    ),
    Check(
        "image_places", LEFT_OUT, "other than one place for each image",
        "The texts have more or fewer places for images (parts of messages, `<image>`, the model's own "
        "placeholder) than the row has images, or the chat template leaves some out.",
        "Give as many places as images, or none: they are then put before the user's first text.",
    ),
    Check(
        "image_tokens", LEFT_OUT, "tokens of images in the text",
        "A text has tokens that stand for an image, and no image to go with them.",
        "Take them out of the text.",
    ),
    Check(
        "image_cut", LEFT_OUT, "an image that max_length would cut",
        "What `max_length` takes off a row has tokens of an image.",
        "Raise `--max_length`, or cut answers alone (`--truncation_mode keep_start`).",
    ),
    Check(
        "image_changed", REFUSED, "an image that is another than the one that was tokenised",
        "The pixels of an image are others than those that its row was tokenised with.",
        "Leave the files as they are while a run lasts.",
    ),
    Check(
        "not_unicode", LEFT_OUT, "text that is not Unicode",
        "A text holds half of a surrogate pair, which no tokenizer takes.",
        "Repair the text: it was cut in the middle of a character.",
    ),
    Check(
        "tools", LEFT_OUT, "tools that are no list of objects",
        "`tools` is JSON that cannot be read, or no list of objects. JSON text is read, and empty is none.",
        "Repair the column, or drop it with `--ignore_columns tools`.",
    ),
    Check(
        "tool_calls", LEFT_OUT, "tool calls that are no list of objects",
        "`tool_calls` of a message is JSON that cannot be read, or no list of objects. JSON text is read.",
        "Repair the message.",
    ),
    Check(
        "template_arguments", LEFT_OUT, "chat_template_kwargs that are no object",
        "`chat_template_kwargs` is JSON that cannot be read, or no object. JSON text is read, and empty is "
        "none.",
        "Repair the column, or drop it with `--ignore_columns chat_template_kwargs`.",
    ),
    Check(
        "no_assistant", LEFT_OUT, "an answer without a turn of the assistant",
        "No message of an answer has the role `assistant`.",
        "Rename the roles, or name the right column (`--chosen_column`, `--completion_column` ...).",
        may_stay=True,
    ),
    Check(
        "text_parts", MENDED, "content in text parts, read as text",
        "The content of a message is a list of text parts.",
        "Nothing.",
    ),
    Check(
        "prompt_repeated", MENDED, "the prompt repeated inside the answers, cut from them",
        "Answers begin with the whole prompt: with its messages (those of the system may be missing), with a "
        "prompt given as text as their user's turn, or with its text, where at least half of the file's rows "
        "do.",
        "Nothing, where the file is meant so. Else drop the prompt with `--ignore_columns prompt`.",
    ),
    Check(
        "prompt_echoed", NAMED, "answers that begin with the prompt's text",
        "Answers begin with the prompt's text, but not all of the row, or in fewer than half of the file's "
        "rows: the file does not seem to be meant so, and the words stay.",
        "Look at the rows. Cut the prompt off where it does not belong.",
    ),
    Check(
        "prompt_shared", NAMED, "a prompt that is what two texts share at their start",
        "The file has no prompts, and chosen and rejected are strings. What they have in common may be the "
        "prompt, or a chance.",
        "Nothing, where the file is meant so. Else name the column: `--prompt_column`.",
    ),
    # The chat template
    Check(
        "template_refuses", LEFT_OUT, "messages that the chat template refuses",
        "The chat template raises an error.",
        "Look at the error: mostly roles that do not alternate, or a role that the template does not know.",
    ),
    Check(
        "prompt_rewritten", LEFT_OUT, "a prompt that changes once an answer follows",
        "The chat template renders the prompt otherwise when an answer follows, so where the answer begins "
        "is not known.",
        "Use a template that only appends.",
    ),
    Check(
        "turns_unknown", LEFT_OUT, "an answer of several turns of which it is not known where they end",
        "An answer has turns of others than the assistant, and the chat template neither marks the "
        "assistant's turns (`{% generation %}`) nor only appends.",
        "Use a template that does, or score all turns with `--assistant_only false`.",
    ),
    Check(
        "answer_lost", LEFT_OUT, "an answer's text that the chat template leaves out",
        "The text of a message of an answer is not in what is rendered of the answer.",
        "Use a template that keeps the text.",
        may_stay=True,
    ),
    Check(
        "reasoning_lost", LEFT_OUT, "an answer's reasoning that the chat template leaves out",
        "The reasoning of an answer (`reasoning_content`, `reasoning`, `thinking`, or what stands between "
        "`<think>` and `</think>`) is not in what is rendered of it. That of the prompt's turns may go.",
        "Use a template that keeps the last turn's reasoning, or take the reasoning out of the data.",
        may_stay=True,
    ),
    Check(
        "tool_call_lost", LEFT_OUT, "a tool call that the chat template leaves out",
        "The name of a called function, or one of its arguments, is not in what is rendered.",
        "Use a template that knows `tool_calls`.",
        may_stay=True,
    ),
    Check(
        "tools_lost", LEFT_OUT, "tools that the chat template leaves out",
        "The name of one of the row's tools is not in what is rendered; rows of strings have no place for "
        "tools.",
        "Use a template that knows `tools`, or drop the column with `--ignore_columns tools`.",
        may_stay=True,
    ),
    Check(
        "prompt_lost", LEFT_OUT, "a prompt's text that the chat template leaves out",
        "The text of a message of the prompt, or of its tool calls, is not in what is rendered.",
        "Use a template that keeps it (a system prompt, the answers of tools).",
        may_stay=True,
    ),
    Check(
        "open_turn", LEFT_OUT, "an answer that the chat template leaves without an end",
        "Nothing but white space follows the last turn's text, so a model never learns to end an answer.",
        "End the assistant's turn in the template: `{{ message['content'] + eos_token }}`.",
        may_stay=True,
    ),
    Check(
        "pieces_lost", LEFT_OUT, "an answer in pieces whose text the chat template changes",
        "The pieces of an answer, one behind the other, are not what is rendered of it, so where they end "
        "is not known.",
        "Use a template that leaves the text as it is, or give strings.",
    ),
    Check(
        "others_turns", MENDED, "turns of others inside an answer, which are not scored",
        "An answer holds turns of others than the assistant. Only the assistant's are scored: those that the "
        "template marks (`{% generation %}`), or what each of them adds to the text before it.",
        "Nothing; `--assistant_only false` scores all turns.",
    ),
    # Nothing to learn
    Check(
        "empty_prompt", LEFT_OUT, "an empty prompt",
        "The prompt has no tokens, so nothing predicts an answer's first token.",
        "Give a prompt; a BOS token is one.",
    ),
    Check(
        "empty_completion", LEFT_OUT, "an empty completion",
        "An answer has no text, or there is none.",
        "Fill the answer in, or remove the row.",
    ),
    Check("empty_piece", LEFT_OUT, "an empty piece", "A piece of an answer has no text.", "Join pieces."),
    Check(
        "piece_tokens", LEFT_OUT, "a piece without a token of its own",
        "A piece is within a token that spans its end, which counts for the next piece.",
        "Cut the answer at white space, before it.",
    ),
    Check(
        "one_candidate", LEFT_OUT, "one candidate",
        "A list has one answer or piece, so there is nothing to compare.",
        "Give two or more.",
    ),
    Check(
        "one_candidate_cut", LEFT_OUT, "one candidate once truncated",
        "Of the pieces of an answer one is left within `max_length`.",
        "Raise `--max_length`.",
    ),
    Check(
        "one_level", LEFT_OUT, "scores that are all the same",
        "The scores of a list are all the same, and the losses compare levels (`trpa`, `lipo_lambda`).",
        "Remove the row.",
    ),
    Check(
        "identical", LEFT_OUT, "identical answers",
        "The two answers of a pair, or all of a list, have the same tokens.",
        "Remove the row.",
    ),
    Check(
        "identical_cut", LEFT_OUT, "answers identical once truncated",
        "The same, within `max_length`.",
        "Raise `--max_length`.",
    ),
    Check(
        "not_finite", LEFT_OUT, "a number that is missing or not finite",
        "A number of the row is null, NaN or infinite.",
        "Fill it in, or remove the row.",
    ),
    Check(
        "long_prompt", LEFT_OUT, "a prompt that fills max_length",
        "The prompt alone has `max_length` tokens.",
        "Raise `--max_length`, or cut prompts with `--truncation_mode keep_end`.",
    ),
    Check(
        "too_long", LEFT_OUT, "more tokens than max_length",
        "The row is longer than `max_length`, with `--truncation_mode skip`.",
        "Raise `--max_length`, or cut rows with another `--truncation_mode`.",
    ),
    Check(
        "nothing_scored", LEFT_OUT, "an answer without a scored token within max_length",
        "What is left of an answer of several turns has no token of the assistant.",
        "Raise `--max_length`.",
    ),
    # Tokens
    Check(
        "merged", NAMED, "a prompt that ends otherwise once an answer follows",
        "A token spans the end of the prompt; it counts for the answer.",
        "Nothing, or begin answers where a word begins.",
    ),
    Check(
        "unknown_tokens", NAMED, "text that the tokenizer does not know",
        "The tokenizer has the unknown token for a part of the text.",
        "Use the tokenizer that the model was trained with.",
    ),
    Check(
        "token_ids", REFUSED, "token ids that the model lacks",
        "A token id has no row in the embedding, or no row in the head, of the model, its reference or "
        "teacher.",
        "Resize the model's embeddings (`resize_token_embeddings`), or use the model's own tokenizer.",
    ),
    Check(
        "positions", REFUSED, "more tokens than the model has positions",
        "A sequence, padding to a multiple included, reaches beyond the model's table of positions.",
        "Lower `--max_length`.",
    ),
    # Numbers of the reference
    Check(
        "impossible_reference", LEFT_OUT, "reference log-probabilities above 0",
        "A log-probability of the reference is above what rounding explains, 1e-4 nats a token.",
        "Look at where the column comes from: it holds no log-probabilities, or their negatives.",
    ),
    Check(
        "other_tokens", REFUSED, "reference log-probabilities of other tokens",
        "`ref_of`, which `fastdpo score` writes beside the log-probabilities, has the hash of the row's "
        "token ids that they are of. It is another than that of the ids that are trained on.",
        "Score the data again with this run's settings, or say `--reference copy`.",
    ),
    Check(
        "tokens_unknown", REFUSED, "reference log-probabilities that do not say of which tokens",
        "The rows have log-probabilities of the reference and no column `ref_of`: what they are of cannot "
        "be checked. With `--reference precomputed` they are taken on trust, with a warning.",
        "Score the data with `fastdpo score`, or say `--reference precomputed` or `--reference copy`.",
    ),
    Check(
        "other_pairings", REFUSED, "reference log-probabilities of other mismatched answers",
        "KTO's `ref_mismatched_logps` are of other answers than the prompts are mismatched with here.",
        "Score all rows again with this run's settings, or say `--reference copy`.",
    ),
    # The file
    Check(
        "no_column", REFUSED, "a column that is missing",
        "A row lacks a column that the losses need, or it has the wrong type. A column of another name "
        "that sounds like a prompt (`question`, `instruction` ...) is not taken for one, nor is it passed "
        "over.",
        "Name the column: `--prompt_column question`.",
    ),
    Check(
        "many_bad_rows", REFUSED, "too many rows left out",
        "More than a tenth of the rows are left out.",
        "Look at the reasons; then `--max_bad_rows` allows another share.",
    ),
)  # fmt: skip
CHECKS = {check.name: check for check in _TABLE}


def may_stay() -> tuple[str, ...]:
    """Names that ``allow_bad_rows`` takes."""
    return tuple(check.name for check in _TABLE if check.may_stay)
