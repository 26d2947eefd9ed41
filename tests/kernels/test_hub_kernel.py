"""The Triton kernels of the folder that the Hub's package `kernels` loads."""

import hub_kernels
import pytest

import cmdp_fast as cf


@pytest.mark.triton
@pytest.mark.skipif(cf.available_backends()["triton"] is not None, reason="Triton does not work here")
def test_the_kernels_that_are_loaded_give_the_packages_bits(tmp_path):
    kernel = hub_kernels.loaded(tmp_path / "kernel")
    assert kernel.available_backends()["triton"] is None
    for operation in hub_kernels.OPERATIONS:
        assert hub_kernels.same(operation(kernel, "triton"), operation(cf, "triton")), operation.__name__
