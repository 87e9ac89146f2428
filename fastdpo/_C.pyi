"""The compiled kernels (csrc/bindings.cpp). Addresses are integers, 0 where there is no tensor."""

from enum import Enum

built_with_cuda: bool
cuda_archs: str
compiler: str

class DType(Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

class RowArgs:
    rows: int
    vocab: int
    logits: int
    logits_dtype: DType
    logits_stride: int
    labels: int
    bias: int
    scale: float
    softcap: float
    temperature: float
    logps: int
    lse: int
    entropy: int
    log_sum_sq_probs: int
    mean_logit: int
    is_top1: int
    target_logits: int
    d_out: int
    d_dtype: DType
    d_stride: int
    grad_coeffs: int

    def __init__(self) -> None: ...

class HeadArgs:
    logits: int
    stride: int
    bias: int
    scale: float
    softcap: float
    temperature: float

    def __init__(self) -> None: ...

class DArgs:
    d: int
    dtype: DType
    stride: int

    def __init__(self) -> None: ...

class DivergenceArgs:
    rows: int
    vocab: int
    policy: HeadArgs
    first: HeadArgs
    second: HeadArgs
    labels: int
    coefficients: int
    first_slope: float
    second_slope: float
    jsd_beta: float
    forward_kl: int
    reverse_kl: int
    jsd: int
    logps: int
    l1_distance: int
    ref_logps: int
    d_out: DArgs
    logps_d_out: DArgs
    grad_coeffs: int

    def __init__(self) -> None: ...

class SequenceArgs:
    tokens: int
    sequences: int
    values: int
    weights: int
    mask: int
    offsets: int
    sums: int

    def __init__(self) -> None: ...

class PerPair:
    values: int
    number: float

    def __init__(self) -> None: ...

class SigmoidArgs(SequenceArgs):
    ref_sums: int
    beta: PerPair
    margin: PerPair
    preferred: PerPair
    pair_weights: PerPair
    divisor: PerPair
    pair_losses: int
    loss: int
    g: int
    counter: int

    def __init__(self) -> None: ...

def cpu_row_kernel(args: RowArgs, threads: int) -> None: ...
def cuda_row_kernel(args: RowArgs, stream: int) -> None: ...
def cpu_divergence_kernel(args: DivergenceArgs, threads: int) -> None: ...
def cpu_sequence_sums(args: SequenceArgs, threads: int) -> None: ...
def cpu_sigmoid_pairs(args: SigmoidArgs, threads: int) -> None: ...

cuda_runtime_version: int

def cuda_driver_version() -> int: ...
def cuda_probe() -> tuple[int, str, int]: ...
def cuda_sequence_sums(args: SequenceArgs, stream: int) -> None: ...
def cuda_sigmoid_pairs(args: SigmoidArgs, stream: int) -> None: ...
