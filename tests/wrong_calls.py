"""Wrong calls, of Python and of the command line. ``docs/wrong_calls.md`` has each with the message it gives.

Here are the calls; the messages stand on the page alone, and the test makes every call and compares. One that
changes is seen there, and accepted by writing the page anew:

    python -m tests.wrong_calls docs/wrong_calls.md
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdpo.cli import main
from tests.training.conftest import bpe_text, made_tokenizer, make_rows, tiny_llama, write_jsonl

SETUP = """\
import torch
import fastdpo
from fastdpo import Execution, LMHead, PackedLayout

hidden, head = torch.zeros(4, 6, 8), torch.zeros(11, 8)
labels = torch.ones(4, 6, dtype=torch.int64)
"""

PYTHON = {
    "Log-probabilities": (
        "fastdpo.linear_logprob(hidden[..., :7], head, labels)",
        "fastdpo.linear_logprob(hidden.long(), head, labels)",
        "fastdpo.linear_logprob(hidden.tolist(), head, labels)",
        "fastdpo.linear_logprob(hidden, head, labels[:, :-1])",
        "fastdpo.linear_logprob(hidden, head, labels.float())",
        "fastdpo.linear_logprob(hidden, head, labels.to('meta'))",
        "fastdpo.linear_logprob(hidden, head, labels * 11, check_labels=True)",
        "fastdpo.linear_logprob(hidden, head.half(), labels)",
        "fastdpo.linear_logprob(hidden, head[0], labels)",
        "fastdpo.linear_logprob(hidden, torch.nn.Embedding(11, 8), labels)",
        "fastdpo.linear_logprob(hidden, LMHead(head, softcap=0.0), labels)",
        "fastdpo.linear_logprob(hidden, LMHead(head, temperature=-1.0), labels)",
        "fastdpo.linear_logprob(hidden, LMHead(head, bias=torch.zeros(8)), labels)",
        "fastdpo.linear_logprob(hidden, LMHead(head, adapter=(head[:3], head, 1.0)), labels)",
        "fastdpo.linear_logprob(hidden, head, labels, outputs=('lse', 'perplexity'))",
        "fastdpo.linear_logprob(hidden, head, labels, outputs=('topk_mass',), topk=12)",
        "fastdpo.linear_logprob(hidden, head, labels, entropy_requires_grad=True)",
        "fastdpo.linear_logprob(hidden, head, labels, grad_weight_out=torch.zeros(11, 8))",
        "fastdpo.linear_logprob(hidden, head, labels, execution=Execution(mode='fast'))",
        "fastdpo.linear_logprob(hidden, head, labels, execution=Execution(backend='tpu'))",
        "fastdpo.linear_logprob(hidden, head, labels, execution=Execution(logits_dtype='bf16'))",
        "fastdpo.linear_logprob(hidden, head, labels, execution=Execution(workspace_mib=0))",
        "fastdpo.linear_logprob(hidden.double(), head.double(), labels, execution=Execution(backend='cpu'))",
        "fastdpo.token_divergence(hidden, head, hidden[:, :5], labels)",
        "fastdpo.token_divergence(hidden, head, hidden, labels, outputs=('kl',))",
        "fastdpo.explain_plan(100, 8, 11, mode='quick')",
    ),
    "Losses": (
        "fastdpo.fused_dpo_loss(hidden, head, labels)",
        "fastdpo.fused_dpo_loss(hidden[:3], head, labels[:3], ref_hidden=hidden[:3])",
        "fastdpo.fused_dpo_loss(hidden, head, labels[:, :5], ref_hidden=hidden)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden[:, :5])",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, ref_logps=torch.zeros(4))",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_logps=torch.zeros(2))",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_lm_head=head)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, loss_type='sigmiod')",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, loss_type='simpo')",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, loss_type='kto')",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, beta=-0.1)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, beta=torch.ones(4))",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, gamma=0.5)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, label_smoothing=0.7)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, token_weights=torch.ones(4))",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, num_pairs=-1)",
        "fastdpo.fused_dpo_loss(hidden, head, labels, ref_hidden=hidden, execution='fast')",
        "fastdpo.fused_dpo_loss(hidden.view(24, 8), head, labels.view(24), ref_hidden=hidden.view(24, 8),"
        " layout=PackedLayout(torch.tensor([0, 12, 6, 18, 24])))",
        "fastdpo.fused_preference_loss(hidden, head, labels, loss_type='kto')",
        "fastdpo.fused_preference_loss(hidden, head, labels, loss_type='sdpo', ref_hidden=hidden)",
        "fastdpo.fused_preference_loss(hidden, head, labels, loss_type='sigmoid', ref_hidden=hidden)",
        "fastdpo.forest_batch([[1, 2, 3]], [[1, 2]])",
    ),
    "Models and settings": (
        "fastdpo.patch_model(torch.nn.Linear(2, 2))",
        "fastdpo.patch_trl(execution='fast')",
        "fastdpo.PreferenceConfig(output_dir='out', betta=0.1)",
        "fastdpo.PreferenceConfig(output_dir='out', loss_type='sigmod')",
        "fastdpo.PreferenceConfig(output_dir='out', loss_type=['kto', 'sigmoid'])",
        "fastdpo.PreferenceConfig(output_dir='out', beta=0.0)",
        "fastdpo.PreferenceConfig(output_dir='out', loss_type='tdpo1', reference='precomputed')",
        "fastdpo.PreferenceConfig(output_dir='out', learning_rate=float('nan'))",
        "fastdpo.PreferenceConfig(output_dir='out', reference='copied')",
    ),
}

# Beside them a model, pairs and some files that are at fault.
FILES = {
    "broken.jsonl": '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n',
    "columns.jsonl": '{"question": "p", "good": "a", "bad": "b"}\n',
    "empty.jsonl": "",
    "run.yaml": "betta: 1\n",
    "list.yaml": "- a\n",
    "open.yaml": "a: [1\n",
}
_M, _RUN = "--model model", "--model model --dataset pairs.jsonl --output_dir out --use_cpu"
SHELL = {
    "The command line": (
        "fastdpo",
        "fastdpo tran",
        f"fastdpo train {_M}",
        "fastdpo train --dataset pairs.jsonl",
        f"fastdpo train {_RUN} --betta 0.1",
        f"fastdpo train stray {_RUN}",
        f"fastdpo train {_RUN} --epochs 3 --bs=2",
        f"fastdpo train {_RUN} --beta much",
        f"fastdpo train {_RUN} --loss_type sigmod",
        f"fastdpo train {_RUN} --gamma 0.5",
        f"fastdpo train {_RUN} --lora_r 8",
        f"fastdpo train {_RUN} --held_out 0.1 --eval_dataset pairs.jsonl",
        f"fastdpo train {_RUN} --held_out 0.1 --eval_dataset_split test",
        f"fastdpo train {_RUN} --eval_dataset_split test",
        f"fastdpo train {_RUN} --dataset_split test",
        f"fastdpo train {_RUN} --eval_strategy steps",
        f"fastdpo train {_RUN} --do_eval",
        f"fastdpo train {_RUN} --attn_implementation flash_attention_3",
        f"fastdpo train {_RUN} --config missing.yaml",
        "fastdpo train run.yaml",
        "fastdpo train list.yaml",
        "fastdpo train open.yaml",
        f"fastdpo train {_RUN} --learning_rate nan",
        f"fastdpo train {_RUN} --dtype int8",
        f"fastdpo train {_RUN} --reference adapter",
        f"fastdpo train {_RUN} --dataset_weights 1 2",
        f"fastdpo train {_RUN} --chat_template ./missing.jinja",
        f"fastdpo train {_RUN} --held_out 12",
        f"fastdpo train {_RUN} --workspace_mib 0",
        "fastdpo score --model model --dataset pairs.jsonl --output scores.csv",
        "fastdpo score --model model --dataset pairs.jsonl --output pairs.jsonl",
        "fastdpo score --model model --dataset pairs.jsonl --loss_type tdpo1",
        "fastdpo sample --model model",
        "fastdpo judge --samples missing.jsonl",
        "fastdpo rounds missing.yaml",
        "fastdpo merge --adapter missing",
        "fastdpo convert-config missing.yaml",
        "fastdpo doctor --context 4096",
        "fastdpo doctor --model ./missing",
    ),
    "Files and rows": (
        "fastdpo train --model ./missing --dataset pairs.jsonl --output_dir out --use_cpu",
        f"fastdpo train {_RUN} --tokenizer ./missing",
        f"fastdpo train {_RUN} --ref_model a/b/c",
        f"fastdpo train {_RUN} --dataset ./missing.jsonl",
        f"fastdpo train {_RUN} --dataset broken.jsonl",
        f"fastdpo train {_RUN} --dataset columns.jsonl",
        f"fastdpo train {_RUN} --dataset empty.jsonl",
        f"fastdpo train {_RUN} --loss_type sdpo",
        f"fastdpo train {_RUN} --max_length 3 --on_bad_row error",
        f"fastdpo train {_RUN} --output_dir pairs.jsonl",
    ),
}


def make_folder(folder: Path) -> None:
    """What the command lines name: a tiny model, twelve pairs, and files with mistakes."""
    tiny_llama().save_pretrained(folder / "model")
    made_tokenizer(bpe_text()).save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", make_rows(12))
    for name, text in FILES.items():
        (folder / name).write_text(text)


def calls() -> Iterator[str]:
    """All of them, as they are typed."""
    for sections in (PYTHON, SHELL):
        for found in sections.values():
            yield from found


def said(call: str) -> str:
    """What a call says, the kind of error before it, or of the command line the lines that it prints.

    Raises:
        AssertionError: it was no mistake.
    """
    if call.split()[0] == "fastdpo":
        return _printed(shlex.split(call)[1:])
    names: dict[str, Any] = {}
    exec(SETUP, names)
    try:
        eval(call, names)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{call} is no mistake")


def _printed(words: list[str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    assert code == 2, f"fastdpo {shlex.join(words)}: exit code {code}"
    lines = errors.getvalue().splitlines()
    (begin,) = (place for place, line in enumerate(lines) if line.startswith("fastdpo: "))
    return "\n".join(lines[begin:]).replace(str(Path.cwd()), "/home/me")


_HEAD = """# Wrong calls, and what they say

Every line is a call that cannot be right and the message that it gives, word for word: an error with the
name, what was got and what is wanted; on the command line one line, or one for each mistake, and exit code 2.
Nothing is trained or written. A test makes all of these calls; `make tables` writes this page.
"""


def _cell(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.replace("|", "\\|").split("\n")]
    return "<br>".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines)


def row(call: str, message: str) -> str:
    """Its line on the page."""
    return f"| {_cell(call)} | {_cell(message)} |\n"


def page(messages: dict[str, str]) -> str:
    """``docs/wrong_calls.md``."""
    parts = [_HEAD, f"\nIn Python, after\n\n```python\n{SETUP}```\n"]
    for sections in (PYTHON, SHELL):
        for title, found in sections.items():
            parts.append(f"\n## {title}\n\n| call | message |\n|---|---|\n")
            parts += [row(call, messages[call]) for call in found]
    return "".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        os.chdir(name)
        target.write_text(page({call: said(call) for call in calls()}), encoding="utf-8")
