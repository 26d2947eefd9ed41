"""The namespace of torch that the operators are registered in: ``torch.ops.cmdp_fast.token_stats``.

A copy of this package that is loaded beside it needs another one, so this file is all that names it; in the copies that
`cmdp_fast.hub_kernel` makes another file is in its place.
"""

NAMESPACE = "cmdp_fast"
