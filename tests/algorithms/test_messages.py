"""What algorithms refuse: field, rule, value, way out."""

from typing import Any

import pytest

from metadist.algorithms import (
    AID,
    ITD,
    PZOBO,
    SAMA,
    UFOM,
    VPBGD,
    AmIGO,
    LancBiO,
    MetaSGD,
    SubBiO,
)  # fmt: skip

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (AID, {"adjoint_lr": 0.1}, "adjoint_lr must be None with solver='cg', got 0.1: conjugate"),
    (
        AID,
        {"solver": "normal_cg", "adjoint_lr": 0.1},
        "adjoint_lr must be None with solver='normal_cg', got 0.1: conjugate",
    ),
    (
        AID,
        {"solver": "neumann", "adjoint_lr": 0.0},
        "adjoint_lr must be > 0 and finite, got 0.0",
    ),
    (
        AID,
        {"solver": "neumann", "inner_optimizer": "adam"},
        "adjoint_lr must be given with inner_optimizer='adam', got None: the rate of that",
    ),
    (
        AID,
        {"solver": "neumann", "warm_start": True},
        "warm_start must be False with solver='neumann', got True: its sum has no start",
    ),
    (
        AmIGO,
        {"solver": "cg", "adjoint_lr": 0.1},
        "adjoint_lr must be None with solver='cg', got 0.1: conjugate gradients have no rate",
    ),
    (
        AmIGO,
        {"inner_optimizer": "adam"},
        "adjoint_lr must be given with inner_optimizer='adam', got None",
    ),
    (
        SubBiO,
        {"inner_optimizer": "adam"},
        "adjoint_lr must be given with inner_optimizer='adam', got None",
    ),
    (
        LancBiO,
        {"subspace_start": 11},
        r"subspace_cap must be >= subspace_start \(11\), got 10",
    ),
    (
        LancBiO,
        {"adjoint_steps": 12},
        r"subspace_cap must be >= adjoint_steps \(12\), got 10",
    ),
    (
        PZOBO,
        {"inner_optimizer": "adam", "momentum": 0.5},
        r"momentum must be 0 with",
    ),
    (
        SAMA,
        {"inner_optimizer": "rmsprop"},
        r"inner_optimizer must be one of \('sgd', 'adam'\), got 'rmsprop'",
    ),
    (
        UFOM,
        {"exact_probability": 0.0},
        r"exact_probability must be in \(0, 1\], got 0.0: .* ITD with first_order=True",
    ),
    (UFOM, {"exact_probability": 1.1}, r"exact_probability must be in \(0, 1\], got 1.1"),
    (VPBGD, {"gamma_init": 11.0}, r"gamma_init must be <= gamma_max \(10.0\), got 11.0"),
    (
        VPBGD,
        {"gamma_init": 5.0},
        r"gamma_init must be 0 with gamma_steps=0, got 5.0: without a rise",
    ),
    (MetaSGD, {"learn_lr": "no"}, r"learn_lr must be 'per_element' in MetaSGD, got 'no': ITD has"),
    (MetaSGD, {"learn_lr": "per_tensor"}, r"must be 'per_element' in MetaSGD, got 'per_tensor'"),
    (MetaSGD, {"inner_steps": 0}, r"inner_steps must be >= 1, got 0"),
    (ITD, {"learn_lr": "yes"}, r"learn_lr must be 'no', 'per_tensor' or 'per_element', got 'yes'"),
    (
        ITD,
        {"engine": "jax"},
        r"engine must be one of \['adjoint', 'higher', 'unrolled'\], got 'jax'",
    ),
    (
        ITD,
        {"truncate": 2, "first_order": True},
        r"truncate must be None with first_order=True.*got 2",
    ),
    (
        ITD,
        {"truncate": 0},
        r"truncate must be between 1 and inner_steps \(5\), got 0; .* first_order=True",
    ),
    (ITD, {"truncate": 6}, r"truncate must be between 1 and inner_steps \(5\), got 6"),
    (
        ITD,
        {"compile": True, "engine": "unrolled"},
        r"compile must be False with engine='unrolled', got True: only .* engine='adjoint'",
    ),
    (
        ITD,
        {"compile": True, "engine": "higher"},
        r"compile must be False with engine='higher', got True",
    ),
    (
        ITD,
        {"inner_optimizer": "adagrad"},
        r"inner_optimizer must be 'sgd' with engine='adjoint', got 'adagrad'; engine='higher'",
    ),
    (
        ITD,
        {"inner_optimizer": "adam", "engine": "unrolled"},
        r"inner_optimizer must be 'sgd' with engine='unrolled', got 'adam'",
    ),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED, ids=str)
def test_it_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
