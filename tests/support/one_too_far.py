"""A call whose logits lie one column short of what it is told: AddressSanitizer has to end it (.ci/sanitizers).

The module alone, without the package and PyTorch, which import for seconds.
"""

import importlib.util
from array import array
from pathlib import Path

module = next((Path(__file__).parents[2] / "cmdp_fast").glob("_C.*.so"))
spec = importlib.util.spec_from_file_location("cmdp_fast._C", module)
assert spec is not None and spec.loader is not None
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

WIDTH = 1003


def address(values: array) -> int:
    return values.buffer_info()[0]


logits, tokens, saved = array("f", [0.5] * (WIDTH - 1)), array("q", [3]), array("d", [0.0] * native.SAVED)
rows = native.Matrix(address(logits), "float32", [1], [WIDTH], WIDTH)
native.token_stats(rows, rows, address(tokens), 0, WIDTH, 1.0, [0] * 6, True, address(saved), 1)
print("nobody has noticed")
