"""What algorithms refuse: field, rule, value, way out."""

from typing import Any

import pytest

from metadist.algorithms import (
    AID,
    BOME,
    DARTS,
    ITD,
    MRBO,
    PZOBO,
    SAMA,
    UFOM,
    VPBGD,
    AmIGO,
    LancBiO,
    MetaSGD,
    SubBiO,
)  # fmt: skip
from metadist.step_rules import SGD, Adam, AdamW

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
        {"solver": "neumann", "inner_optimizer": Adam(0.1)},
        "adjoint_lr must be given with inner_optimizer=Adam, got None: the rate of that",
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
        {"inner_optimizer": Adam(0.1)},
        "adjoint_lr must be given with inner_optimizer=Adam, got None",
    ),
    (
        SubBiO,
        {"inner_optimizer": Adam(0.1)},
        "adjoint_lr must be given with inner_optimizer=Adam, got None",
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
        {"inner_optimizer": Adam(0.1), "inner_lr": 0.2},
        r"inner_lr must be left out with inner_optimizer=Adam\(lr=0.1.*, got 0.2: the rate is",
    ),
    (
        SAMA,
        {"inner_optimizer": "rmsprop"},
        r"inner_optimizer must be SGD\(...\), Adam\(...\) or AdamW\(...\), got 'rmsprop'",
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
        {"inner_optimizer": Adam(0.1), "engine": "higher"},
        r"inner_optimizer must be SGD without .* with engine='higher', got Adam\(.* epsilon before",
    ),
    (
        ITD,
        {"inner_optimizer": SGD(0.1, clip_norm=1.0), "compile": True},
        r"compile must be False with clip_norm=1.0, got True: .* each is clipped by its own norm",
    ),
    (
        MetaSGD,
        {"inner_optimizer": AdamW(0.1)},
        r"inner_optimizer must be SGD with learn_lr='per_element', got AdamW",
    ),
    (
        ITD,
        {"inner_optimizer": SGD(0.1, warmup_steps=3), "learn_lr": "per_tensor"},
        r"inner_optimizer must have schedule='constant' and warmup_steps=0 with learn_lr=",
    ),
    (
        DARTS,
        {"inner_optimizer": Adam(0.1)},
        r"adjoint_lr must be given with inner_optimizer=Adam, got None: .* SAMA has its derivative",
    ),
    (
        BOME,
        {"inner_optimizer": Adam(0.1), "inner_steps": 2},
        r"rounds must be >= 2 with inner_optimizer=Adam, got 1: .* sign of the gradient",
    ),
    (
        MRBO,
        {"inner_optimizer": SGD(0.1, momentum=0.9)},
        r"inner_optimizer must be SGD\(momentum=0\) in MRBO, got SGD\(.*: its direction is a",
    ),
    (
        AID,
        {"inner_optimizer": AdamW(0.1)},
        r"inner_optimizer.weight_decay must be 0 in AID, got 0.01: y would then solve another",
    ),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED, ids=str)
def test_it_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
