"""The promises, by number: what is given, what is promised there, and on which tiers of tests."""

from __future__ import annotations

from dataclasses import dataclass

TIERS = {
    "C": "a CPU, in each change",
    "G": "one GPU",
    "S": "under sanitizers (`make sanitize`: the C++ kernels for the CPU)",
    "M": "several processes, over gloo",
    "W": "whole runs of training on a GPU",
}


@dataclass(frozen=True)
class Promise:
    """``instead`` says why the goal was another; ``group`` begins a section; ``not_run`` what is missing."""

    number: int
    tiers: str
    given: str
    text: str
    instead: str = ""
    not_run: str = ""
    group: str = ""


_LEAVES_CPU = "the C++ kernels for the CPU alone; those of a GPU under `compute-sanitizer` were not run"

PROMISES = (
    Promise(
        1, "CG", "bf16, fp16, fp32 inputs",
        "log-probabilities within 1e-5 nats of fp64 and what the hardware's sum over H adds",
        "The goal was 1e-4 flat: tensor cores cut sums off, by up to 1.5e-4 at H = 4096, whatever the kernel",
        group="Numbers",
    ),
    Promise(
        2, "CG", "the same, any gradient per token", "gradients meet the block rule of `fastdpo.testing`",
    ),
    Promise(3, "CG", "65,536 tokens of one sign", "dweight within 3e-3: no drift of a 16-bit sum"),
    Promise(4, "CG", "logits of 1e4, a common offset, one winner", "finite, never above 0, the rule of 2"),
    Promise(
        5, "CG", "-inf on a first, middle or last part of the vocabulary",
        "what plain torch gives; -inf for a label in it",
    ),
    Promise(
        6, "CG", "NaN or inf in a row of hidden states",
        "that row alone is NaN; the others keep their bits",
    ),
    Promise(7, "CG", "NaN or inf in an ignored row", "loss and gradients keep their bits"),
    Promise(8, "C", "fp64", "the reference backend takes it, and gradcheck passes; kernels raise TypeError"),
    Promise(9, "CG", "softcap, scale, temperature, bias, combined", "the rule of 2"),
    Promise(
        10, "CG", "the policy is its reference",
        "rewards exactly 0, the sigmoid loss exactly ln 2, in every mode", "The goal was 1e-6",
    ),
    Promise(11, "C", "twelve planted bugs", "all are found; a correct head on 20 seeds raises no alarm"),
    Promise(12, "CG", "N = 0, N = 1, V = 2, H = 1", "right values and shapes", group="Shapes, layout, size"),
    Promise(13, "CG", "sizes around the kernels' tiles", "the rule of 2"),
    Promise(14, "CG", "N V, V H or N H beyond 2^31", "offsets hold: rows there are those of small calls"),
    Promise(
        15, "G", "more rows than 65535 blocks", "no launch fails",
        not_run="rows lie on the grid's first axis alone, which takes 2^31; no test on a GPU was run",
    ),
    Promise(16, "CG", "strided, transposed, stride 0, misaligned, int32 labels", "as contiguous ones"),
    Promise(17, "CG", "other lengths in each step", "no recompilation for each: `torch.compile` and Triton"),
    Promise(
        18, "CG", "all labels ignored", "loss 0, gradients exactly 0, the graph connected",
        group="Labels and masks",
    ),
    Promise(19, "C", "a sequence of a pair without labels", "finite; a pair without any counts nowhere"),
    Promise(20, "CG", "ignored tokens anywhere, any ignore_index", "their dhidden is exactly 0"),
    Promise(
        21, "CGS", "a label out of range",
        "no memory outside is touched; that token is NaN; `check_labels` names the place",
    ),
    Promise(
        22, "C", "a wrong shape, dtype, device, count",
        "an error with name, got, wanted: [all of them](wrong_calls.md)",
    ),
    Promise(23, "C", "an option unknown or not supported", "honoured or refused, never ignored"),
    Promise(
        24, "C", "every loss of the registry", "its example by hand, gradcheck, finite up to 1e4",
        group="Losses",
    ),
    Promise(25, "C", "every loss of TRL's", "TRL's own numbers"),
    Promise(26, "C", "answers swapped, all shifted, beta near 0", "the symmetry that is stated"),
    Promise(27, "C", "metrics", "detached; TRL's names and values"),
    Promise(
        28, "CG", "backward twice, another gradient", "the first one's bits; linear to the bit",
        group="Autograd",
    ),
    Promise(29, "CG", "frozen weight or hidden, no_grad, inference_mode", "what is not needed is not made"),
    Promise(30, "C", "a second derivative, torch.func", "raises, never silent"),
    Promise(31, "CG", "activation checkpointing", "the same bits"),
    Promise(32, "CG", "tied embeddings, a head used twice", "the sum of both gradients"),
    Promise(
        33, "CG", "autocast, fp32 weights under 16 bits",
        "dtypes of `F.linear`; a gradient in its parameter's dtype",
    ),
    Promise(34, "CG", "the caller's tensors", "never changed"),
    Promise(35, "CG", "opcheck", "passes", group="torch.compile"),
    Promise(36, "CG", "fullgraph, dynamic shapes", "no graph break, the rule of 2"),
    Promise(
        37, "CG", "waiting for the device",
        "none with a given index: on a CPU shown by tensors that have no values",
    ),
    Promise(
        38, "CS", "memory out of bounds, uninitialised, races",
        "none; what Python allocates is NaN in every test",
        not_run=_LEAVES_CPU, group="Machine",
    ),
    Promise(39, "CG", "the same call again, other threads", "the same bits, also in a fresh process"),
    Promise(40, "CG", "1000 steps", "no memory and no object is left"),
    Promise(
        41, "CG", "peak memory", "the budgets and the gradients, whatever N V",
        "The goal allowed 64 MiB: allowed are `workspace_mib` and `cache_mib`, in bytes in the plan",
    ),
    Promise(42, "CG", "out of memory", "that error; the next call is right, nothing is kept"),
    Promise(43, "CGM", "another device, mixed devices", "right; mixed ones are a ValueError"),
    Promise(
        44, "C", "no GPU, Triton or extension",
        "the import works; a backend by name says why not and what to do",
    ),
    Promise(
        45, "C", "every kernel for sm_80, 90, 100",
        "compiles, fits, spills nothing (exceptions are listed)",
    ),
    Promise(46, "CG", "reference, CPU, Triton, CUDA", "the same tests: Triton interpreted, CUDA emulated"),
    Promise(47, "C", "any cut of a step into micro-batches", "the same gradients", group="Training"),
    Promise(48, "C", "LoRA on backbone or head, modules_to_save, prompts", "as the logits path, or an error"),
    Promise(49, "CG", "families of models", "as the logits path: [all that were tried](families.md)"),
    Promise(
        50, "C", "releases of TRL",
        "held to their source; refused where it differs; undone to the object",
        "The goal was the signature: the same one may compute another thing",
    ),
    Promise(51, "M", "DDP, FSDP2, ZeRO, unequal ranks", "what one process gives; no hang"),
    Promise(
        52, "CW", "a run of tens of steps", "the curve of the unpatched model, TRL's curve",
        not_run="200 steps, 3 seeds, in bf16 on a GPU were not run",
    ),
    Promise(53, "C", "a recorded run", "the same log in later versions, unless the changelog says so"),
    Promise(54, "CM", "stopped and resumed", "the curve of the run that was not"),
    Promise(55, "C", "bad rows", "an error with the row's number, or left out and counted"),
    Promise(56, "C", "a loss that is not finite", "stops or skips, as asked, and names the rows"),
    Promise(57, "C", "examples and tables of the pages", "run, and are what the results give"),
    Promise(
        58, "CG", "a slower version",
        "`fastdpo bench --compare` finds what exceeds the noise that it measured",
        "The goal was 5 %: of some cases the noise is more, of others far less",
        not_run="timed on no GPU so far",
    ),
    Promise(
        59, "CG", "sequences that share a beginning in one row",
        "what each gives alone: values and gradients", group="Added on the way",
    ),
    Promise(60, "C", "a model whose attention would look at its neighbours", "found by values, and refused"),
    Promise(
        61, "CG", "a context carried from chunk to chunk",
        "values and gradients of the whole row; a run goes on",
    ),
    Promise(62, "C", "keys and values in files, a full disk", "an error; no file is left"),
    Promise(63, "CG", "any program over lazy logits", "what it gives over real logits"),
    Promise(64, "C", "an operation that is not known", "real logits, once, and it is said where"),
    Promise(65, "M", "a head split over ranks", "what the whole head gives"),
    Promise(66, "M", "a mistake on one rank", "an error on all of them, never a hang"),
    Promise(67, "C", "a stream of rows", "the curve of rows at hand; resumed, the uninterrupted one"),
    Promise(68, "C", "rounds, killed anywhere", "the end of the run that was not"),
    Promise(
        69, "CM", "kill -9 or a full disk in tokenising, scoring, saving",
        "nothing half-written is trusted; with room again, the curve of the run that was not stopped",
    ),
    Promise(
        70, "C", "`import fastdpo`, `fastdpo --help`, a misspelt name",
        "nothing is loaded for it; names of torch load torch alone",
    ),
    Promise(71, "C", "public names, parameters, settings, commands", "none goes or changes unseen"),
    Promise(72, "C", "pickles in data, caches, checkpoints", "none of ours is read; remote code if asked"),
    Promise(73, "C", "rows, YAML and words made up at random", "an error that says what is wrong, or a run"),
    Promise(
        74, "C", "a bit that flipped, a file cut off: checkpoints, tables of rows and tokens, scores, rounds",
        "an error with the file's name, or made again; a checkpoint without digests goes on, and it is said",
    ),
)  # fmt: skip
