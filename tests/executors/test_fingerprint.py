"""The numeric fingerprint."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from asynctrain.errors import FingerprintError
from asynctrain.executors.fingerprint import numeric_fingerprint, require_same


def test_it_names_what_bits_depend_on_and_is_json() -> None:
    fingerprint = numeric_fingerprint()
    assert fingerprint["numpy"] == np.__version__
    assert {"blas", "cpu", "machine"} <= fingerprint.keys()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == numeric_fingerprint()


def test_equal_fingerprints_pass_and_others_name_each_difference() -> None:
    ours = {"numpy": "2.0", "blas": "openblas"}
    require_same(ours, dict(ours))
    with pytest.raises(FingerprintError, match=r"numpy is '2\.0' here and '2\.1' there") as caught:
        require_same(ours, {"numpy": "2.1", "blas": "openblas"})
    assert caught.value.differences == {"numpy": ("2.0", "2.1")}


def test_libraries_that_other_packages_load_are_no_part_of_it() -> None:
    code = (
        "from asynctrain.executors.fingerprint import numeric_fingerprint as fingerprint\n"
        "before = fingerprint()\n"
        "import scipy.linalg\n"  # the wheel of scipy has a BLAS of its own
        "assert fingerprint() == before, (before, fingerprint())\n"
        "assert before['blas']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
