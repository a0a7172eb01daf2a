"""The algorithms that differentiate the inner loop, and Reptile."""

from metadist.algorithms import BDA, IAPTT, ITD, Reptile
from tests.algorithms.cases import Case

CASES: dict[str, Case] = {
    "itd": Case(
        ITD(inner_steps=20, inner_lr=0.3),
        {"inner_grad": 20, "outer_grads": 1, "hvp": 20, "jvp": 20},
        # The warm start counts as a constant, so the error of the unrolled map remains.
        tolerance=0.1,
    ),
    "bda": Case(
        BDA(inner_steps=20, inner_lr=0.3, alpha=0.1),
        {"inner_grad": 20, "outer_grads": 20 + 1, "hvp": 20, "jvp": 20}
        | {"outer_hvp": 20, "outer_jvp": 20},
        tolerance=0.2,  # and the bias of the share of f
    ),
    "iaptt": Case(
        IAPTT(inner_steps=20, inner_lr=0.3, start_lr=0.01),
        {"inner_grad": 20, "outer_value": 20, "outer_grads": 1, "hvp": 20, "jvp": 20},
        tolerance=0.3,  # f at the worst of 20 steps, and z fits f
    ),
    "reptile": Case(Reptile(inner_steps=5, inner_lr=0.3), {"inner_grad": 5}),
}
