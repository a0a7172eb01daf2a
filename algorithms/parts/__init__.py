"""The parts that methods share; no method imports another one.

inner: optimisers of y, and the bases Descent, InnerLoop and SingleLoop
unrolling: derivatives through the steps of the inner loop (with `higher`: by that library)
linear: solvers for H v = b by products alone;   implicit: H, and the estimate f_x - J v
maps: fixed points of a problem's own map, in the place of steps on g
neumann: random chains for the adjoint;   recursion: momentum of differences
differences: J v by differences of first derivatives, random directions
"""
