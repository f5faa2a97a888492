"""The proof holds on the native engine, for every kind of scheme it runs."""

import pytest

from bitquest.evaluation.verify import verify
from bitquest.ops.native import availability

pytestmark = pytest.mark.skipif(not availability()[0], reason=availability()[1])
SMALL = {"tokens": 200, "texts": 2, "new_tokens": 8}
SCHEMES = [
    *("w1a1", "w1a2", "w1a8", "w2a2", "w2a8", "w3a3", "w4a4", "w4a8", "w8a8"),
    *(f"w{bits}a16" for bits in range(1, 9)),
    *("w4a4-2:4", "w4a4-g128"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_passes_on_the_native_engine(trained_run, tmp_path, scheme):
    wide = {"hidden_size": 128, "intermediate_size": 128} if scheme.endswith("g128") else {}
    trained_run(tmp_path, scheme, **wide)
    report = verify(tmp_path / "run", tmp_path / "packed", backend="native", **SMALL)
    assert report.passed, [(check.name, check.failures) for check in report.failed]
