"""The gradient of the statistics in a dtype of its own, beside the logits of another."""

import pytest
import torch
from helpers import make_logits, make_tokens

from cmdp_fast.layout import Pair, Upstream
from cmdp_fast.ops import backends
from cmdp_fast.ops.backends import INTERPRETED

kernels = backends.get("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(kernels is None, reason="the triton backend does not work here"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("logits, out", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("width", [37, 2304, 5001])
def test_a_gradient_of_another_dtype(logits, out, width):
    """A tile's gradient in the dtype of the products that take it: what the kernel computes is rounded once (by the
    interpreter towards zero)."""
    x, y = (make_logits(4, width, dtype=logits, seed=seed).to(DEVICE) for seed in range(2))
    tokens = make_tokens(4, vocab=width - 3).to(DEVICE)
    saved = kernels.token_stats(Pair(x, y, tokens, None, 1.0, width))[1]
    flow = Upstream(*(make_logits(4, seed=seed).to(DEVICE) for seed in range(4)))
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    pair = Pair(x, y, tokens, mask, 1.0, width - 3)
    exact = torch.empty(4, width, dtype=torch.float32, device=DEVICE)
    kernels.token_stats_backward(pair._replace(student=x.float(), teacher=y.float()), saved, flow, exact)
    # Room for 16 columns more per row: nothing is written there.
    room = torch.full((4, width + 16), 7.0, dtype=out, device=DEVICE)
    kernels.token_stats_backward(pair, saved, flow, room[:, :width])
    assert torch.allclose(room[:, :width].float(), exact, rtol=2 * torch.finfo(out).eps, atol=0)
    assert (room[:, width:] == 7.0).all()
    assert (room[2, :width] == 0).all() and (room[:, width - 3 : width] == 0).all()
