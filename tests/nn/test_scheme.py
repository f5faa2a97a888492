import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.errors import ConfigError
from bitquest.nn import Scheme
from bitquest.numerics import (
    ALL_ESTIMATORS,
    ALL_GRIDS,
    ALL_SPARSITIES,
    FP4,
    TERNARY,
    AbsMax,
    BlockHadamard,
    Clip,
    Learned,
    NofM,
    NoRotation,
    PerGroup,
    PerRow,
    PerTensor,
    Quantizer,
    StraightThrough,
    Trust,
    UniformGrid,
)

NAMES = [
    "none",
    *(f"w{w}a{a}" for w in (1, 2, 3, 4, 5, 6, 7, 8, 16) for a in (1, 2, 3, 4, 5, 6, 7, 8, 16)),
    *("w4a4-fp4", "w2a2-ternary", "w4a16-fp4", "w16a4-fp4", "w4a4-2:4", "w4a4-4:8", "w1a1-2:4-g64-norot-ste-h8"),
    *("w2a8-g64-h8", "w4a4-h4", "w1a1-norot", "w1a1-norot-ste", "w1a1-ste", "w1a1-clip", "w4a4-clip", "w16a16-h8"),
    *("w1a8-g128-norot", "w16a16-norot-h4", "w4a4-fp4-4:8-g32-norot-clip-h4"),
    *("w2a2-tensor-norot-lsq", "w4a8-lsq+", "w1a1-norot-pact", "w2a2-ternary-norot-paretoq", "w2a8-norot-bitnet-h8"),
    *("w4a4-mxfp4-norot-ste", "w4a4-nvfp4-2:4", "w8a8-fp8", "w3a3-lloyd-g64", "w4a4-fp4-g32-norot-lsq"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.from_json(scheme.to_json()) == scheme


def test_what_names_mean() -> None:
    one = Scheme.parse("w1a1")
    assert one.weight == one.activation == Quantizer(UniformGrid(1), PerRow(), estimator=Clip(1.30))
    assert one.rotation == BlockHadamard()
    assert Scheme.parse("w1a1-norot").weight == Quantizer(UniformGrid(1), estimator=Clip(1.25))
    assert Scheme.parse("w1a1-norot").rotation == NoRotation()
    mixed = Scheme.parse("w1a8")
    assert (mixed.weight.estimator, mixed.activation.estimator) == (Clip(1.30), Trust())  # type: ignore[union-attr]
    assert Scheme.parse("w4a16").activation is None
    assert Scheme.parse("w4a16").rotation == BlockHadamard()
    sparse = Scheme.parse("w4a4-4:8")
    assert sparse.weight.sparsity == NofM(2, 4, pair=True)  # type: ignore[union-attr]
    assert not sparse.activation.is_sparse  # type: ignore[union-attr]
    assert Scheme.parse("w4a4-fp4").weight.grid == FP4  # type: ignore[union-attr]
    assert Scheme.parse("w2a2-ternary-g64").activation == Quantizer(TERNARY, PerGroup(64))
    assert Scheme.parse("w2a8-h8").head == Scheme.parse("w2a8-h8").embedding == Quantizer(UniformGrid(8))
    assert Scheme.parse("w1a1-ste").weight.estimator == StraightThrough()  # type: ignore[union-attr]
    assert Scheme.parse(" W4A4 ") == Scheme.parse("w4a4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w9a4", "w9 is no width"),
        ("w4a0", "a0 is no width"),
        ("int4", "unknown scheme 'int4'"),
        ("w4a4-norott", "did you mean 'norot'"),
        ("w4a4-zzz", "'zzz' is unknown"),
        ("w3a3-fp4", "so write w4"),
        ("w1a1-ternary", "so write w2"),
        ("w4a4-2:4-4:8", "more than one sparsity"),
        ("w4a4-fp4-ternary", "more than one format"),
        ("w4a4-h8-h4", "more than one width"),
        ("w16a4-2:4", "does not quantize them"),
        ("w16a16-ste", "quantizes nothing"),
        ("{", "not valid JSON"),
        ('{"weight": 1}', "a scheme has the keys"),
        ("", "unknown scheme"),
        ("w4a4-", r"'' is unknown\. A scheme is"),
        ("w01a4", "unknown scheme"),
        ("w１a1", "unknown scheme"),
        ("w" + "9" * 5000 + "a1", "unknown scheme"),
        (4, "a string such as 'w4a4', not 4"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(activation=Quantizer(granularity=PerTensor())), "see later ones"),
        (lambda: Scheme(activation=Quantizer(sparsity=NofM(2, 4))), "activations stay dense"),
        (lambda: Scheme(activation=Quantizer(scale=Learned())), "rows are tokens"),
        (lambda: Scheme(embedding=Quantizer(scale=Learned())), "the embedding takes"),
        (lambda: Scheme(head=Quantizer(sparsity=NofM(2, 4))), "the head takes"),
    ],
)
def test_combinations_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


weights = st.builds(
    Quantizer,
    st.sampled_from(ALL_GRIDS),
    st.sampled_from([PerTensor(), PerRow(), PerGroup(64)]),
    st.sampled_from([AbsMax(), Learned()]),
    st.sampled_from(ALL_ESTIMATORS),
    st.sampled_from(ALL_SPARSITIES),
)
activations = st.builds(Quantizer, st.sampled_from(ALL_GRIDS), st.sampled_from([PerRow(), PerGroup(32)]))
rotations = st.sampled_from([NoRotation(), BlockHadamard(), BlockHadamard(64)])
schemes = st.builds(Scheme, st.none() | weights, st.none() | activations, rotations, st.none() | activations)


@settings(deadline=None)  # a codebook that a name stands for is computed once
@given(schemes)
def test_any_scheme_round_trips(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.from_json(scheme.to_json()) == scheme
