"""Random cases of every operation on every backend and instruction set, and of the functions of the objective;
`fuzzing` has the laws they are held to.

pytest tests/fuzz --fuzz 100000 -n 2        the first 100,000 cases
pytest tests/fuzz --fuzz-seed 123           one case
"""

import hosted  # first: it may bring the CUDA kernels
import pytest
from fuzzing import running
from fuzzing.chunks import Chunk, chunks_of

import cmdp_fast as cf
from cmdp_fast.ops.backends import INTERPRETED

MARKS = {"triton": [pytest.mark.triton], "cuda": [pytest.mark.cuda]}
ON_CPU = {"torch": True, "cpu": True, "triton": INTERPRETED, "cuda": hosted.HOSTED}
HERE = [name for name, problem in cf.available_backends().items() if problem is None and ON_CPU[name]]
TOLD = 5  # failures of a chunk that are described in full


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chunk" not in metafunc.fixturenames:
        return
    count, seed = (metafunc.config.getoption(name) for name in ("--fuzz", "--fuzz-seed"))
    chunks = [(name, chunk) for name in (*HERE, running.OBJECTIVE) for chunk in chunks_of(name, count, seed)]
    params = [pytest.param(name, chunk, marks=MARKS.get(name, []), id=f"{name}-{chunk}") for name, chunk in chunks]
    metafunc.parametrize("name, chunk", params)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cases(name: str, chunk: Chunk) -> None:
    problems = [problem for seed in chunk.seeds() for problem in running.run(seed, name)]
    if problems:
        more = f"\n\nand {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        pytest.fail("\n\n".join(problems[:TOLD]) + more, pytrace=False)
