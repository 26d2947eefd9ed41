"""What an installed wheel has to show: python .ci/wheel_check.py native|plain, from any folder but a checkout's.

Each backend that works here is held against float64. The native module shares the OpenMP that torch has loaded.
"""

import importlib.metadata
import re
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import torch

import cmdp_fast as cf
import cmdp_fast.info

kind = sys.argv[1]
package = Path(cf.__file__).parent
assert package.parent.name == "site-packages", f"{package} is not the installed one"
assert importlib.metadata.version("cmdp_fast") == cf.__version__
licences = [path for path in importlib.metadata.files("cmdp_fast") or [] if path.name == "LICENSE"]
assert licences, "the wheel lacks its licence"
for name in ("py.typed", "ops/README.md", "trainer/README.md", "trainer/recipes/quickstart.toml"):
    assert files("cmdp_fast").joinpath(name).is_file(), f"the wheel lacks {name}"

torch.manual_seed(0)
x, y = (torch.randn(64, 5003, dtype=torch.float64) for _ in range(2))
tokens = torch.randint(5003, (64,))
p, q = x.log_softmax(-1), y.log_softmax(-1)
exact = {
    "logprob": p.gather(-1, tokens[:, None])[:, 0],
    "entropy": -(p.exp() * p).sum(-1),
    "reverse_kl": (p.exp() * (p - q)).sum(-1),
    "forward_kl": (q.exp() * (q - p)).sum(-1),
}
slope = p.exp() * (p - q - exact["reverse_kl"][:, None])
working = [name for name, problem in cf.available_backends().items() if problem is None]
assert ("cpu" in working) == (kind == "native"), cf.available_backends()
assert "torch" in working
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cf.divergence(x, y)
said = [str(warning.message) for warning in caught if "without its native kernels" in str(warning.message)]
assert len(said) == (kind == "plain"), said
for name in working:
    logits = x.float().requires_grad_()
    stats = cf.token_stats(logits, y.float(), tokens, backend=name)
    stats.reverse_kl.sum().backward()
    for field, expected in exact.items():
        torch.testing.assert_close(getattr(stats, field).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), slope, rtol=1e-4, atol=1e-7)

# One OpenMP in the process, torch's, which may have a hash in its name: a second would have threads of its own.
maps = Path("/proc/self/maps")
if maps.exists():
    package = Path(torch.__file__).parent
    places = (package / "lib", package.parent / "torch.libs")
    brought = {path.resolve() for folder in places for path in folder.glob("libgomp*.so*")}
    paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    loaded = {Path(path).resolve() for path in paths if re.search(r"/libgomp[^/]*$", path)}
    assert not brought or loaded == brought, (loaded, brought)
    assert kind != "native" or len(loaded) == 1, loaded
if kind == "native":
    assert "openmp         yes" in cmdp_fast.info.report(), cmdp_fast.info.report()
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, backends {', '.join(working)}: right")
