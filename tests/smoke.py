"""Whether an installed fastdpo works: no checkout, no test framework. For wheels in clean environments.

python tests/smoke.py               # anywhere
python tests/smoke.py --compiled    # and the C++ kernels are in it
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

import fastdpo
from fastdpo.kernels import native


def main(argv: list[str]) -> int:
    here = Path(fastdpo.__file__).resolve()
    checkout = Path(__file__).resolve().parents[1] / "fastdpo"
    assert here.parent != checkout, f"got the checkout's {here}, wanted an installed package"
    problem = native.extension_problem()
    if "--compiled" in argv:
        assert problem is None, problem
    torch.manual_seed(0)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    weight, labels = torch.randn(101, 32), torch.randint(101, (4, 16))
    backends = ["reference", *(["cpu"] if problem is None else [])]
    for backend in backends:
        out = fastdpo.fused_dpo_loss(
            hidden, weight, labels, ref_hidden=hidden.detach(), ref_lm_head=weight,
            execution=fastdpo.Execution(backend=backend),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, hidden)
        assert out.loss.item() == torch.tensor(math.log(2.0)).item(), (backend, out.loss.item())
        logp = (hidden[:, :-1] @ weight.T).log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0].sum(1)
        chosen, rejected = (logp - logp.detach()).chunk(2)
        plain = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        (wanted,) = torch.autograd.grad(plain, hidden)
        torch.testing.assert_close(gradient, wanted)
    print(f"fastdpo {fastdpo.__version__}, torch {torch.__version__}: {' and '.join(backends)} work; {here}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
