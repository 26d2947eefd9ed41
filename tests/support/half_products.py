"""CPU tensors that are treated as a GPU's: half-precision factors stay as they are, and rows begin at whole lines."""

import torch

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops import gemm, kept_logits, workspace

OFFERED = {
    "mm and addmm": gemm.Offered(write=True, add=True),  # PyTorch 2.10 and later
    "mm": gemm.Offered(write=True, add=False),  # 2.8 and 2.9
    "neither": gemm.Offered(write=False, add=False),
}


def keep_halves(patch, offered=OFFERED["mm and addmm"]):
    """Products are as `offered` until the patch is undone. On a GPU nothing but the choice is patched."""

    def write_wide(a, b, out):
        assert offered.write and a.dtype == b.dtype and a.dtype in gemm.HALVES and out.dtype == torch.float32
        out.copy_(a.float() @ b.float())

    def add_wide(a, b, total):
        assert offered.add and a.dtype == b.dtype and a.dtype in gemm.HALVES and total.dtype == torch.float32
        total += a.float() @ b.float()

    patch.setattr(gemm, "offered", lambda device, dtype: offered)
    if torch.get_default_device().type != "cpu":
        return
    patch.setattr(gemm, "keeps_half", lambda device: True)
    patch.setattr(gemm, "write_wide", write_wide)
    patch.setattr(gemm, "add_wide", add_wide)
    for module in (workspace, kept_logits):
        patch.setattr(module, "pitch", lambda columns, device: -(-columns // workspace.PITCH) * workspace.PITCH)


def eager(autocast=None, vocab_size=None):
    """`linear_token_stats` as eager PyTorch computes it: logits in full, in the dtype of their product, and from there
    in float32. `autocast`: a dtype in which all products are taken."""

    def function(tokens, mask=None, temperature=1.0, **inputs):
        logits = []
        for model in ("student", "teacher"):
            parts = {name: inputs.get(f"{model}_{name}") for name in ("hidden", "weight", "bias")}
            hidden, weight, bias = (t if t is None or autocast is None else t.to(autocast) for t in parts.values())
            head = cf.Head(weight, bias, inputs.get(f"{model}_softcap"), inputs.get(f"{model}_scale", 1.0))
            logits.append(head.logits(hidden))
        return reference.token_stats(*logits, tokens, mask=mask, temperature=temperature, vocab_size=vocab_size)

    return function
